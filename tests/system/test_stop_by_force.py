"""Obstacles to a graceful shutdown, and how the process still ends."""

import contextlib
import signal
import socket
import time

import pytest
from tests.servers.waiting import wait_until
from tests.system.connections import send
from tests.system.service import Service, request, running

APP = ("--app", "tests.system.apps:planted")
PLAIN = ("--app", "tests.system.apps:plain")
BLOCKED = {
    "SHUTDOWN_DRAIN_TIMEOUT": "500",
    "SHUTDOWN_STATE_TIMEOUT": "100",
    "SHUTDOWN_CONNECTION_TIMEOUT": "100",
    "SHUTDOWN_FORCE_TIMEOUT": "1000",
}


@pytest.mark.each_python
@pytest.mark.parametrize("where", ["python", "native"])
def test_a_blocked_loop_ends_by_the_watchdog(where: str) -> None:
    """With the loop blocked the process ends at the force timeout with stacks and code 124."""
    budgets = {
        "SHUTDOWN_DRAIN_TIMEOUT": "500",
        "SHUTDOWN_STATE_TIMEOUT": "500",
        "SHUTDOWN_CONNECTION_TIMEOUT": "500",
        "SHUTDOWN_FORCE_TIMEOUT": "2000",
    }
    with running(*PLAIN, environment=budgets) as service:
        service.wait_ready()
        blocked = send(service, f"GET /block/{where} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        wait_until(lambda: _times_out(service), what="the loop is blocked")
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        code = service.exit_code()
        took = time.monotonic() - began
        blocked.close()

    said = "".join(service.errors)
    assert code == 124
    assert took > 1.9
    assert "stacks of all threads" in said
    assert f"block_in_{where}" in said
    assert "\nTask 'main' (most recent call first):\n" in said
    assert " in Process._main\n" in said


def test_a_second_sigint_forces() -> None:
    """The first SIGINT stops gracefully; the second ends the process with 130 at once."""
    long = {"SHUTDOWN_READINESS_DELAY": "40000", "SHUTDOWN_FORCE_TIMEOUT": "100000"}
    with running(*PLAIN, environment=long) as service:
        service.wait_ready()
        service.signal(signal.SIGINT)
        wait_until(lambda: service.status("/health/ready") == 503, what="the stop began")
        service.signal(signal.SIGINT)

        assert service.exit_code() == 130


def test_repeated_sigterm_and_one_sigint_are_one_shutdown() -> None:
    """Later triggers join the first: one deadline, one reason, exit 0."""
    token = {"Authorization": "Bearer planted"}
    environment = {"SHUTDOWN_READINESS_DELAY": "1500", "MANAGEMENT_TOKEN": "planted"}
    with running(*PLAIN, environment=environment) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)
        wait_until(lambda: service.status("/health/ready") == 503, what="the stop began")
        first = service.get("/health/shutdown", headers=token).json()
        service.signal(signal.SIGTERM)
        service.signal(signal.SIGINT)
        joined = service.get("/health/shutdown", method="POST", headers=token)
        second = service.get("/health/shutdown", headers=token).json()

        assert joined.status == 200
        assert first["reason"] == second["reason"] == joined.json()["reason"] == "SIGTERM"
        assert first["deadline"] == second["deadline"] == joined.json()["deadline"]
        assert service.exit_code() == 0


@pytest.mark.each_python
@pytest.mark.parametrize("where", ["task", "callback", "thread", "main"])
def test_an_uncaught_exception_runs_the_stages_and_exits_1(where: str) -> None:
    """From any thread or task, the stop is graceful and the exit code is 1."""
    with running(*APP) as service:
        service.wait_ready()
        service.status(f"/crash/{where}")
        if where == "main":
            # The place where the handler runs is random: in a destructor the interpreter ignores
            # exceptions. So the test repeats the signal until the exception is logged.
            wait_until(lambda: _signalled(service), what="the exception is seen")
        code = service.exit_code()

    assert code == 1
    assert len(service.logged("Uncaught exception")) == 1
    assert "planted in" in str(service.logged("Uncaught exception")[0]["exception"])
    ended = {line["stage"] for line in service.logged("Shutdown stage ended")}
    assert {"listeners", "requests", "planted", "state", "application", "server"} <= ended


@pytest.mark.parametrize("kind", ["future", "gather", "executor"])
def test_an_exception_of_a_future_is_logged_and_counted(kind: str) -> None:
    """No task of the process ended with it, so the process goes on; the exit code is 0."""
    message = "Exception of a future was not retrieved"
    with running(*APP) as service:
        service.wait_ready()
        for _ in range(2):
            service.status(f"/drop/{kind}")
        lines = wait_until(
            lambda: found if len(found := service.logged(message)) == 2 else None, what="two lines"
        )
        ready = service.status("/health/ready")
        service.signal(signal.SIGTERM)

        assert ready == 200
        assert service.exit_code() == 0
    assert [line["count"] for line in lines] == [1, 2]
    assert all(f"planted in {kind}" in str(line["exception"]) for line in lines)
    assert service.logged("Uncaught exception") == []


def test_an_uncaught_exception_may_be_only_logged() -> None:
    """SHUTDOWN_ON_UNCAUGHT=false logs and goes on; the exit code stays 0."""
    with running(*APP, environment={"SHUTDOWN_ON_UNCAUGHT": "false"}) as service:
        service.wait_ready()
        service.status("/crash/thread")
        wait_until(lambda: service.logged("Uncaught exception"), what="the log line")
        still = service.status("/health/ready")
        service.signal(signal.SIGTERM)

        assert still == 200
        assert service.exit_code() == 0


@pytest.mark.parametrize("behaviour", ["hang", "swallow", "fail"])
def test_a_failing_stage_is_skipped_and_gives_4(behaviour: str) -> None:
    """If a stage hangs, swallows cancellation or raises, the other stages still run."""
    environment = {"PLANTED_STAGE": behaviour, "SHUTDOWN_DRAIN_TIMEOUT": "500"}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)
        code = service.exit_code()

    outcomes = {line["stage"]: line["outcome"] for line in service.logged("Shutdown stage ended")}
    assert code == 4
    assert outcomes.pop("planted") == ("failed" if behaviour == "fail" else "timeout")
    assert set(outcomes.values()) == {"ok"}
    assert {"state", "application", "server"} <= outcomes.keys()


def test_a_stage_that_blocks_the_loop_is_ended_by_the_watchdog() -> None:
    """Even then the process ends at the force timeout, with 124."""
    environment = {
        "PLANTED_STAGE": "block",
        "SHUTDOWN_DRAIN_TIMEOUT": "500",
        "SHUTDOWN_STATE_TIMEOUT": "100",
        "SHUTDOWN_CONNECTION_TIMEOUT": "100",
        "SHUTDOWN_FORCE_TIMEOUT": "1000",
    }
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 124


def test_an_endless_thread_does_not_delay_the_exit() -> None:
    """The process ends although the interpreter would wait for the thread."""
    with running(*PLAIN) as service:
        service.wait_ready()
        service.get("/thread/stuck")
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


def test_an_application_that_fails_to_stop_gives_4() -> None:
    """A failing lifespan shutdown is a failed stage."""
    with running("--app", "tests.system.apps:fails_to_stop") as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 4


def _signalled(service: Service) -> bool:
    service.signal(signal.SIGUSR1)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: service.logged("Uncaught exception"), seconds=1, what="the log line")
    return bool(service.logged("Uncaught exception"))


def _times_out(service: Service) -> bool:
    try:
        request(service.port, "/health/live", timeout=0.3)
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


@pytest.mark.parametrize("path", ["/stderr/none", "/stderr/full"])
def test_the_watchdog_needs_no_standard_error(path: str) -> None:
    """It ends the process without a standard error, and if writing to it blocks."""
    with running(*PLAIN, environment=BLOCKED) as service:
        service.wait_ready()
        assert service.get(path).status == 200
        blocked = send(service, b"GET /block/python HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_until(lambda: _times_out(service), what="the loop is blocked")
        service.signal(signal.SIGTERM)
        code = service.exit_code(seconds=60)
        blocked.close()

    assert code == 124


@pytest.mark.each_python
def test_a_signal_to_a_forked_child_ends_only_the_child() -> None:
    """SIGTERM ends the child, and the service goes on."""
    with running(*PLAIN) as service:
        service.wait_ready()
        child = service.get("/child/terminated").json()

        assert child == {"exitcode": -signal.SIGTERM}
        assert service.get("/health/ready").status == 200
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0


def test_a_running_child_does_not_delay_the_exit() -> None:
    """The child is ended and does not keep the port."""
    with running(*PLAIN, environment={"SHUTDOWN_FORCE_TIMEOUT": "55000"}) as service:
        service.wait_ready()
        assert service.get("/child/kept").status == 200
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
        socket.create_server(("", service.port)).close()
