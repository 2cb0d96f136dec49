"""The jobs of a process without an event loop: its thread, in shortages and with bad servers."""

import gc
import logging
from collections.abc import Callable, Iterator

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from tests.process.shortages import descriptors_used_up
from tests.servers.postgres import Database

from viralfx import OperationsConfig, OperationsLayer, task
from viralfx.bootstrap.threaded import ThreadedJobs
from viralfx.domain.jobs.service import JobService


@task("threaded.note")
async def note(number: int) -> int:
    """Return the number."""
    return number


@pytest.fixture
def jobs_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., JobService]]:
    """Return the jobs of a process in which no application runs, by its variables."""
    made: list[JobService] = []

    def make(**environment: str) -> JobService:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made.append(OperationsLayer(OperationsConfig(tasks=[note])).jobs)
        return made[-1]

    yield make
    for jobs in made:
        assert isinstance(jobs._apart, ThreadedJobs)
        for opened in jobs._apart._opened.values():
            opened.thread.close()


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_commit_succeeds_without_a_free_descriptor(
    migrated_database: Database,
    jobs_of: Callable[..., JobService],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It has taken effect before the process finds that it cannot notify the workers."""
    jobs = jobs_of(DATABASE_URL=migrated_database.url)
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(migrated_database.url)
    )
    with Session(engine) as session:
        jobs.submit_sync(note, 1, connection=session)
        with caplog.at_level(logging.WARNING), descriptors_used_up():
            session.commit()
        stored = session.scalar(text("SELECT count(*) FROM viralfx_ops.viralfx_all_jobs"))
    later = jobs.submit_sync(note, 2)
    engine.dispose()
    logged = [each.getMessage() for each in caplog.records]
    caplog.clear()
    gc.collect()  # Python does not close the event loop that it could not make

    assert stored == 1
    assert logged == ["Notification of jobs not sent; workers find the jobs by polling"]
    assert later.created
