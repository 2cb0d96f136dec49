"""The proxy of the tests itself: each mode has the effect that it is named after."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.servers.fault_proxy import (
    BLACKHOLE,
    PASS,
    REFUSE,
    RESET,
    CutAfter,
    Delay,
    FaultProxy,
)
from tests.servers.fixtures import FaultProxies
from tests.servers.waiting import wait_until

SHORT = 0.3


def echo(connection: socket.socket) -> None:
    """Send back what comes, to the end."""
    with connection:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            return


@pytest.fixture
def proxy(fault_proxy: FaultProxies) -> Iterator[FaultProxy]:
    """Return a proxy in front of a server that sends everything back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

        server = threading.Thread(target=serve)
        server.start()
        yield fault_proxy(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        server.join()


def connect(proxy: FaultProxy) -> socket.socket:
    """Connect through the proxy."""
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def ask(connection: socket.socket, data: bytes = b"ping", timeout: float = 5.0) -> bytes:
    """Send something and return what comes back first."""
    connection.settimeout(timeout)
    connection.sendall(data)
    return connection.recv(65536)


def test_pass_forwards_and_counts(proxy: FaultProxy) -> None:
    """What one side sends, the other one gets; the counters follow."""
    with connect(proxy) as one, connect(proxy) as two:
        assert (ask(one, b"a"), ask(two, b"b")) == (b"a", b"b")
        assert (proxy.mode, proxy.accepted, proxy.open) == (PASS, 2, 2)

        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""

    wait_until(lambda: proxy.open == 0, what="both left")
    assert proxy.accepted == 2


def test_much_goes_through_unchanged(proxy: FaultProxy) -> None:
    """A client that is slow to read loses nothing."""
    sent = bytes(range(256)) * 40_000
    with connect(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=(sent,))
        sender.start()
        got = bytearray()
        while len(got) < len(sent):
            got += connection.recv(65536)
        sender.join()

    assert got == sent


def test_delay_holds_each_piece_back_in_both_directions(proxy: FaultProxy) -> None:
    """A question and its answer take twice the delay, and nothing is lost at the end of it."""
    with connect(proxy) as connection:
        proxy.mode = Delay(0.1)
        began = time.monotonic()
        assert ask(connection) == b"ping"
        assert time.monotonic() - began >= 0.2

        proxy.mode = Delay(60.0)
        connection.sendall(b"late")
        proxy.mode = PASS
        assert connection.recv(16) == b"late"


def test_a_black_hole_swallows_old_and_new_connections_until_it_ends(proxy: FaultProxy) -> None:
    """Both stay open without an answer; what was sent arrives afterwards."""
    with connect(proxy) as old:
        assert ask(old) == b"ping"
        proxy.mode = BLACKHOLE
        with connect(proxy) as new:
            for connection in (old, new):
                with pytest.raises(TimeoutError):
                    ask(connection, timeout=SHORT)
            assert (proxy.accepted, proxy.open, proxy.struck) == (2, 2, 2)

            proxy.mode = PASS
            for connection in (old, new):
                connection.settimeout(5)
                assert connection.recv(16) == b"ping"


def test_a_black_hole_sees_a_client_leave(proxy: FaultProxy) -> None:
    """The counter of open connections is about clients, whatever the server is told."""
    with connect(proxy) as old:
        ask(old)
        proxy.mode = BLACKHOLE
        with connect(proxy):
            wait_until(lambda: proxy.open == 2, what="accepted")

        wait_until(lambda: proxy.open == 1, what="the new one left")
    wait_until(lambda: proxy.open == 0, what="the old one left")


def test_reset_breaks_old_and_new_connections(proxy: FaultProxy) -> None:
    """Each gets an error rather than an end."""
    with connect(proxy) as old:
        assert ask(old) == b"ping"

        proxy.mode = RESET
        with pytest.raises(ConnectionResetError):
            old.recv(16)
        with pytest.raises(ConnectionResetError), connect(proxy) as new:
            ask(new)
        assert proxy.open == 0

    proxy.mode = PASS
    with connect(proxy) as again:
        assert ask(again) == b"ping"


def test_refuse_listens_no_more(proxy: FaultProxy) -> None:
    """Old connections break and new ones are refused; then it is on the same port again."""
    port = proxy.port
    with connect(proxy) as old:
        ask(old)

        proxy.mode = REFUSE
        with pytest.raises(ConnectionResetError):
            old.recv(16)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)

    proxy.mode = PASS
    assert proxy.port == port
    with connect(proxy) as again:
        assert ask(again) == b"ping"


def test_cut_after_ends_an_answer_in_its_middle(proxy: FaultProxy) -> None:
    """So many bytes since the switch arrive on each connection, then its end."""
    with connect(proxy) as old:
        assert ask(old) == b"ping"
        proxy.mode = CutAfter(6)
        with connect(proxy) as new:
            for connection in (old, new):
                connection.settimeout(5)
                connection.sendall(b"0123")
                assert connection.recv(16) == b"0123"
                connection.sendall(b"4567")
                assert connection.recv(16) == b"45"
                assert connection.recv(16) == b""

        proxy.mode = CutAfter(1)
        with connect(proxy) as next_one:
            assert ask(next_one) == b"p"
            assert next_one.recv(16) == b""
    assert proxy.struck == 3


def test_a_server_that_is_not_there_is_a_reset(fault_proxy: FaultProxies) -> None:
    """A client learns at once that nobody is behind the proxy."""
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        proxy = fault_proxy(nobody.getsockname()[1])

        with pytest.raises(ConnectionResetError), connect(proxy) as connection:
            connection.recv(16)


def test_modes_may_be_switched_while_traffic_flows(proxy: FaultProxy) -> None:
    """No order of modes breaks the proxy."""
    stop = threading.Event()

    def traffic() -> None:
        while not stop.is_set():
            try:
                with connect(proxy) as connection:
                    ask(connection, b"x" * 1000, timeout=0.05)
            except OSError:
                continue

    clients = [threading.Thread(target=traffic) for _ in range(4)]
    for thread in clients:
        thread.start()
    for _ in range(10):
        for mode in (PASS, BLACKHOLE, RESET, Delay(0.001), CutAfter(10), REFUSE):
            proxy.mode = mode
            assert proxy.mode is mode
    stop.set()
    for thread in clients:
        thread.join()

    proxy.mode = PASS
    with connect(proxy) as connection:
        assert ask(connection) == b"ping"
