"""A WSGI application that submits jobs: it has threads and no event loop."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress

import psycopg
import psycopg2
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from viralfx import JobService, OperationsConfig, OperationsLayer, task

URL = os.environ["DATABASE_URL"]
BY_SQLALCHEMY = create_engine(URL.replace("postgresql:", "postgresql+psycopg:"))


@task("wsgi.note")
async def note(text: str) -> str:
    """Return the text."""
    return text


operations = OperationsLayer(OperationsConfig(tasks=[note]))
jobs: JobService = operations.jobs
# Before the server forks: its workers need connections of their own.
jobs.submit_sync(note, "import")


class LeaveError(Exception):
    """Rolls a transaction back."""


def plain(text: str, _commit: bool) -> None:  # noqa: FBT001 - as the others
    """Submit alone."""
    jobs.submit_sync(note, text)
    jobs.submit_many_sync(note, [text, text])


def by_psycopg(text: str, commit: bool) -> None:  # noqa: FBT001 - of the path
    """Submit in a transaction of psycopg."""
    with psycopg.connect(URL) as connection:
        jobs.submit_sync(note, text, connection=connection, key=f"psycopg {text}")
        jobs.submit_many_sync(note, [text, text], connection=connection)
        if not commit:
            raise LeaveError


def by_psycopg2(text: str, commit: bool) -> None:  # noqa: FBT001 - of the path
    """Submit in a transaction of psycopg2."""
    with psycopg2.connect(URL) as connection:
        jobs.submit_sync(note, text, connection=connection)
        jobs.submit_many_sync(note, [text, text], connection=connection)
        if not commit:
            raise LeaveError


def by_sqlalchemy(text: str, commit: bool) -> None:  # noqa: FBT001 - of the path
    """Submit in a session of SQLAlchemy."""
    with Session(BY_SQLALCHEMY) as session:
        jobs.submit_sync(note, text, connection=session)
        jobs.submit_many_sync(note, [text, text], connection=session)
        if commit:
            session.commit()


KINDS: dict[str, Callable[[str, bool], None]] = {
    "plain": plain,
    "psycopg": by_psycopg,
    "psycopg2": by_psycopg2,
    "sqlalchemy": by_sqlalchemy,
}


def app(environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Serve ``/{kind}/{commit or leave}/{text}``; the answer is the id of the process."""
    _, kind, end, text = environ["PATH_INFO"].split("/")
    with suppress(LeaveError):
        KINDS[kind](text, end == "commit")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
