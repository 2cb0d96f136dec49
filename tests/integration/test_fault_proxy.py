"""The fault proxy of the tests: its counters, and effects that few other tests would miss.

The tests of the adapters fail if a mode has no effect: each of them waits for its consequence.
"""

import errno
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import asyncpg
import pytest
from tests.servers.fault_proxy import (
    BLACKHOLE,
    PASS,
    SILENCE,
    CutCommits,
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
