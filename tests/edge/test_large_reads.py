"""Clients that send much at once: backpressure, memory, and nothing lost or reordered."""

import hashlib
import random
import select
import signal
import threading
from contextlib import ExitStack, closing, suppress
from typing import Self

import pytest
from tests.edge.test_attacks import APP, probed
from tests.edge.test_unread import MIB, limited, upgrade
from tests.edge.test_websockets import opened
from tests.edge.wire import PROBE, Wire, rejected, statuses, talk
from tests.servers.waiting import wait_until
from tests.system.service import running

MASK = bytes(4)
HEADERS = 97
CHUNKED = b"POST /up HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
HELD = 2400
"""Unfinished requests, of which each takes some 50 KiB without a limit."""


def frame(data: bytes) -> bytes:
    """Return a binary message of a client."""
    size = len(data)
    if size < 126:
        return bytes((0x82, 0x80 | size)) + MASK + data
    if size < 65536:
        return bytes((0x82, 0x80 | 126)) + size.to_bytes(2, "big") + MASK + data
    return bytes((0x82, 0x80 | 127)) + size.to_bytes(8, "big") + MASK + data


class Endless:
    """A client that sends a body in tiny chunks until it is answered."""

    def __init__(self, port: int) -> None:
        self.sent = 0
        self._wire = Wire(port)
        self._thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> Self:
        self._wire.send(CHUNKED)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.socket.close()
        self._thread.join(30)

    def _send(self) -> None:
        piece = b"1\r\na\r\n" * 10_000
        with suppress(OSError):
            while not select.select([self._wire.socket], [], [], 0)[0]:
                self.sent += self._wire.socket.send(piece)

    def answer(self) -> list[int]:
        """Return the statuses of the answers."""
        self._thread.join(30)
        return statuses(self._wire.until_closed())


@pytest.mark.each_python
def test_messages_of_a_websocket_arrive_in_their_order() -> None:
    """Small and large ones, sent faster than the application reads them."""
    chosen = random.Random(1)  # noqa: S311 - the same messages each time
    sizes = [chosen.choice((1, 60, 4000, 9000, 70_000)) for _ in range(2000)]
    messages = [chosen.randbytes(size) for size in sizes]
    with running(*APP) as service:
        service.wait_ready()
        with opened(service, "/sum") as client:
            client.sendall(b"".join(map(frame, messages)) + frame(b""))
            answer = client.recv(2, 0x100) + client.recv(64, 0x100)  # MSG_WAITALL

    assert answer[2:].decode() == hashlib.sha256(b"".join(messages)).hexdigest()


def test_a_websocket_ends_with_the_close_of_its_client() -> None:
    """Which may wait behind messages that the application did not read."""
    with running(*APP) as service:
        service.wait_ready()
        with opened(service, "/first") as client:
            client.sendall(frame(b"x" * 3000) * 20 + b"\x88\x82" + MASK + (1000).to_bytes(2, "big"))
            client.settimeout(9)  # the server waits 10 s for a close
            while client.recv(65536):
                pass


def test_open_requests_with_the_headers_of_a_browser_do_not_refuse_others() -> None:
    """Few headers are covered by the memory that is planned for a connection."""
    lines = b"".join(b"x-header-%02d: some text of usual length\r\n" % n for n in range(30))
    head = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" + lines + b"\r\n"
    limits = {"HTTP_MAX_CONNECTIONS": "20000"}
    with ExitStack() as stack, running(*APP, management=True, environment=limits) as service:
        service.wait_ready()
        for _ in range(1500):
            stack.enter_context(Wire(service.port)).socket.sendall(head % 5)
        assert talk(service.port, head % 20_000 + b"a" * 20_000).status == 200
        assert rejected(service) == {}


def test_a_websocket_that_sends_much_fills_no_memory() -> None:
    """Its client waits for the application instead."""
    piece = frame(b"x" * 9000) * 7
    with limited() as service, opened(service, "/sum") as client, probed(service):
        for _ in range(150 * MIB // len(piece)):
            client.sendall(piece)
        client.sendall(frame(b""))
        assert client.recv(1)
        assert rejected(service) == {}


@pytest.mark.parametrize(
    ("message", "sockets"),
    [(frame(b"x" * 1_000_000), 150), (frame(b"x" * 1_000_000)[:-1], 150), (frame(b"") * 680, 900)],
    ids=["whole", "unfinished", "empty"],
)
def test_unread_messages_leave_memory_for_others(message: bytes, sockets: int) -> None:
    """Of many WebSockets whose applications only send; the largest are closed."""
    with ExitStack() as stack, limited() as service, probed(service):
        for _ in range(sockets):
            client = stack.enter_context(opened(service, "/mute"))
            with suppress(OSError):
                client.sendall(message)
        wait_until(lambda: rejected(service).get("websocket"), what="one is closed")
        assert service.process.poll() is None


def test_unfinished_requests_with_many_headers_leave_memory_for_others() -> None:
    """A header takes more memory than its bytes on the wire."""
    lines = b"".join(b"%02d:12\r\n" % number for number in range(HEADERS))
    head = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n" + lines + b"\r\n"
    with ExitStack() as stack, limited() as service, probed(service):
        for _ in range(HELD):
            with suppress(OSError):
                stack.enter_context(Wire(service.port)).socket.sendall(head + b"a" * 100)
        wait_until(lambda: rejected(service).get("memory"), what="one is rejected")
        assert service.process.poll() is None


@pytest.mark.each_python
def test_requests_in_one_large_read_are_answered_in_order() -> None:
    """Also those that wait for their turn beside bodies of tiny chunks."""
    chunks = CHUNKED + b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n"
    large = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + b"a" * 300_000
    with ExitStack() as stack, running(*APP, management=True) as service:
        service.wait_ready()
        wires = [stack.enter_context(Wire(service.port)) for _ in range(8)]
        for request, length in ((chunks, 100_000), (large, 300_000)):
            for wire in wires:
                wire.socket.sendall(request + PROBE)
            for wire in wires:
                answers = [wire.response() for _ in range(2)]
                assert [answer.status for answer in answers] == [200] * 2
                assert [answer.json().get("n") for answer in answers] == [length, None]
        assert rejected(service) == {}


def test_a_large_request_before_a_stop_is_answered() -> None:
    """Also if the server had no time for it yet."""
    flood = CHUNKED + b"1\r\na\r\n" * 40_000 + b"0\r\n\r\n"
    large = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n" + b"a" * 9000
    with ExitStack() as stack, running(*APP) as service:
        service.wait_ready()
        for _ in range(8):
            stack.enter_context(Wire(service.port)).socket.sendall(flood)
        wires = [stack.enter_context(Wire(service.port)) for _ in range(8)]
        for wire in wires:
            wire.socket.sendall(large)
        service.signal(signal.SIGTERM)
        answers = [wire.until_closed() for wire in wires]
        assert service.exit_code(seconds=40) == 0

    assert [statuses(answer) for answer in answers] == [[200]] * 8


def test_endless_bodies_end_with_the_drain() -> None:
    """With 408, also those whose client sends faster than the server parses: no work is lost."""
    drain = {"SHUTDOWN_DRAIN_TIMEOUT": "3000"}
    with ExitStack() as stack, running(*APP, environment=drain) as service:
        service.wait_ready()
        clients = [stack.enter_context(Endless(service.port)) for _ in range(8)]
        wait_until(lambda: all(client.sent > MIB for client in clients), what="all send")
        service.signal(signal.SIGTERM)
        assert service.exit_code(seconds=60) == 0
        assert [client.answer() for client in clients] == [[408]] * 8


def test_many_pipelined_requests_do_not_starve_another_port() -> None:
    """Also those in reads that are as small as one request."""
    piece = b"GET /health/detailed HTTP/1.1\r\nHost: x\r\n\r\n" * 40
    # The server answers these itself only where they do not depend on the caller's address.
    always = {"HEALTH_DETAILS": "always"}
    with ExitStack() as stack, running(*APP, management=True, environment=always) as service:
        service.wait_ready()
        assert service.management_port is not None
        wires = [stack.enter_context(Wire(service.port)) for _ in range(300)]
        prober = stack.enter_context(Wire(service.management_port))
        for wire in (*wires, prober):
            assert wire.send(PROBE).response().status == 200
        service.signal(signal.SIGSTOP)
        for wire in wires:
            wire.socket.sendall(piece)
        prober.socket.sendall(PROBE)
        service.signal(signal.SIGCONT)
        assert prober.response().status == 200
        service.signal(signal.SIGSTOP)
        ready, _, _ = select.select([wire.socket for wire in wires], [], [], 0)
        service.signal(signal.SIGCONT)
        for wire in wires:
            assert [wire.response().status for _ in range(40)] == [200] * 40

    assert len(ready) < len(wires) / 2


def test_a_stop_waits_for_the_message_of_a_websocket() -> None:
    """Its client reads, so it gets all of it."""
    size = 16 * MIB
    received = bytearray()
    with running(*APP) as service:
        service.wait_ready()
        with opened(service, f"/push?messages=1&size={size}") as client:
            received += client.recv(65536)
            service.signal(signal.SIGTERM)
            wait_until(lambda: service.logged("Shutdown began"), what="the stop has begun")
            while data := client.recv(65536):
                received += data
        assert service.exit_code(seconds=40) == 0

    assert received.count(b".") == size
    assert received.endswith(b"\x88\x02" + (1012).to_bytes(2, "big"))


def test_the_management_port_has_no_websockets() -> None:
    """A handshake is an ordinary request there: it keeps no place, and is no error."""
    with running(*APP, management=True) as service:
        service.wait_ready()
        assert service.management_port is not None
        assert talk(service.management_port, upgrade(b"/nothing")).status == 404
        assert talk(service.management_port, upgrade(b"/health/live")).status == 200
        with closing(opened(service, "/sum")):
            pass
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0

    assert service.errors == []
