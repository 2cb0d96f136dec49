"""Connections end when their server is the wrong one, silent or old, and new ones take over."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.job_ledgers import NO_WORKER, ledger_in, work
from tests.integration.postgres_clients import (
    Suspicions,
    active,
    checked,
    config_of,
    migrated,
    opened,
    sessions,
    use,
)
from tests.servers.fault_proxy import BLACKHOLE, DROP, PASS, SILENCE, Fault, FaultProxy
from tests.servers.fixtures import FaultProxies, or_skip
from tests.servers.pgbouncer import MODES, Poolers, pgbouncer
from tests.servers.postgres import Database, PostgresServer, postgres_server, postgres_standby
from tests.servers.supply import UnavailableError
from tests.servers.waiting import until, wait_for_code, wait_until
from tests.soak import SOAK, Record, cycles, spread

from viralfx.core.errors import LedgerUnavailableError
from viralfx.domain.health.model import Status
from viralfx.jobs.postgres import PostgresJobLedger, PostgresLeaseStore
from viralfx.postgres import PostgresDatabase
from viralfx.postgres.connections import run_query
from viralfx.postgres.database import Lease
from viralfx.postgres.pool import ACKNOWLEDGED_TIMEOUT, PING_AFTER
from viralfx.postgres.servers import USER_TIMEOUT_SECONDS

SET_READ_ONLY = "alter system set default_transaction_read_only = on"
SET_WRITABLE = "alter system reset default_transaction_read_only"
PORT = "select inet_server_port()"


@pytest.fixture
def new_primary() -> Iterator[PostgresServer]:
    """Return a second server."""
    with postgres_server() as server:
        yield server


def demote(server: PostgresServer) -> None:
    """Let a server accept no writes; it stays reachable."""
    server.execute(SET_READ_ONLY)
    server.execute("select pg_reload_conf()")
    wait_until(lambda: server.execute("show default_transaction_read_only") == [("on",)])


def promote(server: PostgresServer) -> None:
    """Let it accept writes again."""
    server.execute(SET_WRITABLE)
    server.execute("select pg_reload_conf()")
    wait_until(lambda: server.execute("show default_transaction_read_only") == [("off",)])


async def create(connection: Lease) -> int:
    """Write, and return the port of the server."""
    await connection.execute("create table if not exists rows (number int)")
    return int(await connection.fetchval(PORT))


async def port(pool: PostgresDatabase) -> int:
    """Return the port of the server that a connection of the pool leads to."""
    async with pool.acquire() as connection:
        return int(await connection.fetchval(PORT))


# -- a server that accepts no writes ---------------------------------------------------------


async def test_a_demoted_primary_is_left(
    own_postgres: PostgresServer, new_primary: PostgresServer, fault_proxy: FaultProxies
) -> None:
    """New connections reach the new primary; the first write is repeated there."""
    proxy = fault_proxy(own_postgres.port)
    suspicions = Suspicions()
    config = config_of(own_postgres, through=proxy, pool_min=3)
    async with opened(config, on_suspected_outage=suspicions) as pool:
        assert await pool.execute_with_retry(create) == own_postgres.port
        demote(own_postgres)
        proxy.upstream = new_primary.host, new_primary.port

        for _ in range(5):
            assert await pool.execute_with_retry(create) == new_primary.port
        assert suspicions.count
        async with AsyncExitStack() as stack:
            for _ in range(3):
                connection = await stack.enter_async_context(pool.acquire())
                assert await connection.fetchval(PORT) == new_primary.port


async def test_a_demotion_is_no_failure_of_an_effect(own_postgres: PostgresServer) -> None:
    """The write of an effect that a demoted server refuses costs no attempt of its job."""

    async def write(connection: Lease) -> bytes:
        await connection.execute("create table rows (number int)")
        return b"1"

    async with ledger_in(own_postgres) as ledger:
        claim = await work(ledger)
        demote(own_postgres)
        with pytest.raises(LedgerUnavailableError, match="accepts no writes"):
            await ledger.settle_with_effect(claim, write)
        promote(own_postgres)

        assert await ledger.settle_with_effect(claim, write)


async def test_reading_alone_finds_a_demoted_primary(
    own_postgres: PostgresServer, new_primary: PostgresServer, fault_proxy: FaultProxies
) -> None:
    """The server says with each answer whether it accepts writes."""
    proxy = fault_proxy(own_postgres.port)
    async with opened(config_of(own_postgres, through=proxy)) as pool:
        demote(own_postgres)
        proxy.upstream = new_primary.host, new_primary.port

        assert await port(pool) == own_postgres.port
        assert await port(pool) == new_primary.port


async def test_the_refusal_of_a_caller_s_own_transaction_is_final(database: Database) -> None:
    """It is not repeated, and the connection stays."""
    attempts = 0

    async def write(connection: Lease) -> None:
        nonlocal attempts
        attempts += 1
        async with connection.transaction():
            await connection.execute("set transaction read only")
            await connection.execute("create table rows (number int)")

    async with opened(config_of(database, pool_max=1)) as pool:
        before = sessions(database)
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await pool.execute_with_retry(write)
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            async with pool.acquire() as connection, connection.transaction(readonly=True):
                await connection.execute("create table rows (number int)")
        await use(pool)

        assert (attempts, sessions(database)) == (1, before)


async def test_a_read_only_server_is_not_reopened_for_each_use(
    own_postgres: PostgresServer,
) -> None:
    """A connection to it is used for a second, if there is no better one."""
    demote(own_postgres)
    async with opened(config_of(own_postgres, pool_max=1)) as pool:
        suspicions = pool.on_suspected_outage = Suspicions()
        began = time.monotonic()
        for _ in range(50):
            await use(pool)
        assert suspicions.count <= time.monotonic() - began + 1


async def test_every_connection_finds_the_new_primary(
    own_postgres: PostgresServer, new_primary: PostgresServer, fault_proxy: FaultProxies
) -> None:
    """Those of the check, of the lease and of the ledger, too: none of them raises."""
    await migrated(config_of(new_primary))
    proxy = fault_proxy(own_postgres.port)
    config = await migrated(config_of(own_postgres, through=proxy))
    async with opened(config) as pool, checked(pool) as check:
        ledger, leases = PostgresJobLedger(pool), PostgresLeaseStore(pool)
        await ledger.accept([draft()])
        for store in (ledger, leases):
            await store.register("w", ["default"], LONG_LEASE, [], tasks=["t"])
        assert (await check.check()).status is Status.PASS
        demote(own_postgres)
        proxy.upstream = new_primary.host, new_primary.port

        assert (await check.check()).status is Status.PASS
        for store in (leases, ledger):
            await store.register("w", ["default"], LONG_LEASE, [], tasks=["t"])
        (accepted,) = await ledger.accept([draft()])
        assert new_primary.execute("select id::text from viralfx_jobs") == [(accepted.job.id,)]
        await leases.close()


async def test_the_check_follows_a_primary_and_back(
    own_postgres: PostgresServer, fault_proxy: FaultProxies
) -> None:
    """While no server accepts writes it fails; each turn of it asks by a new connection."""
    proxy = fault_proxy(own_postgres.port)
    config = await migrated(config_of(own_postgres, through=proxy))
    async with opened(config) as pool, checked(pool) as check:
        await wait_for_code(check, None)
        demote(own_postgres)
        seen = await wait_for_code(check, "read_only")
        assert seen.status is Status.FAIL
        before = proxy.accepted
        await check.check()
        await check.check()
        assert proxy.accepted == before + 2

        promote(own_postgres)
        assert (await check.check()).code is None
        await pool.execute_with_retry(create)


async def standby_of(primary: PostgresServer, stack: AsyncExitStack) -> PostgresServer:
    """Return a running standby; skip the test where there is none."""
    try:
        return stack.enter_context(postgres_standby(primary))
    except UnavailableError as error:
        pytest.skip(str(error))


async def test_a_standby_as_the_only_host(own_postgres: PostgresServer) -> None:
    """The check and each write say so, and its promotion ends that."""
    await migrated(config_of(own_postgres))
    async with AsyncExitStack() as stack:
        standby = await standby_of(own_postgres, stack)
        pool = await stack.enter_async_context(opened(config_of(standby)))
        check = await stack.enter_async_context(checked(pool))
        ledger = PostgresJobLedger(pool)
        seen = await check.check()
        assert (seen.status, seen.code) == (Status.FAIL, "read_only")
        assert "name the primary" in seen.message
        with pytest.raises(LedgerUnavailableError, match="the database accepts no writes"):
            await ledger.accept([draft()])

        standby.execute("select pg_promote()")
        await wait_for_code(check, None)
        await ledger.accept([draft()])


async def test_a_standby_can_be_wanted(own_postgres: PostgresServer) -> None:
    """With that value of target_session_attrs the check passes, and connections stay."""
    await migrated(config_of(own_postgres))
    async with AsyncExitStack() as stack:
        standby = await standby_of(own_postgres, stack)
        config = config_of(standby, target_session_attrs="standby", pool_max=1)
        pool = await stack.enter_async_context(opened(config))
        check = await stack.enter_async_context(checked(pool))
        for _ in range(2):
            seen = await check.check()
            assert (seen.status, seen.code) == (Status.PASS, None)
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await pool.execute_with_retry(create)
        assert await port(pool) == standby.port


@pytest.mark.parametrize("mode", MODES)
async def test_a_read_only_server_behind_a_pooler(own_postgres: PostgresServer, mode: str) -> None:
    """The pooler's greeting tells an earlier state; questions find the state of the moment."""
    await migrated(config_of(own_postgres))
    with or_skip(), pgbouncer(own_postgres, mode) as pooler:
        config = config_of(own_postgres, through=pooler, pooler=mode)
        async with opened(config) as pool, checked(pool) as check:
            ledger = PostgresJobLedger(pool)
            await ledger.accept([draft()])
            demote(own_postgres)
            await wait_for_code(check, "read_only")
            with pytest.raises(LedgerUnavailableError, match="the database accepts no writes"):
                await ledger.accept([draft()])

            promote(own_postgres)
            await wait_for_code(check, None)
            await ledger.accept([draft()])
            await pool.execute_with_retry(create)


async def test_two_primaries_are_used_one_after_the_other(
    own_postgres: PostgresServer, new_primary: PostgresServer
) -> None:
    """Nothing tells them apart, so fencing is up to others; a process leaves one that ends.

    It does not go back: it prefers the server that it found last.
    """
    servers = (own_postgres, new_primary)
    for server in servers:
        await migrated(config_of(server))
    config = config_of(
        own_postgres,
        hosts=tuple((server.host, server.port) for server in servers),
        target_session_attrs="read-write",
        pool_min=3,
    )

    def kept() -> list[str]:
        select = "select id::text from viralfx_ops.viralfx_jobs"
        return [job for server in servers for (job,) in server.execute(select)]

    async with opened(config) as pool, checked(pool) as check:
        ledger = PostgresJobLedger(pool)
        accepted: list[str] = []

        async def accept() -> None:
            for (each,) in await asyncio.gather(*(ledger.accept([draft()]) for _ in range(20))):
                accepted.append(each.job.id)
            await wait_for_code(check, None)

        await accept()
        used = await port(pool)
        (server,) = (each for each in servers if each.port == used)
        await asyncio.to_thread(server.kill)
        await accept()
        assert await port(pool) != used
        await asyncio.to_thread(server.start)
        await accept()
        assert await port(pool) != used
        assert len(accepted) == 60
        assert sorted(await asyncio.to_thread(kept)) == sorted(accepted)


# -- age -------------------------------------------------------------------------------------


async def test_connections_end_at_their_greatest_age(database: Database) -> None:
    """Idle ones, one after the other; they are replaced, and no check is requested."""
    async with opened(config_of(database, max_lifetime=1.5, pool_min=3)) as pool:
        suspicions = pool.on_suspected_outage = Suspicions()
        seen = [set(sessions(database))]
        assert len(seen[0]) == 3
        deadline = time.monotonic() + 20
        while seen[-1] & seen[0] and time.monotonic() < deadline:
            seen.append(set(await asyncio.to_thread(sessions, database)))
            await asyncio.sleep(0.01)

        # Each number of the first connections was seen: they did not end together.
        left = [len(each & seen[0]) for each in seen]
        assert left[-1] == 0
        assert {3, 2, 1} <= set(left)
        await until(lambda: pool.total_connections == 3)
        assert suspicions.count == 0


async def test_a_name_that_moved_is_followed(
    own_postgres: PostgresServer, new_primary: PostgresServer, fault_proxy: FaultProxies
) -> None:
    """Also while the former server accepts writes: at the greatest age of a connection."""
    proxy = fault_proxy(own_postgres.port)
    async with opened(config_of(own_postgres, through=proxy, max_lifetime=1.5)) as pool:
        assert await port(pool) == own_postgres.port
        proxy.upstream = new_primary.host, new_primary.port
        async with asyncio.timeout(20):
            while await port(pool) != new_primary.port:  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0.05)


async def test_a_connection_in_use_is_not_ended(database: Database) -> None:
    """It ends when it comes back."""
    async with opened(config_of(database, max_lifetime=1.0, pool_max=1)) as pool:
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
            await connection.execute("select pg_sleep(1.5)")
            assert await connection.fetchval("select pg_backend_pid()") == pid
        async with pool.acquire() as connection:
            assert connection.get_server_pid() != pid


async def test_dedicated_connections_end_too(database: Database) -> None:
    """Those of the check and of leases, between two uses."""
    config = await migrated(config_of(database, max_lifetime=1.0))
    async with opened(config) as pool, checked(pool) as check:
        ledger = PostgresJobLedger(pool)
        names = ("viralfx-health", "viralfx-heartbeat")

        async def renew() -> None:
            await check.check()
            await ledger.register("w", ["default"], LONG_LEASE, [], tasks=["t"])

        await renew()
        before = [sessions(database, name) for name in names]
        await renew()
        assert [sessions(database, name) for name in names] == before
        await asyncio.sleep(1.1)
        await renew()
        for name, (old,) in zip(names, before, strict=True):
            (new,) = sessions(database, name)
            assert new != old


# -- silence ---------------------------------------------------------------------------------


FIRST_REQUEST = 3.0 if SOAK else 30.0
"""Seconds; each dead connection that is waited for would cost 60 s."""


async def idle(pool: PostgresDatabase, proxy: FaultProxy, fault: Fault = DROP) -> None:
    """Wait until the pool's connections are idle for long, and drop all connections."""
    # The pool replaces closed connections in the background; a connection is tested by its age.
    async with asyncio.timeout(20):
        while pool.total_connections < pool.config.settings.pool_min:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
    await asyncio.sleep(PING_AFTER)
    proxy.mode = fault


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "fault"), [("none", DROP), ("transaction", SILENCE)])
async def test_the_first_request_after_a_silent_drop(
    migrated_database: Database,
    fault_proxy: FaultProxies,
    pgbouncer: Poolers,
    *,
    mode: str,
    fault: Fault,
    record_property: Record,
) -> None:
    """Only one of the dead connections costs time.

    Behind a pooler in transaction mode the answer may take long, but not the acknowledgement by
    the pooler's system.
    """
    database = migrated_database
    if mode != "none" and not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("the system has no TCP_USER_TIMEOUT")
    port = database.server.port if mode == "none" else pgbouncer(database.server, mode).port
    proxy = fault_proxy(port)
    # With the maximum of three, no fourth connection is opened late.
    sizes = {"pool_min": 3, "pool_max": 3}
    config = config_of(database, through=proxy, statement_timeout=60.0, pooler=mode, **sizes)
    took = []
    async with opened(config) as pool:
        ledger = PostgresJobLedger(pool)

        async def accept() -> None:
            await ledger.accept([draft()])

        async def read() -> None:
            await ledger.get(NO_WORKER)

        async def page() -> None:
            await ledger.page()

        async def write() -> None:
            await pool.execute_with_retry(create)

        for request in (accept, read, page, write):
            await idle(pool, proxy, fault)
            began = time.monotonic()
            await request()
            took.append(time.monotonic() - began)
            await request()
            assert time.monotonic() - began < FIRST_REQUEST
    record_property(f"first request after silence, DB_POOLER={mode}", spread(took))


async def test_a_busy_pooler_is_not_taken_for_a_silent_one(
    migrated_database: Database, pgbouncer: Poolers
) -> None:
    """Its system acknowledges a statement that waits; the connection stays."""
    pooler = pgbouncer(migrated_database.server, "transaction")
    config = config_of(migrated_database, through=pooler, pooler="transaction", pool_max=1)
    async with opened(config) as pool:
        await use(pool)
        async with pool.acquire() as connection:
            number = connection.get_server_pid()
        await asyncio.sleep(PING_AFTER)
        await asyncio.to_thread(pooler.pause)
        waiting = asyncio.create_task(use(pool))
        done, _ = await asyncio.wait({waiting}, timeout=2 * ACKNOWLEDGED_TIMEOUT)
        assert not done
        await asyncio.to_thread(pooler.resume)
        await waiting
        async with pool.acquire() as connection:
            assert connection.get_server_pid() == number


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="not on this system")
async def test_the_first_answer_lifts_the_limit_on_acknowledgements(database: Database) -> None:
    """The rest of a long use of the connection survives a pause of the network."""
    async with opened(config_of(database, pooler="transaction", pool_max=1)) as pool:
        await use(pool)
        await asyncio.sleep(PING_AFTER)
        async with pool.acquire() as connection:
            own: Any = connection  # a proxy of a CheckedConnection
            used = own.itself.transport.get_extra_info("socket")

            def limit() -> int:
                return int(used.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))

            assert limit() == round(ACKNOWLEDGED_TIMEOUT * 1000)
            await connection.fetchval("select $1::int", 1)
            await until(lambda: limit() == round(USER_TIMEOUT_SECONDS * 1000))


@pytest.mark.soak
async def test_a_transaction_that_cannot_begin_is_repeated(
    database: Database, fault_proxy: FaultProxies, record_property: Record
) -> None:
    """Also on a connection that answered a moment ago."""
    proxy = fault_proxy(database.server.port)
    config = config_of(database, through=proxy, pool_max=1, statement_timeout=60.0)
    async with opened(config) as pool:
        await pool.execute_with_retry(create)
        proxy.mode = DROP
        began = time.monotonic()
        await pool.execute_with_retry(create)
        took = time.monotonic() - began
        assert took < FIRST_REQUEST
    record_property("transaction that could not begin", spread([took]))


LOCK = "lock table viralfx_ops.viralfx_jobs"


@pytest.mark.parametrize("at_first", ["locked", "read_only"])
async def test_a_silent_primary_is_left_for_one_that_does_not_count_at_first(
    own_postgres: PostgresServer,
    new_primary: PostgresServer,
    fault_proxy: FaultProxies,
    at_first: str,
) -> None:
    """Its job table is locked, or it is promoted later; then a waiting caller gets an error."""
    await migrated(config_of(new_primary))
    proxy = fault_proxy(own_postgres.port)
    config = await migrated(config_of(own_postgres, through=proxy, statement_timeout=60.0))
    async with opened(config) as pool, checked(pool) as check, pool.acquire() as connection:
        assert (await check.check()).code is None
        proxy.upstream = new_primary.host, new_primary.port
        proxy.mode = DROP
        waiting = asyncio.create_task(connection.execute("select 1"))
        if at_first == "read_only":
            demote(new_primary)
            await wait_for_code(check, "read_only")
            promote(new_primary)
        holder = await asyncpg.connect(new_primary.url(), ssl=False)
        try:
            async with holder.transaction():
                await holder.execute(LOCK if at_first == "locked" else "select 1")
                await wait_for_code(check, None)
                done, _ = await asyncio.wait({waiting}, timeout=5)
        finally:
            await holder.close()
        assert done
        assert isinstance(waiting.exception(), asyncpg.ConnectionDoesNotExistError)


async def test_attempts_to_connect_leave_a_silent_primary(
    own_postgres: PostgresServer, new_primary: PostgresServer, fault_proxy: FaultProxies
) -> None:
    """They would otherwise hold all places of the pool until DB_CONNECTION_TIMEOUT."""
    await migrated(config_of(new_primary))
    proxy = fault_proxy(own_postgres.port)
    limits = {"connection_timeout": 60.0, "pool_timeout": 60.0, "pool_max": 3}
    config = await migrated(config_of(own_postgres, through=proxy, **limits))
    async with opened(config) as pool, checked(pool) as check:
        assert (await check.check()).code is None
        await asyncio.sleep(PING_AFTER)
        proxy.mode = BLACKHOLE
        callers = [asyncio.create_task(use(pool)) for _ in range(6)]
        assert (await check.check()).code == "timeout"
        await until(lambda: pool.total_connections == 0)
        proxy.upstream = new_primary.host, new_primary.port
        proxy.mode = DROP
        await wait_for_code(check, None)
        _, left = await asyncio.wait(callers, timeout=10)
        assert not left
        for caller in callers:
            caller.result()


async def test_a_silence_of_the_same_server_cuts_no_caller(
    own_postgres: PostgresServer, fault_proxy: FaultProxies
) -> None:
    """Also if its jobs could not be counted before."""
    proxy = fault_proxy(own_postgres.port)
    config = await migrated(config_of(own_postgres, through=proxy))
    async with opened(config) as pool, checked(pool) as check, pool.acquire() as connection:
        holder = await asyncpg.connect(own_postgres.url(), ssl=False)
        async with holder.transaction():
            await holder.execute(LOCK)
            assert (await check.check()).code is None
        await holder.close()
        proxy.mode = BLACKHOLE
        assert (await check.check()).code == "timeout"
        proxy.mode = PASS
        await wait_for_code(check, None)
        assert await connection.fetchval("select 1") == 1


async def test_a_test_of_a_connection_can_be_cancelled(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """The pool loses no place."""
    proxy = fault_proxy(database.server.port)
    async with opened(config_of(database, through=proxy, pool_max=1)) as pool:
        await idle(pool, proxy)
        caller = asyncio.create_task(use(pool))
        await until(lambda: proxy.struck)
        caller.cancel()
        await asyncio.wait({caller}, timeout=5)
        assert caller.cancelled()
        await use(pool)
        assert (pool.in_use, pool.waiting) == (0, 0)


# -- what is cut -----------------------------------------------------------------------------


async def test_a_cut_statement_ends_in_the_server(database: Database) -> None:
    """The caller does not wait for it."""
    async with opened(config_of(database)) as pool:
        connection = await pool.connect("own")
        running = asyncio.create_task(
            run_query(connection, connection.execute("select pg_sleep(60)"))
        )
        busy = "select 1 from pg_stat_activity where query = 'select pg_sleep(60)'"
        await until(lambda: database.execute(f"{busy} and state = 'active'"))
        running.cancel()
        await asyncio.wait({running}, timeout=1)
        assert running.cancelled()
        assert connection.is_closed()
        await until(lambda: not database.execute(busy))


async def test_a_cancelled_caller_s_statement_ends_in_the_server(database: Database) -> None:
    """The connection can be used again."""
    async with opened(config_of(database, pool_max=1)) as pool:
        for _ in cycles(20, usual=2):
            async with pool.acquire() as connection:
                pid = connection.get_server_pid()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), pool.acquire() as connection:
                    await connection.execute("select pg_sleep(60)")
            await until(lambda: not active(database))
            async with pool.acquire() as connection:
                assert connection.get_server_pid() == pid
