"""A deployment of a new task and a changed payload, worker by worker, and back, under jobs."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from threading import Event, Thread
from typing import Any

from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.jobs import accept
from tests.system.service import Service
from tests.system.workers import api, worker

NEW = ("deployed.refund", "deployed.pay new")
"""Jobs that only workers of the new version can run."""
_PAUSE_SECONDS = 0.02
_REGISTRATIONS = (
    "create table registrations (tasks text[], at timestamptz default clock_timestamp())",
    """
    create function log_registration() returns trigger language plpgsql as $$ begin
        insert into public.registrations (tasks) values (new.tasks);
        return new;
    end $$
    """,
    """
    create trigger log_registration after insert on viralfx_workers
    for each row execute function log_registration()
    """,
)
"""Keep the moment at which each worker registers: the ledger has only living workers."""


class Submitter:
    """Submits jobs evenly over a deployment, to the API of one version or the other."""

    def __init__(self, database: Database) -> None:
        self.submitted: dict[str, str] = {}
        """The task and payload of each job, by id."""
        self._database = database
        self._service: Service | None = None
        self._version = "old"

    def use(self, service: Service, version: str) -> None:
        """Submit to another API from now on."""
        self._service, self._version = service, version

    def submit(self) -> None:
        """Submit one job: of the new task, with the new payload, or with the old one."""
        service, number = self._service, len(self.submitted)
        assert service is not None
        what, task, payload = {
            ("old", 0): ("deployed.pay old", "deployed.pay", {"cents": number}),
            ("old", 1): ("deployed.pay old", "deployed.pay", {"cents": number}),
            ("new", 0): ("deployed.refund", "deployed.refund", number),
            ("new", 1): ("deployed.pay new", "deployed.pay", {"amount": f"{number} EUR"}),
        }[self._version, number % 2]
        self.submitted[accept(service, task, payload)] = what

    @contextmanager
    def submitting(self, count: int) -> Iterator[None]:
        """Submit ``count`` jobs during the block, and the rest of them at its end."""
        begun, stop = len(self.submitted), Event()

        def run() -> None:
            while len(self.submitted) < begun + count and not stop.wait(_PAUSE_SECONDS):
                self.submit()

        thread = Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        while len(self.submitted) < begun + count:
            self.submit()

    def jobs(self) -> list[dict[str, Any]]:
        """Return what the ledger has of all jobs."""
        columns = ("id", "state", "created_at", "started_at", "attempts", "result", "error_code")
        query = f"select {', '.join(columns)} from viralfx_all_jobs where task like 'deployed.%'"  # noqa: S608 - of this module
        rows = self._database.execute(query)
        return [dict(zip(columns, (str(row[0]), *row[1:]), strict=True)) for row in rows]

    def completed(self, *needs: str) -> bool:
        """Return True once all jobs that need this version have completed."""
        return all(
            job["state"] == "completed"
            for job in self.jobs()
            if not needs or self.submitted.get(job["id"]) in needs
        )

    def delays(self) -> dict[str, list[float]]:
        """Return the seconds of each job from the first moment at which it could start.

        That is its acceptance, or the registration of the first worker that knows its task and its
        payload, if that came later. The seconds are in order, by task and payload.
        """
        able = {
            version: min(at for tasks, at in self._registrations() if version in _versions(tasks))
            for version in ("old", "new")
        }
        delays: dict[str, list[float]] = {}
        for job in self.jobs():
            what = self.submitted[job["id"]]
            # Workers of both versions can run the old payload.
            first = able["new"] if what in NEW else min(able.values())
            delay = (job["started_at"] - max(job["created_at"], first)).total_seconds()
            delays.setdefault(what, []).append(delay)
        return {what: sorted(each) for what, each in sorted(delays.items())}

    def _registrations(self) -> list[tuple[list[str], datetime]]:
        return self._database.execute("select tasks, at from registrations")


def _versions(tasks: list[str]) -> tuple[str, ...]:
    return ("new",) if "deployed.refund" in tasks else ("old",)


class Fleet:
    """Workers of either version, each of which can be replaced."""

    def __init__(self, environments: Mapping[str, Mapping[str, str]]) -> None:
        self._environments = environments
        self._stacks: list[tuple[Service, ExitStack]] = []

    def start(self, version: str) -> None:
        """Start a worker, and return once it is ready."""
        stack = ExitStack()
        process = stack.enter_context(worker(self._environments[version]))
        self._stacks.append((process, stack))

    def replace(self, version: str) -> None:
        """Start a worker of a version, and end the one that has run for longest."""
        self.start(version)
        self.stop()

    def stop(self) -> None:
        """End the worker that has run for longest; it exits with 0."""
        process, stack = self._stacks.pop(0)
        with stack:
            process.signal(signal.SIGTERM)
            assert process.exit_code(seconds=30.0) == 0

    def close(self) -> None:
        """Kill what still runs."""
        for _, stack in self._stacks:
            stack.close()


def deploy_and_roll_back(
    database: Database,
    environment: Mapping[str, str],
    jobs: int,
    *,
    until_unknown: Callable[[Service], object],
    until_known: Callable[[Service], object],
) -> Submitter:
    """Deploy and roll back under jobs; return once all of them have completed.

    The API is replaced before the workers, both times. ``until_unknown`` is called with the new API
    while no worker knows the new task, ``until_known`` with the old API at the end.
    """
    for statement in _REGISTRATIONS:
        database.execute(statement)
    environments = {
        version: {**environment, "TASK_MODULES": f"tests.system.deployed_{version}"}
        for version in ("old", "new")
    }
    submitter, fleet, quarter = Submitter(database), Fleet(environments), jobs // 4
    with ExitStack() as stack:
        stack.callback(fleet.close)
        old = stack.enter_context(api(environments["old"], "--no-worker"))
        new = stack.enter_context(api(environments["new"], "--no-worker"))
        fleet.start("old")
        fleet.start("old")
        submitter.use(old, "old")
        with submitter.submitting(quarter):
            pass
        submitter.use(new, "new")
        with submitter.submitting(quarter):
            until_unknown(new)
        assert not submitter.completed(*NEW)
        with submitter.submitting(quarter):
            fleet.replace("new")
            fleet.replace("new")
        submitter.use(old, "old")
        with submitter.submitting(jobs - 3 * quarter):
            fleet.replace("old")
            wait_until(lambda: submitter.completed(*NEW), seconds=30.0, what="the new jobs end")
            fleet.replace("old")
        wait_until(submitter.completed, seconds=30.0, what="all jobs end")
        until_known(old)
    return submitter
