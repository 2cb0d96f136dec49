"""Slow or silent clients: unread responses, incomplete bodies, memory, and the stop."""

import base64
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest
from tests.edge.test_attacks import APP, CHUNKED, LINE
from tests.edge.wire import PROBE, TIMEOUT_SECONDS, Wire, ask, rejected, statuses
from tests.servers.waiting import wait_until
from tests.system.service import Service, running

MIB = 2**20
CONNECTIONS = 600
WARM_UP = 50
"""Connections before memory is compared."""


@pytest.fixture
def short() -> Iterator[Service]:
    """Return a service with short timeouts for one test."""
    environment = {"HTTP_KEEP_ALIVE_TIMEOUT": "1500", "HTTP_BODY_TIMEOUT": "1500"}
    with running(*APP, environment=environment) as service:
        yield service.wait_ready()


def stopped(service: Service) -> list[str]:
    """Stop the service with SIGTERM; return the log lines of level error."""
    service.signal(signal.SIGTERM)
    assert service.exit_code(seconds=40) == 0
    assert service.errors == []
    return [line for line in service.output if '"level":"error"' in line]


def in_flight(service: Service, count: int) -> bool:
    """Return True if exactly ``count`` requests are in flight."""
    return f"http_server_active_requests {count}.0" in service.get("/metrics").body.decode()


@pytest.mark.parametrize("leave", [True, False], ids=["disconnects", "stays silent"])
def test_a_client_that_stops_within_a_mirrored_body(short: Service, *, leave: bool) -> None:
    """The handler fails after the start of its response; the process continues."""
    with Wire(short.port) as wire:
        wire.send(b"POST /mirror HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        while b"started" not in wire.received:
            wire.received += wire.socket.recv(65536)
        if not leave:
            assert b"started" in wire.until_closed()
    wait_until(lambda: in_flight(short, 0), what="the request has ended")

    assert short.status("/health/live") == 200
    lines = stopped(short)
    assert [line for line in lines if "Uncaught" in line] == []


def test_an_expectation_before_an_invalid_chunk_is_no_error(short: Service) -> None:
    """The client gets 400, and the handler writes nothing after it."""
    head = CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n"
    with Wire(short.port) as wire:
        received = wire.send(head + b"ZZ\r\n").until_closed()

    assert received.startswith(b"HTTP/1.1 400 ")
    assert stopped(short) == []


def test_the_body_timeout_starts_at_100_continue(short: Service) -> None:
    """A client may wait for 100 Continue as long as the handler takes."""
    head = b"POST /late?seconds=1.2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    with Wire(short.port) as wire:
        wire.send(head + b"Expect: 100-continue\r\n\r\n")
        while b"100 Continue" not in wire.received:
            wire.received += wire.socket.recv(65536)
        wire.received = b""
        # Within the timeout after 100 Continue, but beyond it after the head.
        wire.send(b"", b"hello", gap=1.0)
        response = wire.response()

    assert (response.status, response.json()["n"]) == (200, 5)


def test_a_client_that_does_not_read_is_closed(short: Service) -> None:
    """The send timeout closes the connection and is counted."""
    with Wire(short.port) as wire:
        wire.send(b"GET /big?mebibytes=64 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(
            lambda: rejected(short).get("send_timeout", 0) == 1, what="the rejection is counted"
        )
        wait_until(lambda: in_flight(short, 0), what="the request has ended")

    assert stopped(short) == []


def test_unread_pipelined_probes_are_closed(short: Service) -> None:
    """Probes need no token and are not in flight, but the send timeout applies."""
    probes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 90
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # Large segments let the kernel take all 3 MB from the service; small ones some 100 kB.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        client.connect(("127.0.0.1", short.port))
        client.sendall(probes)
        # Ninety documents take some ten seconds on a busy machine.
        wait_until(
            lambda: rejected(short).get("send_timeout", 0) == 1,
            what="the rejection is counted",
            seconds=60,
        )


def test_a_slow_reader_gets_the_whole_response(short: Service) -> None:
    """This holds for a response that closes the connection and takes longer than any timeout."""
    received = 0
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        client.settimeout(20)
        client.connect(("127.0.0.1", short.port))
        client.sendall(b"GET /big?mebibytes=8 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(1)
        pause = threading.Event()
        for _ in range(10):  # 4 s in all, each pause shorter than the timeout
            received += len(client.recv(65536))
            pause.wait(0.4)
        while chunk := client.recv(MIB):
            received += len(chunk)

    assert received == 8 * MIB
    assert rejected(short).get("send_timeout", 0) == 0


def test_half_a_body_does_not_delay_the_stop() -> None:
    """One client is silent, the other sends a byte at a time."""
    environment = {"SHUTDOWN_DRAIN_TIMEOUT": "8000"}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        head = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nab"
        with Wire(service.port) as silent, Wire(service.port) as dripping:
            silent.send(head)
            dripping.send(head)
            wait_until(lambda: in_flight(service, 2), what="both are in flight")
            service.signal(signal.SIGTERM)
            dripping.send(*[b"c"] * 100, gap=0.5)
            assert dripping.until_closed().startswith(b"HTTP/1.1 408 ")
            assert silent.until_closed().startswith(b"HTTP/1.1 408 ")
        assert service.exit_code(seconds=40) == 0


def test_a_websocket_with_a_long_target_is_rejected() -> None:
    """The WebSocket library would not respond, and would delay the stop."""
    key = base64.b64encode(os.urandom(16))
    head = b"GET /ws?%b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    head += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n"
    with running(*APP) as service:
        service.wait_ready()
        with Wire(service.port) as wire:
            received = wire.send(head % (b"a" * 9000, key)).until_closed()
        lines = stopped(service)

    assert received.startswith(b"HTTP/1.1 431 ")
    assert lines == []


@pytest.mark.parametrize("kind", ["long target", "long host", "answered before its body"])
def test_an_idle_connection_frees_its_request(kind: str) -> None:
    """Hundreds of large requests use no more memory than as many idle connections."""
    with running(*APP) as service:
        service.wait_ready()
        process = psutil.Process(service.process.pid)
        wires: list[Wire] = []
        before = 0
        try:
            for number in range(CONNECTIONS):
                if number == WARM_UP:  # imports and the allocator's first pages come before
                    before = process.memory_info().rss
                wire = Wire(service.port)
                wires.append(wire)
                if kind == "long target":
                    wire.send(b"GET /nothing/" + b"a" * 60_000 + PROBE[16:])
                elif kind == "long host":
                    host = b"%d" % number + b"h" * 60_000
                    wire.send(b"GET /health/live HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
                else:
                    headers = b"".join(b"X-%d: %b\r\n" % (n, b"v" * 1000) for n in range(50))
                    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
                    wire.send(head + headers + b"\r\n" + b"b" * 50_000)
                wire.response()
            grown = process.memory_info().rss - before
        finally:
            for wire in wires:
                wire.close()
        assert service.logged(LINE) == [] or kind == "long host"

    assert grown < 10 * MIB, "they sent 25 MiB and more"


def test_long_targets_are_not_kept() -> None:
    """The caches of the framework may hold 64 KiB of them, in several forms."""
    target = b"%f0%9f%98%80" + b"a" * 20_000
    with running(*APP) as service:
        service.wait_ready()
        ask(service.port, "/allocated")
        with Wire(service.port) as wire:
            for number in range(300):
                wire.send(b"GET /echo/%d%b HTTP/1.1\r\nHost: x\r\n\r\n" % (number, target))
                assert wire.response().status == 200
            kept = ask(service.port, "/allocated")["bytes"]

    assert kept < 4 * 2**20


def test_pipelined_scrapes_do_not_delay_a_probe() -> None:
    """Concurrent requests share one rendering of the metrics."""
    scrapes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 90
    with running(*APP, management=True) as service:
        service.wait_ready()
        rendered = [service.manage("/metrics").body for _ in range(3)]
        with ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(Wire(service.port)).send(scrapes)
            began = time.monotonic()
            assert service.manage("/health/live", timeout=TIMEOUT_SECONDS).status == 200
            took = time.monotonic() - began

    assert len(rendered[0]) > 1000
    assert took < 2, "900 renderings take several seconds"


def test_pipelined_bodies_behind_a_slow_response_are_rejected() -> None:
    """The server does not buffer a large body while an earlier request is running."""
    slow = b"POST /late?seconds=3 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    behind = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 16000\r\n\r\n" + b"b" * 15_999
    with running(*APP) as service:
        service.wait_ready()
        with Wire(service.port) as wire:
            wire.send(slow + behind)
            wait_until(
                lambda: rejected(service).get("pipelined", 0) == 1, what="the rejection is counted"
            )
            received = wire.until_closed()
        body = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
        with Wire(service.port) as wire:
            assert wire.send(body).response().json()["n"] == 5

    assert statuses(received) == [200, 503]


def test_a_request_after_a_streamed_response_is_answered(short: Service) -> None:
    """The stream's wait for a disconnect does not affect the next request."""
    post = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    for _ in range(60):
        with Wire(short.port) as wire:
            big = wire.send(b"GET /big?mebibytes=1 HTTP/1.1\r\nHost: x\r\n\r\n").response()
            assert len(big.body) == MIB
            assert wire.send(post).response().json()["n"] == 2


def test_http_1_0_gets_no_interim_response(short: Service) -> None:
    """RFC 9110, 10.1.1: an HTTP/1.0 client would treat 100 as the final response."""
    head = b"POST /up HTTP/1.0\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello"
    with Wire(short.port) as wire:
        assert wire.send(head).until_closed().startswith(b"HTTP/1.1 200 ")
