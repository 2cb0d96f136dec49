"""Clients that do not read, and bodies that handlers collect: memory, time, and the stop."""

import base64
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
from tests.edge.test_attacks import APP, probed
from tests.edge.test_exhaustion import PeakMemory
from tests.edge.test_held import in_flight, stopped
from tests.edge.wire import PROBE, Wire, rejected, statuses
from tests.servers.waiting import wait_until
from tests.system.control_group import control_group
from tests.system.service import Service, running

MIB = 2**20
GROUP_MIB = 160
"""Memory limit of a service, which needs some 75 MiB itself."""
UNREAD = 400
BIG_BYTES = 4 * MIB
BIG = b"GET /big?mebibytes=4 HTTP/1.1\r\nHost: x\r\n\r\n"
COLLECTED = 8 * MIB
"""Size of a body below the limit of Litestar."""


@contextmanager
def limited(**environment: str) -> Iterator[Service]:
    """Run a service in a control group."""
    with control_group() as group:
        group.limit(GROUP_MIB)
        with running(*APP, management=True, cgroup=group.path, environment=environment) as service:
            yield service.wait_ready()


def reluctant(port: int) -> socket.socket:
    """Connect as a client whose kernel takes only a few bytes."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    # Large segments let the kernel take megabytes from the service.
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    return client


def upgrade(path: bytes) -> bytes:
    """Return the head of a WebSocket handshake."""
    key = base64.b64encode(os.urandom(16))
    head = b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" % path
    return head + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n" % key


def websocket(port: int, path: bytes) -> socket.socket:
    """Open a WebSocket as such a client."""
    client = reluctant(port)
    client.sendall(upgrade(path))
    received = b""
    while b"\r\n\r\n" not in received:
        received += client.recv(1)
    assert received.startswith(b"HTTP/1.1 101 ")
    return client


def test_unread_responses_use_a_part_of_the_memory() -> None:
    """Above it the largest ones are dropped, and probes are answered."""
    blob = b"GET /blob?mebibytes=1 HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack, limited() as service, probed(service):
        for _ in range(UNREAD):
            stack.enter_context(closing(reluctant(service.port))).sendall(blob * 3)
        wait_until(lambda: rejected(service).get("unsent", 0) > 0, what="the limit is reached")
        counted = rejected(service)

    assert set(counted) == {"unsent"}


def test_bodies_that_handlers_collect_leave_memory_for_others() -> None:
    """A process close to its limit takes no large bodies, and serves small requests."""
    head = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with ExitStack() as stack, limited() as service, probed(service):
        for _ in range(2 * GROUP_MIB * MIB // COLLECTED):
            wire = stack.enter_context(Wire(service.port))
            wire.send(head % COLLECTED + b"a" * (COLLECTED - 1))
            if rejected(service):
                break
        assert set(rejected(service)) == {"memory"}
        with Wire(service.port) as wire:
            answer = wire.send(head % 5 + b"hello").response()

    assert (answer.status, answer.json()["n"]) == (200, 5)


def test_a_response_of_any_size_arrives_while_its_client_reads() -> None:
    """It may be larger than the limit of unsent responses."""
    received = 0
    with limited() as service, Wire(service.port) as wire:
        wire.send(b"GET /blob?mebibytes=24 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while data := wire.socket.recv(65536):
            received += len(data)
        assert received > 24 * MIB
        assert rejected(service) == {}


def test_bodies_of_closed_connections_are_freed() -> None:
    """One after another they may be larger than the memory."""
    body = b"a=" + b"a" * COLLECTED
    head = b"POST /up HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with limited() as service:
        for _ in range(2 * GROUP_MIB * MIB // COLLECTED):
            with Wire(service.port) as wire:
                assert wire.send(head % len(body) + body).response().status == 200
        assert rejected(service) == {}


def test_a_stop_waits_for_clients_that_read() -> None:
    """They get the rest of their response, and those that wait behind it."""
    last = b"GET /echo/last HTTP/1.1\r\nHost: x\r\n\r\n"
    received = bytearray()
    with running(*APP) as service:
        service.wait_ready()
        with closing(socket.socket()) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.settimeout(20)
            client.connect(("127.0.0.1", service.port))
            client.sendall(b"GET /blob?mebibytes=16 HTTP/1.1\r\nHost: x\r\n\r\n")
            received += client.recv(65536)
            client.sendall(last)
            service.signal(signal.SIGTERM)
            wait_until(lambda: service.logged("Shutdown began"), what="the stop has begun")
            while data := client.recv(65536):
                received += data
        assert service.exit_code(seconds=40) == 0

    assert statuses(bytes(received)) == [200, 200]
    assert received.count(b".") >= 16 * MIB


def test_requests_behind_an_unread_response_wait() -> None:
    """They are answered in order when the client reads, before an invalid one."""
    last = b"GET /echo/last HTTP/1.1\r\nHost: x\r\n\r\n"
    received = bytearray()
    with running(*APP) as service, closing(reluctant(service.wait_ready().port)) as client:
        client.sendall(BIG * 3 + PROBE + last + b"nonsense\r\n\r\n")
        wait_until(lambda: in_flight(service, 1), what="only the first one is in flight")
        while data := client.recv(65536):
            received += data

    assert statuses(bytes(received)) == [200, 200, 200, 200, 200, 400]
    assert received.count(b".") >= 3 * BIG_BYTES
    assert received.index(b'"last"') > received.rindex(b"." * 1000)


def test_a_websocket_behind_an_unread_response_waits_for_its_client() -> None:
    """Its messages need no memory."""
    with running(*APP, management=True) as service:
        service.wait_ready()
        with (
            PeakMemory(service.process.pid) as memory,
            closing(reluctant(service.port)) as client,
        ):
            client.sendall(b"GET /blob?mebibytes=4 HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: in_flight(service, 0), what="the response is complete")
            client.sendall(upgrade(b"/push?messages=1000"))
            wait_until(lambda: in_flight(service, 1), what="the handler sends")
            with probed(service):
                pass

    assert memory.growth < 16 * MIB


def test_the_pings_of_a_websocket_that_reads_nothing_need_no_memory() -> None:
    """The last one is answered when it reads, and the send timeout ends it."""
    ping = b"\x89\xfd\0\0\0\0" + b"x" * 125
    with running(*APP, management=True, environment={"HTTP_KEEP_ALIVE_TIMEOUT": "2000"}) as service:
        service.wait_ready()
        with (
            probed(service),
            PeakMemory(service.process.pid) as memory,
            closing(websocket(service.port, b"/push?messages=0")) as client,
        ):
            client.settimeout(0.1)
            while not rejected(service):
                with suppress(OSError):
                    client.sendall(ping * 500)
        counted = rejected(service)
        lines = stopped(service)

    assert counted == {"send_timeout": 1}
    assert memory.growth < 16 * MIB
    assert lines == []


def test_a_websocket_that_never_reads_frees_its_place() -> None:
    """The handler that sends to it ends, too."""
    with running(*APP, environment={"HTTP_KEEP_ALIVE_TIMEOUT": "1500"}) as service:
        service.wait_ready()
        with closing(websocket(service.port, b"/push?messages=1000")):
            wait_until(lambda: in_flight(service, 1), what="the handler sends")
            wait_until(lambda: in_flight(service, 0), what="the handler has ended")
        counted = rejected(service)

    assert counted == {"send_timeout": 1}


@pytest.mark.parametrize("drain", ["3000", "12000"], ids=["before the cut", "by the send timeout"])
def test_a_client_that_reads_nothing_loses_nothing_at_the_stop(drain: str) -> None:
    """It had its response, so the exit code is 0, and the drain need not be used up."""
    with running(*APP, environment={"SHUTDOWN_DRAIN_TIMEOUT": drain}) as service:
        service.wait_ready()
        with (
            closing(reluctant(service.port)) as client,
            closing(websocket(service.port, b"/push?messages=1000")),
        ):
            client.sendall(b"GET /big?mebibytes=64 HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: in_flight(service, 2), what="both are in flight")
            service.signal(signal.SIGTERM)
            assert service.exit_code(seconds=40) == 0

    assert [line for line in service.output if '"level":"error"' in line] == []
    assert service.logged("Cutting requests") == []


def test_idle_clients_do_not_close_the_management_port() -> None:
    """A new client replaces the one without a request for the longest time."""
    with running(*APP, management=True, descriptors=256) as service, ExitStack() as stack:
        service.wait_ready()
        assert service.management_port is not None
        for number in range(80):  # the port has 16 connections
            wire = stack.enter_context(Wire(service.management_port))
            if number % 4 == 1:
                assert wire.send(PROBE).response().status == 200
            elif number % 4 == 2:  # unread responses, and a request that waits behind them
                wire.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 99)
            elif number % 4 == 3:  # answered before its body, which never comes
                wire.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n")
                assert wire.response().status == 200
        assert [service.manage("/health/live").status for _ in range(5)] == [200] * 5
        counted = rejected(service)

    assert counted["connections"] >= 60
