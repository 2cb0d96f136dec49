"""Workers with jobs that go wrong, and bystanders in other queues that must not notice."""

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.control_group import ControlGroup
from tests.system.culprit_tasks import RUNS
from tests.system.jobs import JOBS, accept, job
from tests.system.service import READY_WITHIN, Service, running

BYSTANDERS = 200
_BESIDE = BYSTANDERS if SOAK else 60
"""Bystanders of one test."""
_TASKS = ("bystanders.notify", "bystanders.analyse")
FINAL = ("completed", "failed", "cancelled")
WORKERS = 3


@dataclass
class Crowd:
    """Bystanders that have completed."""

    shown: list[dict[str, Any]]
    runs: list[int]


@dataclass
class Crew:
    """An API, three workers, and the file to which each execution appends a line."""

    service: Service
    database: Database
    environment: Mapping[str, str]
    workers: list[Service]
    runs_file: Path
    stack: ExitStack
    group: ControlGroup | None = None
    """Limits the memory of the workers."""
    exits: list[int] = field(default_factory=list)
    """The exit codes of the workers that ended and were replaced."""

    def start_worker(self, **more: str) -> Service:
        """Start one more worker, without waiting for it."""
        environment = {**self.environment, **more}
        cgroup = None if self.group is None else self.group.path
        return self.stack.enter_context(
            running(program="worker", management=True, environment=environment, cgroup=cgroup)
        )

    def submit(self, task: str, payload: object) -> str:
        """Submit a job and return its id."""
        return accept(self.service, task, payload)

    def noted(self, job_id: str, what: str = "begun") -> int:
        """Return how often a job appended a line."""
        return self.notes()[job_id, what]

    def notes(self) -> Counter[tuple[str, str]]:
        """Return all lines of the file, counted."""
        lines = self.runs_file.read_text(encoding="ascii").splitlines()
        return Counter((one, what) for one, what in (line.split() for line in lines))

    def begun(self, job_ids: Sequence[str]) -> None:
        """Wait until each job has begun once."""
        wait_until(lambda: all(self.noted(each) for each in job_ids), what="they have begun")

    def final(self, job_id: str, *, seconds: float = 60.0) -> dict[str, Any]:
        """Return a job once it is final."""

        def settled() -> dict[str, Any] | None:
            shown = job(self.service, job_id)
            return shown if shown["state"] in FINAL else None

        found = wait_until(settled, seconds=seconds, what=lambda: f"{job(self.service, job_id)}")
        assert found is not None
        return found

    def stand_by(self, *, seconds: float = 60.0) -> Crowd:
        """Have the bystanders accepted, and return them when they have completed."""
        ids = [
            accept(self.service, _TASKS[number % len(_TASKS)], number) for number in range(_BESIDE)
        ]
        shown: dict[str, dict[str, Any]] = {}
        base = f"http://127.0.0.1:{self.service.port}"
        with httpx.Client(base_url=base, timeout=10) as client:

            def completed() -> bool:
                for each in ids:
                    if each in shown:
                        continue
                    found = client.get(f"{JOBS}/{each}").json()
                    if found["state"] not in FINAL:
                        return False
                    shown[each] = found
                return True

            wait_until(
                completed,
                seconds=seconds,
                what=lambda: f"{len(shown)} of {len(ids)} bystanders completed",
            )
        notes = self.notes()
        return Crowd([shown[each] for each in ids], [notes[each, "begun"] for each in ids])

    def health(self) -> list[str]:
        """Return the status and message of the check ``queues`` in each process."""
        said = []
        for ask in (self.service.get, *(each.manage for each in self.workers)):
            try:
                shown = ask("/health/queues?fresh=1", timeout=2).json()
            except OSError:
                continue
            said.append(f"{shown['status']} {shown['message']}")
        return said

    def says(self, text: str, *, seconds: float = 60.0) -> str:
        """Return the first line of ``health`` that contains a text."""

        def found() -> str | None:
            return next((line for line in self.health() if text in line), None)

        line = wait_until(found, seconds=seconds, what=lambda: f"{text}: {self.health()}")
        assert line is not None
        return line

    def is_well(self) -> bool:
        """Return True if no process warns about its queues."""
        return all(line.startswith("pass") for line in self.health())

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement on the database, as the superuser."""
        return self.database.execute(sql)

    def stop(self) -> list[int]:
        """Stop all workers and return their exit codes."""
        for each in self.workers:
            each.signal(signal.SIGTERM)
        return [each.exit_code(seconds=30) for each in self.workers]


@contextmanager
def replacing(crew: Crew) -> Iterator[Callable[[], None]]:
    """Start a worker for each one that ends, as an orchestrator does, until the call."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            for place, each in enumerate(crew.workers):
                if (code := each.process.poll()) is not None:
                    crew.exits.append(code)
                    crew.workers[place] = crew.start_worker()

    thread = threading.Thread(target=watch)

    def end() -> None:
        ended.set()
        thread.join()
        for each in crew.workers:
            each.wait_ready()

    thread.start()
    try:
        yield end
    finally:
        ended.set()
        thread.join()


@contextmanager
def crew(
    database: Database,
    environment: Mapping[str, str],
    folder: Path,
    *,
    group: ControlGroup | None = None,
    service_modules: str | None = None,
) -> Iterator[Crew]:
    """Run an API and three workers; ``service_modules`` are the API's, if it has other ones."""
    runs = folder / "runs"
    runs.touch(exist_ok=False)
    environment = {**environment, RUNS: str(runs)}
    modules = service_modules or environment["TASK_MODULES"]
    with ExitStack() as stack:
        service = stack.enter_context(
            running("--no-worker", environment={**environment, "TASK_MODULES": modules})
        )
        made = Crew(service, database, environment, [], runs, stack, group)
        made.workers = [made.start_worker() for _ in range(WORKERS)]
        with ThreadPoolExecutor() as threads:
            list(threads.map(Service.wait_ready, [service, *made.workers]))
        assert service.process.poll() is None, READY_WITHIN
        yield made
