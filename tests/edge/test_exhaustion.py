"""Exhaustion attacks on memory and descriptors of a service with kernel limits.

``just bench-edge --check`` runs the same attacks at full size on idle cores, and measures times.
"""

import resource
import select
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import psutil
import pytest
from tests.edge.flood import HEADERS, MIB, ONE_HEADER, ONE_URL, flood
from tests.edge.test_attacks import probed
from tests.edge.wire import TIMEOUT_SECONDS, Wire, rejected, silent
from tests.servers.waiting import wait_until
from tests.system.control_group import control_group
from tests.system.service import Service, request, running

APP = ("--app", "tests.edge.edge_app:app")
LINE = "HTTP request rejected"
CONNECTIONS = 300
TOTAL = 150 * MIB
DESCRIPTORS = 256
SILENT = 1000
HEAD_TIMEOUT = 2.0


class PeakMemory:
    """Reads the resident bytes of a process every 10 ms."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        """Growth from the start to the peak, in bytes."""
        return self.peak - self.before

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self._process.memory_info().rss)


def _lines(service: Service) -> dict[str, int]:
    """Return the number of log lines by reason."""
    reasons = [line["reason"] for line in service.logged(LINE)]
    return {reason: reasons.count(reason) for reason in reasons}


@contextmanager
def _limited(mebibytes: int) -> Iterator[Service]:
    """Run a service in a control group with a memory limit."""
    with control_group() as group:
        group.limit(mebibytes)
        with running(*APP, management=True, cgroup=group.path) as service:
            yield service.wait_ready()


def test_endless_requests_use_little_memory() -> None:
    """Each connection gets a response or is closed, and the process keeps answering probes."""
    started_at = time.monotonic()
    with (
        _limited(256) as service,
        probed(service),
        PeakMemory(service.process.pid) as memory,
    ):
        kinds = [HEADERS] * 8 + [ONE_HEADER, ONE_URL]
        outcome = flood(
            service.port, kinds, connections=CONNECTIONS, total=TOTAL, seconds=3 * TIMEOUT_SECONDS
        )
        minutes = (time.monotonic() - started_at) / 60
        wait_until(lambda: _lines(service), what="a log line")
        lines, counted = _lines(service), rejected(service)

    assert outcome.sent >= TOTAL
    assert set(outcome.ends) <= {"431", "503", "closed", "reset"}
    assert outcome.ends["431"] > 0
    assert memory.growth <= 64 * MIB
    assert sum(counted.values()) >= CONNECTIONS
    assert set(counted) <= {"head_too_large", "too_many_headers", "memory", "connections"}
    assert max(lines.values()) <= 2 + minutes


def test_large_heads_on_many_connections_use_little_memory() -> None:
    """Fifty connections with a mebibyte of head each get 431."""
    with running(*APP, management=True) as service:
        service.wait_ready()
        with probed(service), PeakMemory(service.process.pid) as memory:
            outcome = flood(
                service.port,
                [HEADERS, ONE_HEADER, ONE_URL],
                connections=50,
                total=50 * MIB,
                seconds=3 * TIMEOUT_SECONDS,
            )

    assert outcome.ends["431"] >= 50
    assert set(outcome.ends) <= {"431", "closed", "reset"}
    assert memory.growth < 32 * MIB


def test_unfinished_heads_of_all_connections_are_limited() -> None:
    """Above a sixteenth of the memory limit a large head is 503, and small ones are served."""
    size = 60_000
    with _limited(100) as service, ExitStack() as stack, probed(service):
        wires = [
            stack.enter_context(Wire(service.port)).send(b"GET /" + b"a" * size)
            for _ in range(100 * MIB // 16 // size + 3)
        ]
        wait_until(lambda: rejected(service).get("memory", 0) >= 2, what="heads are rejected")
        sockets = [wire.socket for wire in wires]
        readable, _, _ = select.select(sockets, [], [], TIMEOUT_SECONDS)
        answers = [wire.response() for wire in wires if wire.socket in readable]
        counts = rejected(service)

    assert {(one.status, one.header(b"retry-after")) for one in answers} == {(503, b"1")}
    assert set(counts) == {"memory"}


@contextmanager
def _descriptors(wanted: int) -> Iterator[None]:
    """Raise the descriptor limit of this process, or skip the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"the hard limit of open files is {hard}, and the clients need {wanted}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_silent_connections_do_not_use_up_the_descriptors() -> None:
    """The management port always answers, and the API port again after their timeout."""
    with running(
        *APP,
        management=True,
        descriptors=DESCRIPTORS,
        environment={
            "HTTP_HEAD_TIMEOUT": f"{HEAD_TIMEOUT * 1000:.0f}",
            "HEALTH_CHECK_INTERVAL": "500",
        },
    ) as service:
        service.wait_ready()
        assert service.management_port is not None
        management = service.management_port
        with _descriptors(SILENT + 200), silent(service.port, SILENT):
            held_at = time.monotonic()
            seen: list[int] = []

            def api_responds() -> bool:
                seen.append(request(management, "/health/live", timeout=TIMEOUT_SECONDS).status)
                memory = request(management, "/health/memory", timeout=TIMEOUT_SECONDS).json()
                assert memory["status"] == "pass", memory
                return service.status("/health/live") == 200

            wait_until(api_responds, seconds=2 * TIMEOUT_SECONDS, what="the API answers")
            back_after = time.monotonic() - held_at
            wait_until(
                lambda: "connections" in _lines(service),
                what="a log line about rejected connections",
            )
            counted = rejected(service)

    assert set(seen) == {200}
    # A loose bound; the benchmark checks for HTTP_HEAD_TIMEOUT + 1 s.
    assert back_after < 10 * HEAD_TIMEOUT
    assert counted["connections"] > 0
    assert counted["head_timeout"] > 0
