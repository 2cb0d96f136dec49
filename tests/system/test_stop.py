"""The ordered stop, seen from outside: real processes, sockets and signals."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from tests.system.keepalive import KeepAliveClients
from tests.system.service import Prober, Service, free_port, request, running, wait_for

APP = ("--app", "tests.system.apps:planted")
PLAIN = ("--app", "tests.system.apps:plain")


@pytest.mark.alone
@pytest.mark.parametrize("run", range(10))
def test_nothing_is_lost_when_clients_leave_within_the_readiness_delay(run: int) -> None:
    """256 keep-alive clients lose no request, and the probes tell what happens in order."""
    environment = {"SHUTDOWN_READINESS_DELAY": "1000"}
    with running(*PLAIN, management=True, environment=environment) as service:
        service.wait_ready()
        assert service.management_port is not None
        with (
            KeepAliveClients(service.port, "/work", count=256) as clients,
            Prober(service.port, "/health/ready") as ready,
            Prober(service.port, "/work") as work,
            Prober(service.management_port, "/health/live") as live,
        ):
            wait_for(lambda: clients.answered > 1000, what="traffic")
            service.signal(signal.SIGTERM)
            wait_for(lambda: 503 in ready.order(), what="ready says no")
            told_at = time.monotonic()
            answered_when_told = clients.answered
            wait_for(lambda: clients.answered > answered_when_told + 500, what="still serving")
            clients.leave()
            left_after = time.monotonic() - told_at
            code = service.exit_code()

        assert (run, 0, []) == (run, code, clients.lost)
        assert left_after < 1.0, "the clients left too late for what is tested"
        assert ready.order() in ([200, 503, None], [200, 503])
        assert work.order() in ([200, None], [200])
        assert live.order() in ([200, None], [200])
        assert b"connection: close" in clients.last_head


def test_clients_are_told_to_close_while_still_being_served() -> None:
    """During the readiness delay answers carry Connection: close and readiness is 503."""
    with running(*PLAIN, environment={"SHUTDOWN_READINESS_DELAY": "2000"}) as service:
        service.wait_ready()
        kept = socket.create_connection(("127.0.0.1", service.port))
        kept.sendall(b"GET /work HTTP/1.1\r\nHost: test\r\n\r\n")
        before = kept.recv(65536)
        service.signal(signal.SIGTERM)
        wait_for(lambda: service.status("/health/ready") == 503, what="ready says no")
        health = service.get("/health")
        kept.sendall(b"GET /work HTTP/1.1\r\nHost: test\r\n\r\n")
        after = b""
        while chunk := kept.recv(65536):
            after += chunk
        kept.close()

        assert b"200 OK" in before
        assert b"connection: close" not in before
        assert b"200 OK" in after
        assert b"connection: close" in after
        assert (health.status, health.json()["status"]) == (503, "shutting_down")
        assert int(health.headers["retry-after"]) > 0
        assert service.exit_code() == 0


def test_a_request_in_flight_is_finished() -> None:
    """A slow request that began before SIGTERM gets its answer, and the exit code is 0."""
    with running(*PLAIN) as service:
        service.wait_ready()
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(b"GET /slow?seconds=1 HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_for(lambda: service.get("/work").status == 200, what="the request arrived")
            service.signal(signal.SIGTERM)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk

        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close" in answer
        assert service.exit_code() == 0


def test_a_request_that_does_not_end_is_cut_and_its_client_told() -> None:
    """A request without an answer at the drain budget gets 503, and the exit code is 4."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(b"GET /slow?seconds=500 HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_for(lambda: service.get("/work").status == 200, what="the request arrived")
            service.signal(signal.SIGTERM)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk

        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        assert service.exit_code() == 4


def test_a_download_that_is_cut_is_work_lost() -> None:
    """An answer whose length was announced and that did not come whole gives 4."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        download = _open(service, b"GET /download HTTP/1.1\r\nHost: test\r\n\r\n")
        service.signal(signal.SIGTERM)
        code = service.exit_code()
        download.close()

        assert code == 4


def test_a_request_that_was_answered_before_its_end_is_not_lost() -> None:
    """What an application still does after its whole answer may be cut; exit 0."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        assert service.get("/after").status == 200
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


def test_budgets_that_fill_the_force_timeout_leave_time_for_a_report() -> None:
    """A stage that hangs until the very end gives 4, not the watchdog's 124."""
    environment = {
        "PLANTED_STAGE": "hang",
        "SHUTDOWN_DRAIN_TIMEOUT": "2000",
        "SHUTDOWN_STATE_TIMEOUT": "0",
        "SHUTDOWN_CONNECTION_TIMEOUT": "0",
        "SHUTDOWN_FORCE_TIMEOUT": "2000",
    }
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 4


def test_endless_streams_are_told_and_then_cut_within_the_budget() -> None:
    """Event streams hear of the shutdown, WebSockets get 1012, and the exit code is 0."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "2000"}) as service:
        service.wait_ready()
        events = _open(service, b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n")
        endless = _open(service, b"GET /bytes HTTP/1.1\r\nHost: test\r\n\r\n")
        upgrade = (
            b"GET /socket HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        websocket = _open(service, upgrade)
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        received = _read_to_the_end(websocket)
        told = _read_to_the_end(events)
        _read_to_the_end(endless)
        code = service.exit_code()
        took = time.monotonic() - began

        assert b"event: shutdown\ndata: {}\n\n" in told
        assert told.endswith(b"0\r\n\r\n"), "the event stream ends in order"
        assert b"\x03\xf4" in received, "close code 1012"
        assert code == 0
        assert 1.0 < took < 5.0


def test_an_event_stream_whose_client_leaves_when_told_costs_nothing() -> None:
    """The stop does not wait for the budget when the client of a stream goes."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "20000"}) as service:
        service.wait_ready()
        events = _open(service, b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n")
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        heard = b""
        while b"event: shutdown" not in heard:
            heard += events.recv(65536)
        events.close()

        assert service.exit_code() == 0
        assert time.monotonic() - began < 10


def test_a_client_that_does_not_read_holds_up_nothing() -> None:
    """A stream whose client takes nothing is cut at the budget like any other; exit 0."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        stalled = _open(service, b"GET /flood HTTP/1.1\r\nHost: test\r\n\r\n")
        service.signal(signal.SIGTERM)
        code = service.exit_code(seconds=6)
        stalled.close()

        assert code == 0


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
        blocked = _send(service, f"GET /block/{where} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        wait_for(lambda: _times_out(service), what="the loop is blocked")
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        code = service.exit_code()
        took = time.monotonic() - began
        blocked.close()

    said = "".join(service.errors)
    assert code == 124
    assert 1.9 < took < 8
    assert "stacks of all threads" in said
    assert f"block_in_{where}" in said


def test_a_second_sigint_forces() -> None:
    """The first SIGINT is an ordered stop, the second ends the process with 130 at once."""
    with running(*PLAIN, environment={"SHUTDOWN_READINESS_DELAY": "9000"}) as service:
        service.wait_ready()
        service.signal(signal.SIGINT)
        wait_for(lambda: service.status("/health/ready") == 503, what="the stop began")
        service.signal(signal.SIGINT)

        assert service.exit_code(seconds=5) == 130


def test_repeated_sigterm_and_one_sigint_are_one_shutdown() -> None:
    """Later triggers join the first: one deadline, one reason, exit 0."""
    token = {"Authorization": "Bearer planted"}
    environment = {"SHUTDOWN_READINESS_DELAY": "1500", "MANAGEMENT_TOKEN": "planted"}
    with running(*PLAIN, environment=environment) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)
        wait_for(lambda: service.status("/health/ready") == 503, what="the stop began")
        first = service.get("/health/shutdown", headers=token).json()
        service.signal(signal.SIGTERM)
        service.signal(signal.SIGINT)
        joined = service.get("/health/shutdown", method="POST", headers=token)
        second = service.get("/health/shutdown", headers=token).json()

        assert joined.status == 200
        assert first["reason"] == second["reason"] == joined.json()["reason"] == "SIGTERM"
        assert first["deadline"] == second["deadline"] == joined.json()["deadline"]
        assert service.exit_code() == 0


def test_the_shutdown_can_be_asked_for_over_http() -> None:
    """POST answers 202, the report shows the phases, and the process stops in order."""
    token = {"Authorization": "Bearer planted"}
    environment = {"SHUTDOWN_READINESS_DELAY": "1000", "MANAGEMENT_TOKEN": "planted"}
    with running(*PLAIN, management=True, environment=environment) as service:
        service.wait_ready()
        before = service.manage("/health/shutdown", headers=token).json()
        answer = service.manage("/health/shutdown", method="POST", headers=token)
        report = service.manage("/health/shutdown", headers=token).json()

        assert (before["reason"], before["deadline"]) == (None, None)
        assert {stage["state"] for stage in before["stages"]} == {"pending"}
        assert answer.status == 202
        assert answer.json().keys() == {"state", "reason", "deadline"}
        assert answer.json()["state"] == "lame_duck"
        assert answer.headers["location"] == "/health/shutdown"
        assert [stage["name"] for stage in report["stages"]] == [
            "stop accepting",
            "drain",
            "save state",
            "close connections",
        ]
        assert [stage["budget"] for stage in report["stages"]] == [1000, 30000, 5000, 15000]
        assert report["stages"][0]["state"] == "running"
        assert service.exit_code() == 0


@pytest.mark.parametrize("where", ["task", "callback", "thread", "main"])
def test_an_uncaught_exception_runs_the_stages_and_exits_1(where: str) -> None:
    """Whatever thread or task it is in, the stop is ordered and the exit code tells."""
    with running(*APP) as service:
        service.wait_ready()
        service.status(f"/crash/{where}")
        if where == "main":
            # Where the handler runs is chance: in a destructor the interpreter ignores what it
            # raises. So the signal comes until it was raised where somebody could see it.
            wait_for(lambda: _signalled(service), what="the exception is seen")
        code = service.exit_code()

    assert code == 1
    assert len(service.logged("Uncaught exception")) == 1
    assert "planted in" in str(service.logged("Uncaught exception")[0]["exception"])
    ended = {line["stage"] for line in service.logged("Shutdown stage ended")}
    assert {"listeners", "requests", "planted", "state", "application", "server"} <= ended


def test_an_uncaught_exception_may_be_only_logged() -> None:
    """SHUTDOWN_ON_UNCAUGHT=false logs and goes on; the exit code stays 0."""
    with running(*APP, environment={"SHUTDOWN_ON_UNCAUGHT": "false"}) as service:
        service.wait_ready()
        service.status("/crash/thread")
        wait_for(lambda: service.logged("Uncaught exception"), what="the log line")
        still = service.status("/health/ready")
        service.signal(signal.SIGTERM)

        assert still == 200
        assert service.exit_code() == 0


@pytest.mark.parametrize("behaviour", ["hang", "swallow", "fail"])
def test_a_bad_stage_is_passed_by_and_gives_4(behaviour: str) -> None:
    """A stage that hangs, swallows cancellation or raises does not keep the others from running."""
    environment = {"PLANTED_STAGE": behaviour, "SHUTDOWN_DRAIN_TIMEOUT": "500"}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        code = service.exit_code()
        took = time.monotonic() - began

    outcomes = {line["stage"]: line["outcome"] for line in service.logged("Shutdown stage ended")}
    assert code == 4
    assert outcomes.pop("planted") == ("failed" if behaviour == "fail" else "timeout")
    assert set(outcomes.values()) == {"ok"}
    assert {"state", "application", "server"} <= outcomes.keys()
    assert took < 5


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


def test_a_thread_that_never_ends_does_not_hold_up_the_exit() -> None:
    """The process leaves although the interpreter would wait for the thread."""
    with running(*PLAIN) as service:
        service.wait_ready()
        service.get("/thread/stuck")
        service.signal(signal.SIGTERM)

        assert service.exit_code(seconds=5) == 0


def test_an_application_that_fails_to_start_exits_3() -> None:
    """The failure is logged, whatever began is closed, and the exit code is 3."""
    with running("--app", "tests.system.apps:fails_to_start") as service:
        code = service.exit_code()

    assert code == 3
    assert "planted in start-up" in "".join(service.output)


def test_an_application_that_fails_to_stop_gives_4() -> None:
    """A failing lifespan shutdown is a failed stage."""
    with running("--app", "tests.system.apps:fails_to_stop") as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 4


def test_probes_answer_while_the_application_starts() -> None:
    """Live is 200, ready and startup 503, requests are refused with 503; SIGTERM still stops it."""
    with running("--app", "tests.system.apps:never_starts") as service:
        wait_for(lambda: service.status("/health/live") == 200, what="live")
        ready = service.get("/health/ready")
        startup = service.get("/health/startup")
        other = service.get("/anything")
        service.signal(signal.SIGTERM)

        assert (ready.status, ready.json()["reason"]) == (503, "starting")
        assert (startup.status, startup.json()["started"]) == (503, False)
        assert (other.status, other.headers["retry-after"]) == (503, "1")
        assert service.exit_code(seconds=10) == 0


def test_a_signal_during_the_imports_is_not_lost() -> None:
    """SIGTERM that comes before the event loop runs still ends in an ordered stop."""
    with running(*PLAIN) as service:
        wait_for(lambda: _handles_sigterm(service.process.pid), what="the handler is there")
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
        assert service.logged("Process ends")


def test_a_port_in_use_exits_3() -> None:
    """One line names the variable and the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running("--host", "127.0.0.1", "--port", str(port)) as service:
            code = service.exit_code()

    assert code == 3
    assert service.errors == [
        f"viralfx: PORT: port {port} on 127.0.0.1 is in use; stop who has it, or set another\n"
    ]


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


def test_the_management_port_outlives_the_api() -> None:
    """While a request drains, the API refuses connections and the management port tells why."""
    with running(*PLAIN, management=True) as service:
        service.wait_ready()
        slow = _send(service, b"GET /slow?seconds=2 HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_for(lambda: service.get("/work").status == 200, what="the request arrived")
        service.signal(signal.SIGTERM)
        wait_for(lambda: service.status("/health/ready") is None, what="the API refuses")
        live = service.manage("/health/live")
        ready = service.manage("/health/ready")
        elsewhere = service.manage("/work")
        slow.close()

        assert live.status == 200
        assert (ready.status, ready.json()["reason"]) == (503, "draining")
        assert elsewhere.status == 404
        assert service.exit_code() == 0


def test_two_services_cannot_share_a_management_port() -> None:
    """The second one says so and exits 3, before it takes any request."""
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        with running(environment={"MANAGEMENT_PORT": port, "PORT": str(free_port())}) as service:
            assert service.exit_code() == 3

    assert service.errors[0].startswith(f"viralfx: MANAGEMENT_PORT: port {port} ")


def _signalled(service: Service) -> bool:
    service.signal(signal.SIGUSR1)
    with contextlib.suppress(AssertionError):
        wait_for(lambda: service.logged("Uncaught exception"), seconds=1, what="the log line")
    return bool(service.logged("Uncaught exception"))


def _open(service: Service, head: bytes) -> socket.socket:
    connection = _send(service, head)
    assert connection.recv(65536)
    return connection


def _send(service: Service, head: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
    connection.sendall(head)
    return connection


def _read_to_the_end(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    connection.close()
    return received


def _times_out(service: Service) -> bool:
    try:
        request(service.port, "/health/live", timeout=0.3)
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


def _handles_sigterm(pid: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:  # noqa: PTH123
        caught = next(line for line in status if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


BLOCKED = {
    "SHUTDOWN_DRAIN_TIMEOUT": "500",
    "SHUTDOWN_STATE_TIMEOUT": "100",
    "SHUTDOWN_CONNECTION_TIMEOUT": "100",
    "SHUTDOWN_FORCE_TIMEOUT": "1000",
}


@pytest.mark.parametrize("path", ["/stderr/none", "/stderr/full"])
def test_the_watchdog_needs_no_standard_error(path: str) -> None:
    """It ends the process when there is nothing to write to, and when writing blocks."""
    with running(*PLAIN, environment=BLOCKED) as service:
        service.wait_ready()
        assert service.get(path).status == 200
        blocked = _send(service, b"GET /block/python HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_for(lambda: _times_out(service), what="the loop is blocked")
        service.signal(signal.SIGTERM)
        code = service.exit_code(seconds=10)
        blocked.close()

    assert code == 124


def test_a_signal_for_a_forked_child_is_the_childs() -> None:
    """A child that is terminated dies by that, and the service goes on."""
    with running(*PLAIN) as service:
        service.wait_ready()
        child = service.get("/child/terminated").json()

        assert child == {"exitcode": -signal.SIGTERM}
        assert service.get("/health/ready").status == 200
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0


def test_a_child_that_lives_on_does_not_hold_up_the_exit() -> None:
    """It is ended, and does not keep the port."""
    with running(*PLAIN, environment={"SHUTDOWN_FORCE_TIMEOUT": "55000"}) as service:
        service.wait_ready()
        assert service.get("/child/kept").status == 200
        service.signal(signal.SIGTERM)

        assert service.exit_code(seconds=8) == 0
        socket.create_server(("", service.port)).close()


def test_an_event_stream_without_an_event_yet_is_told() -> None:
    """A stream that waits for its first event hears of the shutdown as well."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "20000"}) as service:
        service.wait_ready()
        quiet = _open(service, b"GET /quiet HTTP/1.1\r\nHost: test\r\n\r\n")
        service.signal(signal.SIGTERM)
        heard = b""
        while b"event: shutdown" not in heard:
            heard += quiet.recv(65536)
        quiet.close()

        assert service.exit_code(seconds=10) == 0


def test_a_request_whose_client_has_left_is_not_lost() -> None:
    """Cutting it keeps nothing from anybody; exit 0."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        gone = _send(service, b"GET /slow?seconds=500 HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_for(lambda: service.get("/work").status == 200, what="the request arrived")
        gone.close()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


def test_a_websocket_during_the_delay_is_sent_elsewhere() -> None:
    """It gets 503 and Retry-After, not a 403 that looks final; an accepted one has an id."""
    upgrade = (
        b"GET /socket HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nX-Correlation-ID: given-1\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with running(*PLAIN, environment={"SHUTDOWN_READINESS_DELAY": "2000"}) as service:
        service.wait_ready()
        first = _send(service, upgrade)
        accepted = first.recv(65536)
        service.signal(signal.SIGTERM)
        wait_for(lambda: service.status("/health/ready") == 503, what="the stop began")
        second = _send(service, upgrade)
        refused = second.recv(65536)
        first.close()
        second.close()

        assert accepted.startswith(b"HTTP/1.1 101 ")
        assert b"x-correlation-id: given-1" in accepted.lower()
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in refused.lower()
        assert service.exit_code() == 0


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
        wait_for(lambda: service.status("/health/live") == 200, what="live")
        ready = service.get("/health/ready")

        assert (ready.status, ready.json()["reason"]) == (503, "starting")


def test_an_application_cannot_make_the_service_deaf() -> None:
    """SIGTERM that a start-up hook set to be ignored is heard again."""
    with running("--app", "tests.system.apps:ignores_sigterm") as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
