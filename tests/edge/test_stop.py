"""At a stop, the server answers on every connection that the kernel has completed."""

import signal
import socket
import threading
import time
from typing import Self

import pytest
from tests.servers.waiting import wait_until
from tests.system.connections import send
from tests.system.service import running

PLAIN = ("--app", "tests.system.apps:plain")
REQUEST = b"GET /work HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
CLIENTS = 8


class FreshConnections:
    """Clients that open one connection after another, for one request each, until refused."""

    def __init__(self, port: int) -> None:
        self.responded = 0
        self.lost: list[str] = []
        """One entry for each completed connection without a response."""
        self._address = "127.0.0.1", port
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(30)

    def _run(self) -> None:
        while True:
            try:
                connection = socket.create_connection(self._address, timeout=20)
            except OSError:
                return
            with connection:
                try:
                    connection.sendall(REQUEST)
                    received = b""
                    while chunk := connection.recv(65536):
                        received += chunk
                    outcome = "" if received.startswith(b"HTTP/1.1 200 ") else repr(received[:80])
                except OSError as error:
                    outcome = repr(error)
            with self._lock:
                self.responded += 1
                if outcome:
                    self.lost.append(outcome)


@pytest.mark.parametrize("run", range(3))
def test_no_completed_connection_is_reset_by_a_stop(run: int) -> None:
    """Each connection is either refused or answered."""
    with running(*PLAIN) as service:
        service.wait_ready()
        with FreshConnections(service.port) as clients:
            wait_until(lambda: clients.responded > 50 * (run + 1), what="traffic")
            service.signal(signal.SIGTERM)
        assert service.exit_code() == 0

    assert clients.lost == []


def test_a_silent_connection_does_not_delay_the_stop() -> None:
    """A new connection is closed after half a second, an idle one immediately."""
    with running(*PLAIN) as service:
        service.wait_ready()
        idle = send(service, b"GET /work HTTP/1.1\r\nHost: test\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += idle.recv(65536)
        silent = socket.create_connection(("127.0.0.1", service.port), timeout=20)
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        assert idle.recv(1) == b""
        assert silent.recv(1) == b""
        assert service.exit_code() == 0
        took = time.monotonic() - began
        idle.close()
        silent.close()

    assert took < 10, "far less than the head timeout and the drain budget together"


@pytest.mark.each_python
def test_a_half_sent_request_at_the_stop_is_answered() -> None:
    """Its connection stays open and closes after the response."""
    with running(*PLAIN) as service:
        service.wait_ready()
        # The slow request keeps the drain running until the other request has arrived.
        slow = send(service, b"GET /slow?seconds=1 HTTP/1.1\r\nHost: test\r\n\r\n")
        half = send(service, b"GET /work HTTP/1.1\r\nHost: te")
        wait_until(
            lambda: b"http_server_active_requests 1.0" in service.get("/metrics").body,
            what="the slow request is in flight",
        )
        service.signal(signal.SIGTERM)
        wait_until(lambda: service.logged("Shutdown stage ended"), what="the listener is closed")
        half.sendall(b"st\r\n\r\n")
        received = b""
        while chunk := half.recv(65536):
            received += chunk
        whole = b""
        while chunk := slow.recv(65536):
            whole += chunk
        assert service.exit_code() == 0
        half.close()
        slow.close()

    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in received
    assert whole.startswith(b"HTTP/1.1 200 ")
