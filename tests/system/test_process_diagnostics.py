"""Heap reports on SIGUSR2, and warnings about a blocked event loop."""

import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.servers.waiting import wait_until
from tests.soak import cycles
from tests.system.control_group import control_group
from tests.system.service import READY_WITHIN, Prober, Service, running

# A report takes seconds of CPU, and many more on a busy machine.
pytestmark = pytest.mark.timeout(300)

APP = ("--app", "tests.system.log_app:app")


def handles(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def reported(service: Service, message: str, *, count: int = 1) -> list[dict[str, Any]]:
    """Wait for ``count`` lines on heap reports and return them: each takes seconds of CPU."""

    def found() -> list[dict[str, Any]]:
        lines = service.logged(message)
        return lines if len(lines) >= count else []

    return wait_until(found, seconds=120, what=lambda: f"{message}; {service.output}")


@pytest.mark.soak
def test_a_heap_report_does_not_delay_the_service(tmp_path: Path) -> None:
    """SIGUSR2 writes a file and a log line with its path; probes are answered meanwhile."""
    environment = {"HEAP_SNAPSHOT_DIR": str(tmp_path)}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        with Prober(service.port, "/health/live", timeout=30) as prober:
            wait_until(lambda: prober.seen, what="a probe")
            asked = time.monotonic()
            service.signal(signal.SIGUSR2)
            service.signal(signal.SIGUSR2)
            (line,) = reported(service, "Heap report written")
            meanwhile = [each for each in list(prober.seen) if each.at > asked]
        path = Path(line["path"])
        text = path.read_text(encoding="utf-8")

        assert path.parent == tmp_path
        assert path.stat().st_mode & 0o777 == 0o600
        assert line["objects"] > 10_000
        assert str(service.process.pid) in text
        assert "dict" in text
        assert all(sighting.status == 200 for sighting in prober.seen)
        # A report of a blocked process would leave time for one.
        assert len(meanwhile) >= 5
        for number in cycles(3, usual=0):
            service.signal(signal.SIGUSR2)
            reported(service, "Heap report written", count=2 + number)
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0


@pytest.mark.each_python
def test_a_heap_report_with_grpc_writes_no_other_output(tmp_path: Path) -> None:
    """The gRPC library would log that the child process has closed its descriptors."""
    with socket.create_server(("127.0.0.1", 0)) as collector:
        environment = {
            "HEAP_SNAPSHOT_DIR": str(tmp_path),
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.getsockname()[1]}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with running(*APP, environment=environment) as service:
            service.wait_ready()
            service.get("/orders/1")
            collector.settimeout(READY_WITHIN)
            with collector.accept()[0]:
                service.signal(signal.SIGUSR2)
                reported(service, "Heap report written")
                service.signal(signal.SIGTERM)
                assert service.exit_code() == 0

    assert service.errors == []


def test_a_heap_report_that_cannot_be_written_logs_one_line(tmp_path: Path) -> None:
    """No folder, no permission, no disk space: the service goes on."""
    folder, denied = tmp_path / "reports", tmp_path / "denied"
    denied.mkdir(mode=0o500)
    # Where not even root creates files.
    target = Path("/proc/self") if os.geteuid() == 0 else denied
    with running(*APP, environment={"HEAP_SNAPSHOT_DIR": str(folder)}) as service:
        service.wait_ready()
        for number, what in enumerate(("missing", "not writable", "full"), start=1):
            if what == "not writable":
                folder.symlink_to(target)
            if what == "full":
                folder.unlink()
                folder.mkdir()
                # A limit stands in for a disk.
                resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (100, 100))
            service.signal(signal.SIGUSR2)
            lines = reported(service, "Heap report failed", count=number)
            assert service.get("/health/live").status == 200
            assert len(lines) == number
            assert lines[-1]["level"] == "error"
            assert lines[-1]["detail"].startswith("cannot "), what
            assert not list(tmp_path.glob("*/heap-*"))


def test_a_heap_report_requested_during_the_start_is_ignored() -> None:
    """SIGUSR2 during the start writes no report and does not end the process."""
    with running(*APP) as service:
        wait_until(
            lambda: handles(service.process.pid, signal.SIGTERM),
            seconds=READY_WITHIN,
            what="its first handler",
        )
        service.signal(signal.SIGUSR2)
        service.wait_ready()


def test_a_heap_report_without_enough_memory_fails(tmp_path: Path) -> None:
    """The report fails before the kernel kills the service."""
    limit, used = 256, 0.88
    filled = ("--app", "tests.system.drills.app:app")
    with (
        control_group() as group,
        running(*filled, environment={"HEAP_SNAPSHOT_DIR": str(tmp_path)}) as service,
    ):
        group.limit(limit)
        group.add(service.process.pid)
        service.wait_ready()
        resident = psutil.Process(service.process.pid).memory_info().rss
        more = round(limit * used - resident / 2**20)
        assert service.get(f"/uploads/{more}", method="POST").status == 201
        service.signal(signal.SIGUSR2)
        (line,) = reported(service, "Heap report failed")
        assert service.get("/health/live").status == 200

    assert line["detail"] == "not enough memory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.each_python
def test_a_blocked_loop_is_one_warning_with_its_stack() -> None:
    """One warning during the block, and one line with its duration after it."""
    environment = {"LOOP_STALL_THRESHOLD": "400"}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        service.get("/block?seconds=3", headers={"X-Correlation-ID": "order-1"})
        blocked, over = wait_until(lambda: block_and_end(service), what="the end")
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        assert block_and_end(service) == [blocked, over]

    assert blocked["level"] == "warn"
    assert 390 <= blocked["blocked"] < over["duration"]
    # Older Python versions do not show a thread the current task of another thread's loop.
    assert blocked.get("correlationId") == ("order-1" if sys.version_info >= (3, 12) else None)
    assert "correlationId" not in over
    assert 2700 <= over["duration"] < 30_000


def block_and_end(service: Service) -> list[dict[str, Any]]:
    """Return the warning about ``/block`` and the line on its end: both, or none yet.

    On a busy machine the loop may block for other reasons, which is logged as well.
    """
    lines = [json.loads(line) for line in list(service.output) if line.startswith("{")]
    logged = [line for line in lines if line["message"].startswith("Event loop ")]
    blocks = [at for at, line in enumerate(logged) if shows_the_block(line)]
    if not blocks or blocks[0] + 1 == len(logged):
        return []
    (at,) = blocks
    assert logged[at + 1]["message"] == "Event loop runs again"
    return logged[at : at + 2]


def shows_the_block(line: dict[str, Any]) -> bool:
    """Return whether a line holds a stack whose innermost frame is the blocking handler."""
    *_, innermost = line.get("stack", [""])
    return "log_app.py" in innermost and innermost.endswith(" block")


def test_a_running_loop_logs_no_warning() -> None:
    """Neither is a block below the threshold, or any block with the threshold 0."""
    for threshold, seconds in (("5000", "0.3"), ("0", "1.0")):
        with running(*APP, environment={"LOOP_STALL_THRESHOLD": threshold}) as service:
            service.wait_ready()
            service.get(f"/block?seconds={seconds}")
            service.signal(signal.SIGTERM)
            assert service.exit_code() == 0
            assert not service.logged("Event loop is blocked")
