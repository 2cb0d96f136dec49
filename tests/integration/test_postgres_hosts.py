"""Several hosts, the kind of server that is wanted, and names with several addresses."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from tests.integration.names import MANY, silent_names
from tests.integration.postgres_clients import changed, checked, config_of, opened
from tests.servers.fault_proxy import BLACKHOLE, PASS, REFUSE, FaultProxy
from tests.servers.fixtures import or_skip
from tests.servers.ports import free_port
from tests.servers.postgres import PostgresServer, postgres_server, postgres_standby

from viralfx.core.errors import StartupError
from viralfx.postgres import PostgresConfig
from viralfx.postgres import servers as servers_search
from viralfx.postgres.connections import Connector

SILENCE = 30.0
"""Seconds for which a black hole would hold up a client that waits for it."""


@dataclass
class Pair:
    """A primary and its standby, each behind a proxy."""

    server: PostgresServer
    primary: FaultProxy
    standby: FaultProxy

    def config(self, names: str, target: str, **more: Any) -> PostgresConfig:
        """Return the configuration with these servers as hosts, such as ``standby primary``."""
        hosts = tuple(("127.0.0.1", getattr(self, name).port) for name in names.split())
        return config_of(self.server, hosts=hosts, target_session_attrs=target, **more)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """Run a primary and its standby."""
    with or_skip(), postgres_server() as primary, postgres_standby(primary) as standby:
        yield primary, standby


@pytest.fixture
def pair(servers: tuple[PostgresServer, PostgresServer]) -> Iterator[Pair]:
    """Return both servers without faults."""
    primary, standby = servers
    with ExitStack() as stack:
        one, two = (stack.enter_context(FaultProxy(s.port, host=s.host)) for s in servers)
        yield Pair(primary, one, two)
    assert standby.running


async def chosen(connector: Connector) -> str:
    """Connect, and return the kind of the server."""
    connection = await connector.connect()
    try:
        standby = await connection.fetchval("select pg_is_in_recovery()")
    finally:
        await connection.close()
    return "standby" if standby else "primary"


@pytest.mark.parametrize(
    ("names", "target", "expected"),
    [
        ("primary standby", "any", "primary"),
        ("standby primary", "any", "standby"),
        ("standby primary", "read-write", "primary"),
        ("standby primary", "primary", "primary"),
        ("primary standby", "read-only", "standby"),
        ("primary standby", "standby", "standby"),
        ("primary standby", "prefer-standby", "standby"),
        ("primary", "prefer-standby", "primary"),
    ],
)
async def test_server_of_the_wanted_kind_is_used(
    pair: Pair, names: str, target: str, expected: str
) -> None:
    """In any order of the hosts, as by libpq."""
    assert await chosen(Connector(pair.config(names, target))) == expected


@pytest.mark.parametrize("target", ["any", "read-write", "prefer-standby"])
async def test_silent_server_in_front_delays_little(pair: Pair, target: str) -> None:
    """Its packets are dropped; it does not use up the time of the others."""
    pair.standby.mode = BLACKHOLE
    connector = Connector(pair.config("standby primary", target, connection_timeout=SILENCE))
    began = time.monotonic()

    assert await chosen(connector) == "primary"
    assert time.monotonic() - began < SILENCE / 3


async def test_silent_only_server_has_a_code(pair: Pair) -> None:
    """As a firewall that drops packets; the check is back by itself."""
    async with opened(pair.config("primary", "any")) as pool, checked(pool, within=1.0) as check:
        pair.primary.mode = BLACKHOLE
        silent = await check.check()
        pair.primary.mode = PASS
        back = await check.check()

    assert (silent.code, silent.message) == ("timeout", "Database does not answer")
    assert back.code != "timeout"


async def test_slow_server_is_not_given_up(pair: Pair) -> None:
    """Only the next one is tried beside it."""
    pair.primary.mode = BLACKHOLE
    connector = Connector(pair.config("primary standby", "primary", connection_timeout=SILENCE))
    work = asyncio.create_task(chosen(connector))
    async with asyncio.timeout(SILENCE / 3):
        while not pair.standby.accepted:  # noqa: ASYNC110 - a proxy of another thread
            await asyncio.sleep(0.01)
    pair.primary.mode = PASS

    assert await work == "primary"


async def test_last_server_is_tried_first(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection would otherwise ask the standby first."""
    # On a busy machine a server that answers may take longer than a silent one is waited for.
    monkeypatch.setattr(servers_search, "NEXT_SECONDS", SILENCE)
    connector = Connector(pair.config("standby primary", "read-write"))
    for _ in range(3):
        assert await chosen(connector) == "primary"

    assert (pair.standby.accepted, pair.primary.accepted) == (1, 3)


async def test_connections_to_other_servers_are_closed(pair: Pair) -> None:
    """Also those that answer once another one is chosen."""
    pair.primary.mode = BLACKHOLE
    async with asyncio.timeout(SILENCE):
        assert await chosen(Connector(pair.config("primary standby", "any"))) == "standby"
        pair.primary.mode = PASS
        while pair.primary.open or pair.standby.open:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)


async def test_error_names_each_host(pair: Pair) -> None:
    """With the reason; the code is the one that says most."""
    pair.primary.mode = REFUSE
    config = pair.config("primary standby", "read-write")
    places = f"127.0.0.1:{pair.primary.port},127.0.0.1:{pair.standby.port}/postgres"
    with pytest.raises(StartupError) as caught:
        async with opened(config):
            pass

    assert str(caught.value) == (
        f"DATABASE_URL: the database at {places} has no usable server:"
        f" 127.0.0.1:{pair.primary.port} refuses connections;"
        f" 127.0.0.1:{pair.standby.port} accepts no writes, after 1 attempt; name the primary"
    )


@pytest.mark.parametrize(
    ("name", "target", "code", "message"),
    [
        ("standby", "read-write", "read_only", "Database accepts no writes"),
        ("standby", "primary", "read_only", "Database is a standby"),
        ("primary", "standby", "no_standby", "Database is the primary"),
        ("primary", "read-only", "no_standby", "Database is the primary"),
    ],
)
async def test_only_host_of_another_kind_has_a_code(
    pair: Pair, name: str, target: str, code: str, message: str
) -> None:
    """The check is back once there is a server of the kind."""
    other = {"primary": "standby", "standby": "primary"}[name]
    proxy: FaultProxy = getattr(pair, other)
    upstream = proxy.upstream
    config = pair.config(other, target)
    async with opened(config) as pool, checked(pool) as check:
        proxy.upstream = getattr(pair, name).upstream
        failed = await check.check()
        proxy.upstream = upstream
        back = await check.check()

    assert (failed.code, failed.message) == (code, message)
    assert back.code != code


class Names:
    """A name server whose answer changes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.addresses: Sequence[str] = addresses
        self._resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, port: int, *more: Any, **options: Any) -> list[Any]:
        """Resolve the one name; everything else as usual."""
        if host != "db.test":
            return self._resolve(host, port, *more, **options)
        kind = socket.SOCK_STREAM
        return [(socket.AF_INET, kind, 6, "", (address, port)) for address in self.addresses]


async def test_all_addresses_of_a_name_are_tried(
    monkeypatch: pytest.MonkeyPatch, own_postgres: PostgresServer
) -> None:
    """The first one refuses."""
    Names(monkeypatch, "127.0.0.9", own_postgres.host)
    config = config_of(own_postgres, hosts=(("db.test", own_postgres.port),))

    assert await chosen(Connector(config)) == "primary"


async def test_name_is_resolved_at_each_connect(
    monkeypatch: pytest.MonkeyPatch, own_postgres: PostgresServer
) -> None:
    """It moved to another address: the next connection follows."""
    names = Names(monkeypatch, "127.0.0.9")
    config = config_of(own_postgres, hosts=(("db.test", own_postgres.port),))
    connector = Connector(config)
    with pytest.raises(ConnectionRefusedError):
        await connector.connect()
    names.addresses = (own_postgres.host,)

    assert await chosen(connector) == "primary"


async def test_a_given_address_replaces_the_look_up(own_postgres: PostgresServer) -> None:
    """The name is unknown, and the first address refuses."""
    server = ("unknown.invalid", own_postgres.port)
    given = {server: ("127.0.0.9", own_postgres.host)}
    config = config_of(own_postgres, hosts=(server,), host_addresses=given)

    assert await chosen(Connector(config)) == "primary"


async def test_unknown_name_among_others_is_named(own_postgres: PostgresServer) -> None:
    """The other host is used, or named, too."""
    unknown = ("unknown.invalid", 5432)
    good = (own_postgres.host, own_postgres.port)
    config = config_of(own_postgres, hosts=(unknown, good))
    assert await chosen(Connector(config)) == "primary"

    bad = ("127.0.0.1", free_port())
    refused = re.escape(f"has an unknown host name; 127.0.0.1:{bad[1]} refuses connections")
    with pytest.raises(ConnectionError, match=rf"unknown\.invalid:5432 {refused}"):
        await Connector(changed(config, hosts=(unknown, bad))).connect()


async def test_name_is_found_beside_lookups_that_hang(
    servers: tuple[PostgresServer, PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other code of the process asks for names that nothing answers for."""
    loop = asyncio.get_running_loop()
    config = config_of(servers[0], hosts=(("localhost", servers[0].port),))
    with silent_names(monkeypatch):
        names = [f"{number}.silent.test" for number in range(MANY)]
        others = [asyncio.ensure_future(loop.getaddrinfo(name, 1)) for name in names]
        await asyncio.sleep(0)
        kind = await chosen(Connector(config))
    await asyncio.gather(*others, return_exceptions=True)

    assert kind == "primary"


async def test_lookups_that_hang_leave_the_threads_to_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts that begin soon after one another share a thread."""
    hosts = (("db.silent.test", pair.primary.port),)
    connector = Connector(config_of(pair.server, hosts=hosts, connection_timeout=0.03))
    with silent_names(monkeypatch):
        for _ in range(MANY):
            with pytest.raises(TimeoutError):
                await connector.connect()
        hanging = sum(thread.name == "name-lookup" for thread in threading.enumerate())
        async with asyncio.timeout(20.0):
            await asyncio.to_thread(time.monotonic)

    assert 1 <= hanging < MANY
