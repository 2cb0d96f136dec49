"""Graceful shutdown of real processes, with sockets and signals."""

import signal
import socket
import time
from typing import Any

import pytest
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.soak import SOAK, cycles
from tests.system.connections import begun, send
from tests.system.keepalive import KeepAliveClients
from tests.system.service import Prober, Service, running

APP = ("--app", "tests.system.apps:planted")
PLAIN = ("--app", "tests.system.apps:plain")
CLIENTS = 256 if SOAK else 32


@pytest.mark.soak
@pytest.mark.parametrize("run", cycles(10))
def test_no_request_is_lost_during_the_readiness_delay(run: int) -> None:
    """Keep-alive clients lose no request, and the probes show the phases in order."""
    # Many times what the clients need to leave, also on a busy machine.
    environment = {"SHUTDOWN_READINESS_DELAY": "4000"}
    with running(*PLAIN, management=True, environment=environment) as service:
        service.wait_ready()
        assert service.management_port is not None
        with (
            KeepAliveClients(service.port, "/work", count=CLIENTS) as clients,
            Prober(service.port, "/health/ready", timeout=10) as ready,
            Prober(service.port, "/work", timeout=10) as work,
            Prober(service.management_port, "/health/live", timeout=10) as live,
        ):
            wait_until(lambda: clients.responded > 4 * CLIENTS, what="traffic")
            service.signal(signal.SIGTERM)
            wait_until(lambda: 503 in ready.order(), what="not ready")
            answered_before = clients.responded
            wait_until(lambda: clients.responded > answered_before + 2 * CLIENTS, what="serving")
            clients.leave()
            code = service.exit_code()

        assert (run, 0, []) == (run, code, clients.lost)
        assert ready.order() in ([200, 503, None], [200, 503])
        assert work.order() in ([200, None], [200])
        assert live.order() in ([200, None], [200])
        assert b"connection: close" in clients.last_head


def test_readiness_fails_first_in_a_pod() -> None:
    """Without a setting, a pod still answers new connections while it is not ready."""
    with running(*PLAIN, environment={"KUBERNETES_SERVICE_HOST": "10.96.0.1"}) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)
        wait_until(lambda: service.status("/health/ready") == 503, what="not ready")
        answers = [service.get("/work") for _ in range(3)]

        assert [answer.status for answer in answers] == [200, 200, 200]
        assert [answer.headers["connection"] for answer in answers] == ["close"] * 3
        assert service.exit_code() == 0


@pytest.mark.usefixtures("default_sighup")
def test_sighup_stops_like_sigterm() -> None:
    """A closed terminal stops the service gracefully; a second SIGHUP has no effect."""
    # A forked service would ignore the signal where the tests run under nohup.
    delay = {"SHUTDOWN_READINESS_DELAY": "2000"}
    with running(*PLAIN, environment=delay, fresh=True) as service:
        service.wait_ready()
        service.signal(signal.SIGHUP)
        wait_until(lambda: service.status("/health/ready") == 503, what="the stop began")
        service.signal(signal.SIGHUP)

        assert service.exit_code() == 0
        assert service.logged("Process ends")[0]["reason"] == "SIGHUP"


def test_an_ignored_sighup_stays_ignored() -> None:
    """`nohup viralfx serve &` outlives its terminal; SIGTERM still stops it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the process inherits it
    try:
        with running(*PLAIN, fresh=True) as service:
            service.wait_ready()
            service.signal(signal.SIGHUP)
            service.signal(signal.SIGTERM)

            assert service.exit_code() == 0
            assert service.logged("Process ends")[0]["reason"] == "SIGTERM"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_responses_ask_clients_to_close_during_the_readiness_delay() -> None:
    """During the readiness delay, responses carry Connection: close and readiness is 503."""
    with running(*PLAIN, environment={"SHUTDOWN_READINESS_DELAY": "2000"}) as service:
        service.wait_ready()
        kept = socket.create_connection(("127.0.0.1", service.port))
        kept.sendall(b"GET /work HTTP/1.1\r\nHost: test\r\n\r\n")
        before = kept.recv(65536)
        service.signal(signal.SIGTERM)
        wait_until(lambda: service.status("/health/ready") == 503, what="not ready")
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


def response_of_a_stop(service: Service, request: bytes) -> bytes:
    """Return all bytes of the response to a request that is in flight at SIGTERM."""
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(request + b" HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_until(lambda: service.get("/work").status == 200, what="the request arrived")
        service.signal(signal.SIGTERM)
        response = b""
        while chunk := connection.recv(65536):
            response += chunk
    return response


@pytest.mark.each_python
def test_a_request_in_flight_is_finished() -> None:
    """A slow request from before SIGTERM gets its response, and the exit code is 0."""
    with running(*PLAIN) as service:
        service.wait_ready()
        response = response_of_a_stop(service, b"GET /slow?seconds=1")

        assert response.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close" in response
        assert service.exit_code() == 0


def test_a_request_without_end_gets_503_at_the_drain_budget() -> None:
    """A request without a response at the end of the drain gets 503; the exit code is 4."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        response = response_of_a_stop(service, b"GET /slow?seconds=500")

        assert response.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in response
        assert service.exit_code() == 4


def test_a_cut_download_is_lost_work() -> None:
    """A response shorter than its announced length gives exit code 4."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        download = begun(service, b"GET /download HTTP/1.1\r\nHost: test\r\n\r\n")
        service.signal(signal.SIGTERM)
        code = service.exit_code()
        download.close()

        assert code == 4


def test_work_after_a_complete_response_is_not_lost() -> None:
    """Work after a complete response may be cut; the exit code is 0."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        assert service.get("/after").status == 200
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


def test_budgets_that_fill_the_force_timeout_leave_time_for_a_report() -> None:
    """A stage that hangs until the very end gives 4, not the watchdog's 124."""
    environment = {
        "PLANTED_STAGE": "hang",
        "SHUTDOWN_DRAIN_TIMEOUT": "6000",  # a twentieth is left, which is enough when busy, too
        "SHUTDOWN_STATE_TIMEOUT": "0",
        "SHUTDOWN_CONNECTION_TIMEOUT": "0",
        "SHUTDOWN_FORCE_TIMEOUT": "6000",
    }
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 4


@pytest.mark.each_python
def test_endless_streams_get_an_event_and_are_cut_within_the_budget() -> None:
    """Event streams get a shutdown event, WebSockets get 1012, and the exit code is 0."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "2000"}) as service:
        service.wait_ready()
        events = begun(service, b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n")
        endless = begun(service, b"GET /bytes HTTP/1.1\r\nHost: test\r\n\r\n")
        upgrade = (
            b"GET /socket HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        websocket = begun(service, upgrade)
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        received = _read_to_the_end(websocket)
        events_body = _read_to_the_end(events)
        _read_to_the_end(endless)
        code = service.exit_code()
        took = time.monotonic() - began

        assert b"event: shutdown\ndata: {}\n\n" in events_body
        assert events_body.endswith(b"0\r\n\r\n"), "the event stream ends in order"
        assert b"\x03\xf4" in received, "close code 1012"
        assert code == 0
        assert took > 1.0


def test_an_event_stream_closed_by_its_client_delays_no_stop() -> None:
    """The stop does not use its whole budget if the client of a stream disconnects."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "40000"}) as service:
        service.wait_ready()
        events = begun(service, b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n")
        service.signal(signal.SIGTERM)
        received = b""
        while b"event: shutdown" not in received:
            received += events.recv(65536)
        events.close()

        assert service.exit_code() == 0


def test_a_client_that_does_not_read_delays_no_stop() -> None:
    """A stream whose client does not read is cut at the end of the budget; exit code 0."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        stalled = begun(service, b"GET /flood HTTP/1.1\r\nHost: test\r\n\r\n")
        service.signal(signal.SIGTERM)
        code = service.exit_code()
        stalled.close()

        assert code == 0


def test_the_shutdown_can_be_requested_over_http() -> None:
    """POST returns 202, the report shows the phases, and the process stops gracefully."""
    token = {"Authorization": "Bearer planted"}
    environment = {"SHUTDOWN_READINESS_DELAY": "1000", "MANAGEMENT_TOKEN": "planted"}
    with running(*PLAIN, management=True, environment=environment) as service:
        service.wait_ready()
        before = service.manage("/health/shutdown", headers=token).json()
        response = service.manage("/health/shutdown", method="POST", headers=token)

        def running_stage() -> dict[str, Any]:
            seen: dict[str, Any] = service.manage("/health/shutdown", headers=token).json()
            return seen if seen["stages"][0]["state"] == "running" else {}

        # The response triggers the shutdown, which begins with the loop's next iteration.
        report = wait_until(running_stage, what="the first stage runs")

        assert (before["reason"], before["deadline"]) == (None, None)
        assert {stage["state"] for stage in before["stages"]} == {"pending"}
        assert response.status == 202
        assert response.json().keys() == {"state", "reason", "deadline"}
        assert response.json()["state"] == "lame_duck"
        assert response.headers["location"] == "/health/shutdown"
        assert [stage["name"] for stage in report["stages"]] == [
            "stop accepting",
            "drain",
            "save state",
            "close connections",
        ]
        assert [stage["budget"] for stage in report["stages"]] == [1000, 30000, 5000, 15000]
        assert report["stages"][0]["state"] == "running"
        assert service.exit_code() == 0


def test_a_port_in_use_exits_3() -> None:
    """One line names the variable and the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running("--host", "127.0.0.1", "--port", str(port)) as service:
            code = service.exit_code()

    assert code == 3
    assert service.errors == [
        (
            f"viralfx: PORT: port {port} on 127.0.0.1 is in use;"
            " stop its process, or set another port\n"
        )
    ]


def test_the_management_port_outlives_the_api() -> None:
    """During the drain the API refuses connections and the management port shows the reason."""
    with running(*PLAIN, management=True) as service:
        service.wait_ready()
        slow = send(service, b"GET /slow?seconds=2 HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_until(lambda: service.get("/work").status == 200, what="the request arrived")
        service.signal(signal.SIGTERM)
        wait_until(lambda: service.status("/health/ready") is None, what="the API refuses")
        live = service.manage("/health/live")
        ready = service.manage("/health/ready")
        metrics = service.manage("/metrics").body
        elsewhere = service.manage("/work")
        slow.close()

        assert live.status == 200
        assert (ready.status, ready.json()["reason"]) == (503, "draining")
        assert b"\nviralfx_shutdown_seconds_left " in metrics
        assert elsewhere.status == 404
        assert service.exit_code() == 0


def test_two_services_cannot_share_a_management_port() -> None:
    """The second one names the conflict and exits 3 before it accepts requests."""
    port = str(free_port())
    with (
        socket.create_server(("", int(port))),
        running(environment={"MANAGEMENT_PORT": port}) as service,
    ):
        assert service.exit_code() == 3

    assert service.errors[0].startswith(f"viralfx: MANAGEMENT_PORT: port {port} ")


def _read_to_the_end(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    connection.close()
    return received


def test_an_event_stream_without_events_gets_the_shutdown_event() -> None:
    """A stream that waits for its first event gets the shutdown event as well."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "40000"}) as service:
        service.wait_ready()
        quiet = begun(service, b"GET /quiet HTTP/1.1\r\nHost: test\r\n\r\n")
        service.signal(signal.SIGTERM)
        received = b""
        while b"event: shutdown" not in received:
            received += quiet.recv(65536)
        quiet.close()

        assert service.exit_code() == 0


def test_a_request_of_a_disconnected_client_is_not_lost() -> None:
    """It is cut without loss; the exit code is 0."""
    with running(*PLAIN, environment={"SHUTDOWN_DRAIN_TIMEOUT": "1000"}) as service:
        service.wait_ready()
        gone = send(service, b"GET /slow?seconds=500 HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_until(lambda: service.get("/work").status == 200, what="the request arrived")
        gone.close()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


def test_a_websocket_during_the_readiness_delay_gets_503() -> None:
    """It gets 503 and Retry-After instead of a final 403; an accepted one has an id."""
    upgrade = (
        b"GET /socket HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nX-Correlation-ID: given-1\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with running(*PLAIN, environment={"SHUTDOWN_READINESS_DELAY": "2000"}) as service:
        service.wait_ready()
        first = send(service, upgrade)
        accepted = first.recv(65536)
        service.signal(signal.SIGTERM)
        wait_until(lambda: service.status("/health/ready") == 503, what="the stop began")
        second = send(service, upgrade)
        refused = second.recv(65536)
        first.close()
        second.close()

        assert accepted.startswith(b"HTTP/1.1 101 ")
        assert b"x-correlation-id: given-1" in accepted.lower()
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in refused.lower()
        assert service.exit_code() == 0


def test_an_event_loop_that_closes_late_does_not_delay_the_exit() -> None:
    """That of uvloop waits for each lookup of a name, also of a name server that hangs."""
    with running("--app", "tests.system.held_app:app") as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code(seconds=30.0) == 0
        assert service.logged("Process ends")
