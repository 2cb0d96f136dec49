"""The jobs of a process without an event loop: its thread, in shortages and with bad servers."""

import asyncio
import gc
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from tests.process.foreign_calls import in_child
from tests.process.shortages import descriptors_used_up
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.service import ROOT, clean_environment

from viralfx import LedgerUnavailableError, OperationsConfig, OperationsLayer, task
from viralfx.bootstrap.threaded import ThreadedJobs
from viralfx.jobs.model import JobState
from viralfx.jobs.service import JobService


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


def test_callers_of_a_frozen_database_share_one_attempt(
    jobs_of: Callable[..., JobService], caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them waits for one connection timeout, also if there are many."""
    callers = 12
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"postgresql://user:word@127.0.0.1:{silent.getsockname()[1]}/name"
        jobs = jobs_of(DATABASE_URL=address, DB_CONNECTION_TIMEOUT="1000")
        begin = threading.Barrier(callers)

        def submit(number: int) -> Exception | None:
            begin.wait()
            try:
                jobs.submit_sync(note, number)
            except LedgerUnavailableError as error:
                return error
            return None

        with ThreadPoolExecutor(callers) as threads:
            errors = list(threads.map(submit, range(callers)))

    attempts = [each for each in caplog.records if "attempt failed" in each.getMessage()]
    assert all(str(error).startswith("DATABASE_URL: the database at") for error in errors)
    assert len(attempts) <= 3  # one, unless the machine delays a thread for a second


def test_greenlets_are_refused_by_name(migrated_database: Database) -> None:
    """An event loop cannot run in one; a call in a transaction needs none."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.process.greenlets"],
        cwd=ROOT,
        env={**clean_environment(), "DATABASE_URL": migrated_database.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    stored = migrated_database.execute("SELECT count(*)::int FROM viralfx_ops.viralfx_all_jobs")

    assert done.returncode == 0, done.stderr
    *refused, accepted = json.loads(done.stdout)
    assert all(str(each).startswith("gevent or eventlet has replaced") for each in refused)
    assert accepted is True
    assert stored == [(1,)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_with_a_former_process_id_has_connections_of_its_own(
    migrated_database: Database, jobs_of: Callable[..., JobService], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system gives ids again, and connections of an ancestor serve no other process."""
    jobs = jobs_of(DATABASE_URL=migrated_database.url)
    jobs.submit_sync(note, 1)
    former = os.getpid()

    def submit() -> None:
        monkeypatch.setattr(os, "getpid", lambda: former)
        jobs.submit_sync(note, 2)

    assert in_child(submit) == "accepted"
    assert jobs.submit_sync(note, 3).created


@pytest.mark.usefixtures("plain_environ")
def test_waiting_for_jobs_keeps_no_other_thread_waiting() -> None:
    """Without an application each waits on a loop of its own, and the others submit and cancel."""
    jobs = OperationsLayer(OperationsConfig(tasks=[note])).jobs
    job = jobs.submit_sync(note, 1).job
    with ThreadPoolExecutor() as threads:
        waiting = [
            threads.submit(asyncio.run, jobs.wait(each, timeout=20))
            for each in (job.id, job.id, jobs.submit_sync(note, 2).job.id)
        ]
        wait_until(lambda: jobs.follower._followed, what="a waiting thread")
        try:
            other = jobs.submit_sync(note, 3).job.id
            for each in (job.id, other):
                asyncio.run(jobs.cancel(each))
            ended = [each.result(60).state for each in waiting[:2]]
        finally:
            jobs.follower.end()
        with pytest.raises(TimeoutError, match="this process stops"):
            waiting[2].result(60)

    assert ended == [JobState.CANCELLED] * 2
    assert not jobs.follower._followed


@pytest.mark.usefixtures("plain_environ")
def test_a_loader_keeps_no_other_thread_waiting() -> None:
    """Without an application each loop loads by itself, also a key that another one loads."""
    cache = OperationsLayer(OperationsConfig()).cache
    began, ends = threading.Event(), threading.Event()

    async def slow() -> bytes:
        began.set()
        await asyncio.to_thread(ends.wait)
        return b"slow"

    async def quick() -> bytes:
        return b"quick"

    with ThreadPoolExecutor() as threads:
        loading = threads.submit(asyncio.run, cache.get_or_load("key", 60, slow))
        assert began.wait(30)
        try:
            found = [asyncio.run(cache.get_or_load(key, 60, quick)) for key in ("other", "key")]
        finally:
            ends.set()

        assert (found, loading.result(30)) == ([b"quick"] * 2, b"slow")
