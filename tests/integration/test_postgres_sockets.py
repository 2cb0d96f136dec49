"""How both sides notice that the other one is gone: keep-alive, user timeout, lost clients."""

import asyncio
import socket
from typing import Any

import asyncpg
import pytest
from tests.integration.postgres_clients import config_of
from tests.servers.postgres import PostgresServer
from tests.servers.waiting import until

from viralfx.postgres.connections import Connector

LINUX_ONLY = pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no TCP_USER_TIMEOUT"
)
OPTIONS = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
SERVER = """
select name, setting::int from pg_settings
where name in ('tcp_keepalives_idle', 'tcp_keepalives_interval', 'tcp_keepalives_count',
    'client_connection_check_interval', 'work_mem')
"""


async def seen(server: PostgresServer, **address: Any) -> tuple[int, list[int], dict[str, int]]:
    """Return the socket's keep-alive and options, and the server's settings."""
    connection = await Connector(config_of(server, **address)).connect()
    try:
        opened = connection.transport.get_extra_info("socket")
        options = [opened.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in OPTIONS]
        rows = await connection.fetch(SERVER)
        return (
            opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            options,
            dict(tuple(row) for row in rows),
        )
    finally:
        await connection.close()


@LINUX_ONLY
async def test_both_sides_probe_an_idle_connection(postgres: PostgresServer) -> None:
    """Within a minute of silence; sent data has to be acknowledged within half of one."""
    keepalive, options, server = await seen(postgres)

    assert keepalive == 1
    assert options == [30, 10, 3, 30_000]
    assert server["tcp_keepalives_idle"] == 30
    assert server["tcp_keepalives_interval"] == 10
    assert server["tcp_keepalives_count"] == 3
    assert server["client_connection_check_interval"] == 1000


@LINUX_ONLY
async def test_parameters_of_the_address_win(postgres: PostgresServer) -> None:
    """They are libpq's, and ``options`` sets what the server takes."""
    keepalive, options, server = await seen(
        postgres,
        keepalives_idle=40,
        keepalives_interval=5,
        keepalives_count=2,
        tcp_user_timeout=1.5,
        server_settings={"work_mem": "8MB", "client_connection_check_interval": "0"},
    )

    assert (keepalive, options) == (1, [40, 5, 2, 1500])
    assert server["tcp_keepalives_idle"] == 40
    assert (server["work_mem"], server["client_connection_check_interval"]) == (8192, 0)


@LINUX_ONLY
async def test_keepalive_can_be_turned_off(postgres: PostgresServer) -> None:
    """By libpq's ``keepalives=0``."""
    keepalive, options, _ = await seen(postgres, keepalives=False, tcp_user_timeout=0.0)

    assert (keepalive, options[-1]) == (0, 0)


async def test_values_beyond_those_of_the_system_are_lowered(postgres: PostgresServer) -> None:
    """An address for another system does not prevent the connection."""
    keepalive, _, _ = await seen(
        postgres, keepalives_idle=10**9 - 1, keepalives_interval=10**9 - 1, keepalives_count=999
    )

    assert keepalive == 1


async def test_server_ends_the_statement_of_a_lost_client(postgres: PostgresServer) -> None:
    """It would otherwise keep its locks until DB_STATEMENT_TIMEOUT."""
    name = "lost-client"
    connection = await Connector(config_of(postgres, application_name=name)).connect()
    work = asyncio.ensure_future(connection.fetch("select pg_sleep(60)"))
    running = f"select 1 from pg_stat_activity where application_name = '{name}'"  # noqa: S608
    await until(lambda: postgres.execute(f"{running} and state = 'active'"))
    connection.terminate()
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await work

    await until(lambda: not postgres.execute(running), seconds=20.0)


@pytest.mark.parametrize("tls_mode", ["disable", "prefer"])
async def test_server_without_the_check_of_clients_is_used(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, tls_mode: str
) -> None:
    """As are a server before Postgres 14 and one on a system that does not report lost clients.

    It may be one without TLS, too.
    """
    monkeypatch.setattr("viralfx.postgres.connections.CLIENT_CHECK", "unknown_check")
    connector = Connector(config_of(postgres, tls_mode=tls_mode))
    for _ in range(2):
        connection = await connector.connect()
        assert await connection.fetchval("select 1") == 1
        await connection.close()
