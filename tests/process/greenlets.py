"""Submits jobs in a process whose threads are greenlets; run it as a program.

Without gevent it replaces the threads of Python as gevent does: they share one thread of the
operating system.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from itertools import count
from typing import Any


def replace_threads() -> None:
    """Patch the standard library before the service is imported."""
    with contextlib.suppress(ImportError):
        import_module("gevent.monkey").patch_all()
        return
    running, idents = [threading.get_ident()], count(10**9)

    def start(function: Callable[..., object], arguments: Any = (), **_: object) -> None:
        running.append(next(idents))
        try:
            function(*arguments)
        finally:
            running.pop()

    for name, replacement in {
        "get_ident": lambda: running[-1],
        "_start_new_thread": start,
        "_start_joinable_thread": start,
    }.items():
        setattr(threading, name, replacement)


def main() -> None:
    """Write the outcomes of two calls alone, and of one in a transaction, as JSON."""
    import psycopg  # noqa: PLC0415 - after the patch, as the next ones
    from sqlalchemy import create_engine  # noqa: PLC0415
    from sqlalchemy.orm import Session  # noqa: PLC0415

    from viralfx import OperationsConfig, OperationsLayer, task  # noqa: PLC0415

    @task("greenlets.note")
    async def note(number: int) -> int:
        return number

    jobs = OperationsLayer(OperationsConfig(tasks=[note])).jobs
    outcomes: list[object] = []
    for number in range(2):
        try:
            outcomes.append(jobs.submit_sync(note, number).created)
        except RuntimeError as error:
            outcomes.append(str(error))
    address = os.environ["DATABASE_URL"]
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(address))
    with Session(engine) as session:
        outcomes.append(jobs.submit_sync(note, 2, connection=session).created)
        session.commit()
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    replace_threads()
    main()
