"""What a process tells of itself when it is asked, or when it stands still."""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.servers.waiting import wait_until
from tests.system.control_group import control_group
from tests.system.load import require_quick
from tests.system.service import READY_WITHIN, Prober, Service, percentile, running

APP = ("--app", "tests.system.log_app:app")


def handles(pid: int, number: signal.Signals) -> bool:
    """Tell whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def reported(service: Service, message: str, *, count: int = 1) -> list[dict[str, Any]]:
    """Wait for that many lines on heap reports and return them: each takes seconds of CPU."""

    def look() -> list[dict[str, Any]]:
        lines = service.logged(message)
        return lines if len(lines) >= count else []

    return wait_until(look, seconds=60, what=lambda: f"{message}; {service.output}")


@pytest.mark.alone
def test_a_heap_report_is_written_while_the_service_goes_on(tmp_path: Path) -> None:
    """SIGUSR2 makes a file, a line that says where, and no probe late."""
    environment = {"HEAP_SNAPSHOT_DIR": str(tmp_path)}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        with Prober(service.port, "/health/live") as prober:
            wait_until(lambda: len(prober.seen) > 20, what="some probes")
            service.signal(signal.SIGUSR2)
            service.signal(signal.SIGUSR2)
            (line,) = reported(service, "Heap report written")
            wait_until(
                lambda: prober.seen[-1].at > prober.seen[0].at + 1, what="a second of probes"
            )
        path = Path(line["path"])
        text = path.read_text(encoding="utf-8")
        seconds = [sighting.seconds for sighting in prober.seen]
        print(  # noqa: T201 - what it measured
            f"report in {line['duration']} ms; p99 {percentile(seconds, 0.99) * 1000:.1f} ms"
        )

        assert path.parent == tmp_path
        assert path.stat().st_mode & 0o777 == 0o600
        assert line["objects"] > 10_000
        assert str(service.process.pid) in text
        assert "dict" in text
        assert all(sighting.status == 200 for sighting in prober.seen)
        require_quick(max(seconds), 1.0, "/health/live")
        service.signal(signal.SIGUSR2)  # and another one
        reported(service, "Heap report written", count=2)
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0


def test_a_heap_report_beside_grpc_says_nothing_of_its_own(tmp_path: Path) -> None:
    """Whose library would tell of the descriptors that the report's process is without."""
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


@pytest.mark.parametrize("what", ["missing", "not writable", "full"])
def test_a_heap_report_that_cannot_be_written_is_one_line(tmp_path: Path, what: str) -> None:
    """No permission, no folder, no room: the service goes on."""
    folder = tmp_path / "reports"
    if what != "missing":
        folder.mkdir()
    if what == "not writable":
        if os.geteuid() == 0:
            folder = Path("/proc/self")  # where not even root creates files
        else:
            folder.chmod(0o500)
    environment = {"HEAP_SNAPSHOT_DIR": str(folder)}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        if what == "full":
            import resource  # noqa: PLC0415 - a limit stands in for a disk

            resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (100, 100))
        service.signal(signal.SIGUSR2)
        (line,) = reported(service, "Heap report failed")
        assert service.get("/health/live").status == 200

    assert line["level"] == "error"
    assert line["detail"].startswith("cannot ")
    assert not folder.exists() or not list(folder.glob("heap-*"))


def test_a_heap_report_that_is_asked_for_too_early_ends_nothing() -> None:
    """While it starts there is none, and nobody who asks can know how far it has come."""
    with running(*APP) as service:
        wait_until(
            lambda: handles(service.process.pid, signal.SIGTERM),
            seconds=READY_WITHIN,
            what="its first handler",
        )
        service.signal(signal.SIGUSR2)
        service.wait_ready()


def test_a_heap_report_for_which_no_memory_is_left_is_given_up(tmp_path: Path) -> None:
    """Before the kernel gives up the service for it."""
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

    assert line["detail"] == "it takes more memory than is left"
    assert list(tmp_path.iterdir()) == []


def test_a_blocked_loop_is_one_warning_that_shows_what_blocks_it() -> None:
    """While it is blocked; and how long it took once it is over."""
    environment = {"LOOP_STALL_THRESHOLD": "400"}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        service.get("/block?seconds=1.2", headers={"X-Correlation-ID": "order-1"})
        blocked, over = wait_until(lambda: block_and_end(service), what="the end")
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        assert block_and_end(service) == [blocked, over]

    assert blocked["level"] == "warn"
    assert 390 <= blocked["blocked"] < 1200
    # Before that Python tells no thread what the loop of another is at.
    assert blocked.get("correlationId") == ("order-1" if sys.version_info >= (3, 12) else None)
    assert "correlationId" not in over
    assert 900 <= over["duration"] < 3000


def block_and_end(service: Service) -> list[dict[str, Any]]:
    """Return the one line that tells of ``/block``, and the one on its end: both, or none yet.

    On a busy machine the loop may stand still by itself, too: that is told as well.
    """
    lines = [json.loads(line) for line in list(service.output) if line.startswith("{")]
    told = [line for line in lines if line["message"].startswith("Event loop ")]
    blocks = [at for at, line in enumerate(told) if shows_the_block(line)]
    if not blocks or blocks[0] + 1 == len(told):
        return []
    (at,) = blocks
    assert told[at + 1]["message"] == "Event loop runs again"
    return told[at : at + 2]


def shows_the_block(line: dict[str, Any]) -> bool:
    """Tell whether a line holds a stack in whose innermost frame the application blocks."""
    *_, innermost = line.get("stack", [""])
    return "log_app.py" in innermost and innermost.endswith(" block")


def test_a_loop_that_runs_is_not_told_of() -> None:
    """Nor is one that is blocked for less than the threshold, or when nobody wants to know."""
    for threshold, seconds in (("5000", "0.3"), ("0", "1.0")):
        with running(*APP, environment={"LOOP_STALL_THRESHOLD": threshold}) as service:
            service.wait_ready()
            service.get(f"/block?seconds={seconds}")
            service.signal(signal.SIGTERM)
            assert service.exit_code() == 0
            assert not service.logged("Event loop is blocked")
