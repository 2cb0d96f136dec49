"""The fault proxy of the tests: each mode has the effect of its name."""

import errno
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import asyncpg
import pytest
from tests.servers.fault_proxy import (
    BLACKHOLE,
    DROP,
    PASS,
    REFUSE,
    RESET,
    SILENCE,
    CutAfter,
    CutCommits,
    Delay,
    FaultProxy,
)
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until

SHORT = 0.3


def echo(connection: socket.socket) -> None:
    """Send back all received bytes."""
    with connection:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            return


@pytest.fixture
def proxy(fault_proxy: FaultProxies) -> Iterator[FaultProxy]:
    """Return a proxy in front of an echo server."""
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
    """Send bytes and return the first bytes of the reply."""
    connection.settimeout(timeout)
    connection.sendall(data)
    return connection.recv(65536)


def test_pass_forwards_and_counts(proxy: FaultProxy) -> None:
    """Bytes pass in both directions; the counters follow."""
    with connect(proxy) as one, connect(proxy) as two:
        assert (ask(one, b"a"), ask(two, b"b")) == (b"a", b"b")
        assert (proxy.mode, proxy.accepted, proxy.open) == (PASS, 2, 2)

        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""

    wait_until(lambda: proxy.open == 0, what="both left")
    assert proxy.accepted == 2


def test_large_data_passes_unchanged(proxy: FaultProxy) -> None:
    """A slow reader loses nothing."""
    sent = bytes(range(256)) * 40_000
    with connect(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=(sent,))
        sender.start()
        got = bytearray()
        while len(got) < len(sent):
            got += connection.recv(65536)
        sender.join()

    assert got == sent


def test_delay_applies_to_both_directions(proxy: FaultProxy) -> None:
    """A round trip takes twice the delay; no byte is lost at its end."""
    with connect(proxy) as connection:
        proxy.mode = Delay(0.1)
        began = time.monotonic()
        assert ask(connection) == b"ping"
        assert time.monotonic() - began >= 0.2

        proxy.mode = Delay(60.0)
        connection.sendall(b"late")
        proxy.mode = PASS
        assert connection.recv(16) == b"late"


def test_black_hole_holds_old_and_new_connections(proxy: FaultProxy) -> None:
    """They stay open without a reply; the data arrives afterwards."""
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


def test_drop_holds_old_connections_and_serves_new_ones(proxy: FaultProxy) -> None:
    """As a firewall that has lost its table of connections."""
    with connect(proxy) as old:
        ask(old)
        proxy.mode = DROP
        with pytest.raises(TimeoutError):
            ask(old, b"old", timeout=SHORT)
        with connect(proxy) as new:
            assert ask(new, b"new") == b"new"

        proxy.mode = PASS
        old.settimeout(5)
        assert old.recv(65536) == b"old"


@pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no TCP_USER_TIMEOUT"
)
def test_silence_acknowledges_nothing_on_old_connections(proxy: FaultProxy) -> None:
    """The client's system gives up, as it does not while a black hole holds back what it sent."""
    with connect(proxy) as old:
        ask(old)
        old.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(SHORT * 1000))
        proxy.mode = BLACKHOLE
        with pytest.raises(TimeoutError, match="timed out"):
            ask(old, b"held", timeout=4 * SHORT)
        proxy.mode = PASS
        old.settimeout(5)
        assert old.recv(65536) == b"held"
        proxy.mode = SILENCE
        with pytest.raises(TimeoutError) as ended:
            ask(old, b"lost", timeout=20)
        assert ended.value.errno == errno.ETIMEDOUT
        with connect(proxy) as new:
            assert ask(new, b"new") == b"new"


def test_black_hole_notices_closed_clients(proxy: FaultProxy) -> None:
    """The counter of open connections is about clients, not about the server."""
    with connect(proxy) as old:
        ask(old)
        proxy.mode = BLACKHOLE
        with connect(proxy):
            wait_until(lambda: proxy.open == 2, what="accepted")

        wait_until(lambda: proxy.open == 1, what="the new one left")
    wait_until(lambda: proxy.open == 0, what="the old one left")


def test_reset_breaks_old_and_new_connections(proxy: FaultProxy) -> None:
    """Each gets an error and not an end of file."""
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


def test_refuse_closes_the_port(proxy: FaultProxy) -> None:
    """Old connections break and new ones are refused; later the same port is open again."""
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


def test_cut_after_truncates_a_reply(proxy: FaultProxy) -> None:
    """That number of bytes arrives on each connection, then its end."""
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


async def test_cut_commits_lose_the_statement_or_its_answer(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """The client gets an error each time; the server has about half of the rows."""
    database.execute("create table kept (number int)")
    server = database.server
    proxy = fault_proxy(server.port, host=server.host)
    url = server.url(database.name, host=proxy.host, port=proxy.port)
    lost = 0
    proxy.mode = CutCommits(1.0, random.Random(1))  # noqa: S311 - to be repeated
    for _ in range(20):
        connection = await asyncpg.connect(url, timeout=5)
        try:
            with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
                await connection.execute("insert into kept values (7)")
            lost += 1
        finally:
            connection.terminate()
    (arrived,) = database.execute("select count(*) from kept")[0]

    assert proxy.struck == lost == 20
    assert 5 <= arrived <= 15


async def test_cut_commits_spare_other_statements(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """A share of zero cuts nothing; an eighth cuts each COMMIT."""
    server = database.server
    proxy = fault_proxy(server.port, host=server.host)
    connection = await asyncpg.connect(
        server.url(database.name, host=proxy.host, port=proxy.port), timeout=5
    )
    try:
        proxy.mode = CutCommits(0.0)
        await connection.execute("begin")
        assert await connection.fetchval("select 1") == 1
        proxy.mode = CutCommits(1 / 8)
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await connection.execute("COMMIT")
    finally:
        connection.terminate()


def test_missing_server_is_a_reset(fault_proxy: FaultProxies) -> None:
    """The client notices at once."""
    with closing(socket.socket()) as closed_port:
        closed_port.bind(("127.0.0.1", 0))
        proxy = fault_proxy(closed_port.getsockname()[1])

        with pytest.raises(ConnectionResetError), connect(proxy) as connection:
            connection.recv(16)


def test_modes_can_be_switched_under_traffic(proxy: FaultProxy) -> None:
    """In any order."""
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
