"""How a service starts, seen from outside, and what it finds from before."""

import os
import signal
from pathlib import Path

import pytest
from tests.servers.waiting import wait_until
from tests.system.service import READY_WITHIN, running

PLAIN = ("--app", "tests.system.apps:plain")


def test_an_application_that_fails_to_start_exits_3() -> None:
    """The failure is logged, whatever began is closed, and the exit code is 3."""
    with running("--app", "tests.system.apps:fails_to_start") as service:
        code = service.exit_code()

    assert code == 3
    assert "planted in start-up" in "".join(service.output)


def test_probes_answer_while_the_application_starts() -> None:
    """Live is 200, ready and startup 503, requests are refused with 503; SIGTERM still stops it."""
    with running("--app", "tests.system.apps:never_starts") as service:
        wait_until(lambda: service.status("/health/live") == 200, seconds=READY_WITHIN, what="live")
        ready = service.get("/health/ready")
        startup = service.get("/health/startup")
        other = service.get("/anything")
        service.signal(signal.SIGTERM)

        assert (ready.status, ready.json()["reason"]) == (503, "starting")
        assert (startup.status, startup.json()["started"]) == (503, False)
        assert (other.status, other.headers["retry-after"]) == (503, "1")
        assert service.exit_code(seconds=60) == 0


def test_a_signal_during_the_imports_is_not_lost() -> None:
    """SIGTERM that comes before the event loop runs still ends in an ordered stop."""
    with running(*PLAIN) as service:
        wait_until(
            lambda: _handles_sigterm(service.process.pid),
            seconds=READY_WITHIN,
            what="the handler is there",
        )
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
        assert service.logged("Process ends")


def test_state_survives_a_restart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With STATE_DIR the next process knows how the one before it ended."""
    folder = tmp_path_factory.mktemp("state")
    token = {"Authorization": "Bearer planted"}
    environment = {"STATE_DIR": str(folder), "MANAGEMENT_TOKEN": "planted"}
    with running(environment=environment) as service:
        service.wait_ready()
        none_before = service.get("/health/shutdown", headers=token).json()["previous"]
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
    with running(environment=environment) as service:
        service.wait_ready()
        previous = service.get("/health/shutdown", headers=token).json()["previous"]

    assert none_before is None
    assert (
        previous["reason"],
        previous["starts"],
        previous["health"],
    ) == ("SIGTERM", 1, "healthy")
    assert [path.name for path in folder.iterdir()] == ["state.json"]


def _handles_sigterm(pid: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:  # noqa: PTH123
        caught = next(line for line in status if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_an_application_with_litestars_own_logging_logs_as_all_others() -> None:
    """Making a Litestar application configures logging; ours comes after it."""
    with running("--app", "tests.system.apps:default_logging") as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0

    assert service.logged("Process ends")
    assert [line for line in service.output if not line.startswith("{")] == []


def test_a_closed_standard_output_changes_nothing() -> None:
    """Without a place for its log the service runs and stops all the same."""
    with running(*PLAIN, closed_output=True) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


def test_probes_answer_while_saved_state_is_slow_to_load(tmp_path: Path) -> None:
    """A disk that hangs keeps the service from being ready, not from answering."""
    os.mkfifo(tmp_path / "state.json")
    with running(*PLAIN, environment={"STATE_DIR": str(tmp_path)}) as service:
        wait_until(lambda: service.status("/health/live") == 200, seconds=READY_WITHIN, what="live")
        ready = service.get("/health/ready")

        assert (ready.status, ready.json()["reason"]) == (503, "starting")


def test_an_application_cannot_make_the_service_deaf() -> None:
    """SIGTERM that a start-up hook set to be ignored is heard again."""
    with running("--app", "tests.system.apps:ignores_sigterm") as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
