"""Measures the ends of processes that an obstacle delays, and until their jobs run elsewhere."""

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

from benchmarks import durations
from benchmarks.durations import Case, Times, require
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.waiting import wait_until
from tests.system.connections import begun, send
from tests.system.culprit_tasks import RUNS
from tests.system.culprits import CULPRITS
from tests.system.jobs import accept, job, until
from tests.system.service import Service, running
from tests.system.workers import LEASE, SWEEP, api, environment_of, worker

READING = (
    "A stop is from the signal to the end of the process, which is noticed up to 50 ms late, with"
    " the code in the name. In brackets is the setting that bounds it. The processes start without"
    " a readiness delay. A job that was handed back or whose worker was killed runs elsewhere once"
    f" the API shows its new worker; the lease is {LEASE:g} s, and a sweep runs each {SWEEP:g} s."
)
PLANTED = ("--app", "tests.system.apps:planted")
PLAIN = ("--app", "tests.system.apps:plain")
_UPGRADE = (
    b"GET /socket HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
_END_WITHIN = 60.0
"""Seconds after which a wait fails: far beyond each limit."""


def _head(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


@contextmanager
def _serving(*arguments: str, **milliseconds: int) -> Iterator[Service]:
    environment = {f"SHUTDOWN_{name}": str(value) for name, value in milliseconds.items()}
    with running(*arguments, environment=environment, fresh=True) as service:
        yield service.wait_ready()


def _stopped(
    service: Service, code: int = 0, *, by: signal.Signals = signal.SIGTERM, since: float = 0.0
) -> float:
    """Send a signal, unless it was sent ``since``; return the seconds until the process ends."""
    began = since or time.monotonic()
    if not since:
        service.signal(by)
    seen = service.exit_code(seconds=_END_WITHIN)
    took = time.monotonic() - began
    require(seen == code, f"it ends with {seen}, not with {code}")
    return took


def _read(connection: socket.socket, expected: bytes) -> None:
    received = b""
    while expected not in received and (chunk := connection.recv(65536)):
        received += chunk
    require(expected in received, f"{expected!r} in {received[-200:]!r}")


# -- requests --------------------------------------------------------------------------------


def _streams() -> float:
    with _serving(*PLAIN, DRAIN_TIMEOUT=2000) as service, ExitStack() as stack:
        heads = (_head("/events"), _head("/bytes"), _UPGRADE)
        for head in heads:
            stack.enter_context(begun(service, head))
        return _stopped(service)


def _closed_stream(path: str) -> float:
    with _serving(*PLAIN, DRAIN_TIMEOUT=40_000) as service:
        stream = begun(service, _head(path))
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        _read(stream, b"event: shutdown")
        stream.close()
        return _stopped(service, since=began)


def _unread() -> float:
    with _serving(*PLAIN, DRAIN_TIMEOUT=1000) as service, begun(service, _head("/flood")):
        return _stopped(service)


def _after(path: str, **milliseconds: int) -> float:
    """Stop a service whose handler has left something behind."""
    with _serving(*PLAIN, **milliseconds) as service:
        require(service.get(path).status == 200, path)
        return _stopped(service)


# -- obstacles -------------------------------------------------------------------------------


def _blocked(how: str) -> float:
    budgets = {"DRAIN_TIMEOUT": 500, "STATE_TIMEOUT": 500, "CONNECTION_TIMEOUT": 500}
    with _serving(*PLAIN, **budgets, FORCE_TIMEOUT=2000) as service:

        def times_out() -> bool:
            try:
                service.get("/work", timeout=0.5)
            except OSError:
                return True
            return False

        with send(service, _head(f"/block/{how}")):
            wait_until(times_out, what="the loop is blocked")
            return _stopped(service, 124)


def _stage(how: str) -> float:
    environment = {"PLANTED_STAGE": how, "SHUTDOWN_DRAIN_TIMEOUT": "500"}
    with running(*PLANTED, environment=environment, fresh=True) as service:
        return _stopped(service.wait_ready(), 4)


def _second_interrupt() -> float:
    with _serving(*PLAIN, READINESS_DELAY=40_000, FORCE_TIMEOUT=100_000) as service:
        service.signal(signal.SIGINT)
        wait_until(lambda: service.status("/health/ready") == 503, what="the stop began")
        return _stopped(service, 130, by=signal.SIGINT)


# -- jobs ------------------------------------------------------------------------------------


def _jobs_in_memory() -> float:
    environment = {"TASK_MODULES": "tests.job_tasks", "SHUTDOWN_DRAIN_TIMEOUT": "1500"}
    with running(environment=environment, fresh=True) as service:
        service.wait_ready()
        hangs = accept(service, "parcels.never", None)
        accept(service, "parcels.wait", 600)
        until(service, hangs, "active")
        return _stopped(service, 4)


@contextmanager
def _workers(**environment: str) -> Iterator[tuple[Service, Callable[[], Service]]]:
    """Run an API on Postgres; return it with a function that starts a worker."""
    with postgres_server() as server, ExitStack() as stack:
        variables = environment_of(_database(server), **environment)
        service = stack.enter_context(api(variables, fresh=True))
        yield service, lambda: stack.enter_context(worker(variables, fresh=True))


def _database(server: PostgresServer) -> Database:
    return Database(server, server.create_database())


def _until_at(service: Service, ids: Sequence[str], owner: Service) -> float:
    began, name = time.monotonic(), f"-{owner.process.pid}-"
    wait_until(
        lambda: all(name in str(job(service, each)["worker"]) for each in ids),
        seconds=_END_WITHIN,
        what="they run elsewhere",
    )
    return time.monotonic() - began


def _hand_back() -> Times:
    poll = {"SHUTDOWN_DRAIN_TIMEOUT": "1000", "JOB_POLL_INTERVAL": "60000"}
    with _workers(**poll) as (service, start):
        first = start()
        ids = [accept(service, "parcels.wait", 600), accept(service, "parcels.never", 0)]
        for each in ids:
            until(service, each, "active")
        second = start()
        stopped = _stopped(first)
        moved = _until_at(service, ids, second)
        second.process.kill()
    return {HANDED_BACK: stopped, "jobs that were handed back run elsewhere": moved}


def _killed() -> float:
    with _workers() as (service, start):
        first = start()
        ids = [accept(service, "parcels.wait", 600)]
        until(service, ids[0], "active")
        second = start()
        first.process.kill()
        took = _until_at(service, ids, second)
        second.process.kill()
    return took


def _blocked_thread() -> float:
    more = {"TASK_MODULES": CULPRITS, "SHUTDOWN_DRAIN_TIMEOUT": "2000"}
    with NamedTemporaryFile() as runs, _workers(**more, **{RUNS: runs.name}) as (service, start):
        blocking = start()
        job_id = accept(service, "culprits.block_thread", {"how": "sleep", "seconds": 600})
        wait_until(lambda: job_id in Path(runs.name).read_text("ascii"), what="it has begun")
        return _stopped(blocking)


def _case(name: str, limit: float, measure: Callable[[], float]) -> tuple[str, Case]:
    return name, Case({name: limit}, lambda: {name: measure()})


HANDED_BACK = "worker, jobs beyond the budget (drain 1 s)"
CASES = dict(
    [
        _case("endless streams and a WebSocket (drain 2 s)", 5.0, _streams),
        *(
            _case(f"{what} whose client leaves (drain 40 s)", 10.0, partial(_closed_stream, path))
            for what, path in (("a stream", "/events"), ("a stream without events", "/quiet"))
        ),
        _case("a client that does not read (drain 1 s)", 6.0, _unread),
        _case("a thread without an end", 5.0, partial(_after, "/thread/stuck")),
        _case(
            "a child process (force 55 s)",
            8.0,
            partial(_after, "/child/kept", FORCE_TIMEOUT=55_000),
        ),
        *(
            _case(f"a loop blocked in {how}, code 124 (force 2 s)", 8.0, partial(_blocked, how))
            for how in ("python", "native")
        ),
        *(
            _case(f"a stage that {what}, code 4 (drain 0.5 s)", 5.0, partial(_stage, how))
            for how, what in (
                ("hang", "hangs"),
                ("swallow", "swallows cancellation"),
                ("fail", "fails"),
            )
        ),
        _case("the second SIGINT, code 130", 5.0, _second_interrupt),
        _case("jobs in memory beyond the budget, code 4 (drain 1.5 s)", 4.0, _jobs_in_memory),
        (
            HANDED_BACK,
            Case({HANDED_BACK: 3.0, "jobs that were handed back run elsewhere": 2.0}, _hand_back),
        ),
        _case("worker, a task blocks a thread (drain 2 s)", 7.0, _blocked_thread),
        _case("a job of a killed worker runs elsewhere", LEASE + SWEEP + 2.0, _killed),
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    return durations.main("bench-stops", "stops.py", __doc__, CASES, READING, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
