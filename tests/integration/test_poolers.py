"""Behind PgBouncer, in each of its modes."""

import asyncio
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from tests import forked
from tests.contracts.ledgers import draft
from tests.integration.doctor import visit
from tests.integration.postgres_clients import changed, checked, config_of, migrated, opened
from tests.servers.certificates import Certificates
from tests.servers.pgbouncer import MODES, PREPARED, PgBouncer, Poolers
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import wait_for_code

from viralfx.core.clock import SystemClock
from viralfx.core.errors import LedgerUnavailableError, StartupError, TransactionError
from viralfx.domain.health.model import Status
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresConfig, PostgresDatabase
from viralfx.postgres.migrate import apply_migrations
from viralfx.postgres.migrations import REVISIONS

EVERY = [(mode, prepared) for mode in MODES for prepared in PREPARED]


def behind(
    database: Database, pgbouncer: Poolers, mode: str, prepared: int = 0, **more: Any
) -> PostgresConfig:
    """Return a configuration for a database behind a pooler."""
    pooler = pgbouncer(database.server, mode, max_prepared_statements=prepared)
    return config_of(database, through=pooler, pooler=mode, **more)


@pytest.mark.parametrize(("mode", "prepared"), EVERY)
async def test_opens_and_serves_in_each_mode(
    database: Database, pgbouncer: Poolers, mode: str, prepared: int
) -> None:
    """Statements with arguments, transactions and concurrent callers."""
    async with opened(behind(database, pgbouncer, mode, prepared)) as db:

        async def ask(number: int) -> int:
            async with db.acquire() as connection:
                rows = await connection.fetch("select unnest($1::int[]) as n", [number] * 3)
                return sum(row["n"] for row in rows)

        assert await asyncio.gather(*map(ask, range(40))) == [3 * n for n in range(40)]


async def test_limits_hold_in_session_mode(database: Database, pgbouncer: Poolers) -> None:
    """From the first statement on, and after the reset of a released connection."""
    config = behind(database, pgbouncer, "session", pool_max=1, statement_timeout=7.0)
    async with opened(config) as db:
        for _ in range(3):
            async with db.acquire() as connection:
                assert await connection.fetchval("show statement_timeout") == "7s"
                assert await connection.fetchval("show plan_cache_mode") == "force_custom_plan"
                assert await connection.fetchval("show application_name") == "viralfx"
                await connection.execute("set statement_timeout = 0; set jit = off")


async def test_limits_hold_in_transaction_mode(database: Database, pgbouncer: Poolers) -> None:
    """In each transaction, and for a single statement at the client."""
    config = behind(database, pgbouncer, "transaction", statement_timeout=0.3)
    async with opened(config) as db:
        with pytest.raises(asyncpg.QueryCanceledError):
            await db.execute_with_retry(lambda c: c.execute("select pg_sleep(30)"))
        async with db.acquire() as connection:
            async with connection.transaction(readonly=True):
                assert await connection.fetchval("show statement_timeout") == "300ms"
            assert await connection.fetchval("show statement_timeout") == "0"
            with pytest.raises(TimeoutError):
                await connection.execute("select pg_sleep(30)")
            assert await connection.fetchval("select 1") == 1
    running = "select count(*) from pg_stat_activity where query like 'select pg_sleep%'"
    assert database.execute(f"{running} and state = 'active'") == [(0,)]


@pytest.mark.parametrize("mode", ["none", *MODES])
async def test_options_of_the_address_are_in_force(
    database: Database, pgbouncer: Poolers, mode: str
) -> None:
    """Each ``-c name=value``, lists included, directly and behind a pooler, in transactions."""
    config = config_of(database) if mode == "none" else behind(database, pgbouncer, mode)
    given = {"search_path": 'app, "$user", public', "work_mem": "5MB", "DateStyle": "SQL, DMY"}
    config = replace(config, address=replace(config.address, server_settings=given))
    async with opened(config) as db, db.acquire() as connection, connection.transaction():
        found = await connection.fetchrow(
            "select current_setting('search_path'), current_setting('work_mem'),"
            " current_setting('DateStyle')"
        )

    assert found is not None
    assert [text.replace('"', "").replace(" ", "") for text in found] == [
        "app,$user,public",
        "5MB",
        "SQL,DMY",
    ]


async def test_other_words_of_options_are_sent_at_the_login(database: Database) -> None:
    """A proxy reads them; the server itself takes its own words."""
    config = config_of(database)
    config = replace(config, address=replace(config.address, options="-e"))
    async with opened(config) as db, db.acquire() as connection:
        assert await connection.fetchval("show DateStyle") == "ISO, DMY"


async def test_no_mode_behind_a_pooler_ends_the_start_at_once(
    database: Database, pgbouncer: Poolers
) -> None:
    """In one attempt and one line, with the pooler's words and the variable to set."""
    pooler = pgbouncer(database.server, "transaction")
    config = config_of(database, through=pooler, max_reconnect_attempts=5, reconnect_delay=60.0)
    with pytest.raises(StartupError) as caught:
        await PostgresDatabase(config, clock=SystemClock()).open()
    assert str(caught.value) == (
        f"DATABASE_URL: the database at {config.address} is behind a pooler that refuses the"
        " settings of a session (unsupported startup parameter: plan_cache_mode), after 1 attempt;"
        " set DB_POOLER to the pooler's mode: session or transaction"
    )


@pytest.mark.parametrize("mode", MODES)
async def test_wrong_password_is_named(database: Database, pgbouncer: Poolers, mode: str) -> None:
    """The pooler has a code of its own for it."""
    config = behind(database, pgbouncer, mode, password="wrong")
    with pytest.raises(StartupError, match="refuses the user or password, after 1 attempt"):
        await PostgresDatabase(config, clock=SystemClock()).open()


@pytest.mark.parametrize("mode", MODES)
async def test_locked_jobs_do_not_make_the_database_unhealthy(
    migrated_database: Database, pgbouncer: Poolers, mode: str
) -> None:
    """The server cancels the counting, in each mode, well before the check's time limit."""
    config = behind(migrated_database, pgbouncer, mode)
    async with opened(config) as db, checked(db, within=5.0) as check:
        await wait_for_code(check, None)
        holder = await asyncpg.connect(migrated_database.url, ssl=False)
        try:
            async with holder.transaction():
                await holder.execute("lock table viralfx_ops.viralfx_jobs")
                observation = await check.check()
        finally:
            await holder.close()
        assert observation.status is Status.PASS
        assert isinstance((await check.query.run(60.0)).counts, LedgerUnavailableError)
        await wait_for_code(check, None)


async def test_no_session_is_changed_in_transaction_mode(
    database: Database, pgbouncer: Poolers
) -> None:
    """Server processes keep jit, and no prepared statement, lock or setting is left in them."""
    pooler = pgbouncer(database.server, "transaction", default_pool_size=3)
    config = config_of(database, through=pooler, pooler="transaction", pool_max=10)
    async with opened(config) as db:

        async def write(connection: Any) -> None:
            await connection.fetch("select $1::uuid[], $2::text[], pg_sleep(0.01)", [], ["a"])

        for _ in range(3):
            await asyncio.gather(*(db.execute_with_retry(write) for _ in range(10)))

        async def left(connection: Any) -> Any:
            return await connection.fetchrow(
                "select current_setting('jit') as jit, current_setting('statement_timeout') as s,"
                " (select count(*) from pg_prepared_statements where name <> '') as statements,"
                " (select count(*) from pg_locks where locktype = 'advisory') as locks,"
                " pg_sleep(0.05)"
            )

        async def ask_one() -> Any:
            async with db.acquire() as connection:
                return await left(connection)

        for row in await asyncio.gather(*(ask_one() for _ in range(10))):
            assert (row["jit"], row["s"], row["statements"], row["locks"]) == ("on", "0", 0, 0)


async def test_first_use_of_a_type_is_in_one_transaction(
    database: Database, pgbouncer: Poolers
) -> None:
    """Also of a type of the application, by several at once: no server process keeps jit off."""
    database.execute("create type mood as enum ('well', 'ill')")
    pooler = pgbouncer(database.server, "transaction", server_round_robin=1, default_pool_size=5)
    config = config_of(database, through=pooler, pooler="transaction", pool_min=5, pool_max=5)
    async with opened(config) as db:

        async def ask(statement: str, *arguments: Any) -> Any:
            async with db.acquire() as connection:
                return await connection.fetchval(statement, *arguments)

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(ask("select $1::bigint[]", [1]))
                group.create_task(ask("select $1::mood[]", ["ill"]))
        assert {await ask("show jit") for _ in range(20)} == {"on"}


@pytest.mark.parametrize("mode", MODES)
async def test_pooler_that_restarts_is_found_again(
    migrated_database: Database, pgbouncer: Poolers, mode: str
) -> None:
    """Accepted jobs are there, the check has a code, and it passes again by itself."""
    pooler = pgbouncer(migrated_database.server, mode)
    config = config_of(migrated_database, through=pooler, pooler=mode)
    async with opened(config) as db, checked(db) as check:
        ledger = PostgresJobLedger(db)
        await wait_for_code(check, None)
        (before,) = await ledger.accept([draft()])
        await asyncio.to_thread(pooler.stop)
        await wait_for_code(check, "refused")
        accepting = asyncio.create_task(ledger.accept([draft()]))
        await asyncio.to_thread(pooler.start)
        (after,) = await accepting
        await wait_for_code(check, None)
        for accepted in (before, after):
            assert await ledger.get(accepted.job.id) == accepted.job


@pytest.mark.parametrize("mode", MODES)
async def test_the_database_is_recognized_on_both_sides_of_a_pooler(
    migrated_database: Database, migrated_template: str, pgbouncer: Poolers, mode: str
) -> None:
    """A transaction of it can hold a job, and one of another database behind the pooler cannot."""
    server = migrated_database.server
    pooler, other = pgbouncer(server, mode), server.create_database(migrated_template)
    addresses = [
        migrated_database.url,
        server.url(migrated_database.name, host=pooler.host, port=pooler.port),
        server.url(other, host=pooler.host, port=pooler.port),
    ]
    async with opened(config_of(migrated_database, through=pooler, pooler=mode)) as db:
        ledger = PostgresJobLedger(db)
        for address in addresses:
            connection = await asyncpg.connect(address, statement_cache_size=0)
            async with connection.transaction():
                if address == addresses[-1]:
                    with pytest.raises(TransactionError, match="DATABASE_URL"):
                        await ledger.accept_in(connection, [draft()])
                else:
                    await ledger.accept_in(connection, [draft()])
            await connection.close()
        assert (await ledger.counts())["default"].waiting == 2
    server.drop_database(other)


DROPPED = (
    "plan_cache_mode,statement_timeout,tcp_keepalives_idle,tcp_keepalives_interval"
    ",tcp_keepalives_count,tcp_user_timeout,client_connection_check_interval"
)
"""Settings that a pooler must ignore for ``DB_POOLER=none``."""


@pytest.mark.parametrize("set_to", ["none", "session"])
async def test_a_transaction_pooler_that_the_settings_do_not_name_is_explained(
    migrated_database: Database, pgbouncer: Poolers, set_to: str
) -> None:
    """It accepts the login in silence; then each name of a statement is one of any client."""
    server = migrated_database.server
    pooler = pgbouncer(
        server, "transaction", max_prepared_statements=0, ignore_startup_parameters=DROPPED
    )
    config = config_of(migrated_database, through=pooler, pooler=set_to)
    async with opened(config) as db, checked(db) as check:
        ledger = PostgresJobLedger(db)
        observation = await wait_for_code(check, "pooler_mode")
        assert observation.status is Status.FAIL
        assert "server process to another client after each transaction" in observation.message
        assert observation.message.endswith("; set DB_POOLER=transaction")
        with pytest.raises(LedgerUnavailableError) as caught:
            await ledger.accept([draft()])
        assert caught.value.code == "pooler_mode"

        await asyncio.to_thread(pooler.stop)
        pooler.set(pool_mode="session")
        await asyncio.to_thread(pooler.start)
        await wait_for_code(check, None)
        await ledger.accept([draft()])


@pytest.mark.parametrize("mode", MODES)
async def test_full_pooler_has_a_code(
    migrated_database: Database, pgbouncer: Poolers, mode: str
) -> None:
    """It has no connection to the server in time, or takes no more clients; later it passes."""
    pooler = pgbouncer(migrated_database.server, mode, default_pool_size=1, query_wait_timeout=0.5)
    config = config_of(migrated_database, through=pooler, pooler=mode, pool_min=0, pool_max=1)
    holder = await asyncpg.connect(
        migrated_database.server.url(migrated_database.name, host=pooler.host, port=pooler.port),
        ssl=False,
        statement_cache_size=0,
    )
    transaction = holder.transaction()
    await transaction.start()
    database = PostgresDatabase(config, clock=SystemClock())
    async with checked(database, within=5.0) as check:
        observation = await wait_for_code(check, "pooler_full")
        assert "query_wait_timeout" in observation.message
        await transaction.rollback()
        await holder.close()
        await wait_for_code(check, None)
    database.terminate()


async def test_pooler_without_room_for_clients_has_a_code(
    migrated_database: Database, pgbouncer: Poolers
) -> None:
    """The sentence names the pooler's limit."""
    pooler = pgbouncer(migrated_database.server, "transaction", max_client_conn=1)
    config = config_of(migrated_database, through=pooler, pooler="transaction")
    async with opened(changed(config, pool_max=1)) as db, checked(db) as check:
        observation = await wait_for_code(check, "pooler_full")
        assert "max_client_conn" in observation.message


async def test_paused_pooler_loses_nothing(migrated_database: Database, pgbouncer: Poolers) -> None:
    """Calls wait, the check has a code, and both continue with RESUME."""
    pooler = pgbouncer(migrated_database.server, "transaction")
    config = config_of(migrated_database, through=pooler, pooler="transaction")
    async with opened(config) as db, checked(db, within=1.0) as check:
        ledger = PostgresJobLedger(db)
        await wait_for_code(check, None)
        await asyncio.to_thread(pooler.pause)
        accepting = asyncio.create_task(ledger.accept([draft()]))
        await wait_for_code(check, "timeout")
        await asyncio.to_thread(pooler.resume)
        (accepted,) = await accepting
        await wait_for_code(check, None)
        assert await ledger.get(accepted.job.id) == accepted.job


@pytest.mark.parametrize("mode", MODES)
async def test_server_that_is_down_behind_a_pooler_has_a_code(
    own_postgres: PostgresServer, pgbouncer: Poolers, mode: str
) -> None:
    """The pooler answers, and the server behind it does not."""
    await migrated(config_of(own_postgres))
    pooler = pgbouncer(own_postgres, mode)
    config = config_of(own_postgres, through=pooler, pooler=mode)
    async with opened(config) as db, checked(db, within=1.0) as check:
        await wait_for_code(check, None)
        await asyncio.to_thread(own_postgres.stop)
        observation = await check.check()
        while observation.code not in {"pooler_cut_off", "timeout"}:
            observation = await check.check()
        assert observation.status is Status.FAIL
        await asyncio.to_thread(own_postgres.start)
        await wait_for_code(check, None)


@pytest.mark.parametrize("mode", MODES)
async def test_migrations_run_behind_a_pooler(
    database: Database, pgbouncer: Poolers, mode: str
) -> None:
    """Several at once, repeatedly: locks and limits are those of transactions."""
    pooler = pgbouncer(database.server, mode)
    config = config_of(database, through=pooler, pooler=mode)
    first, second = await asyncio.gather(apply_migrations(config), apply_migrations(config))
    assert sorted(revision for revision, _ in [*first, *second]) == list(REVISIONS)
    assert await apply_migrations(config) == []


def test_migrate_goes_past_a_pooler(database: Database, pgbouncer: Poolers) -> None:
    """With DATABASE_MIGRATION_URL, as its own user; errors name that variable."""
    pooler = pgbouncer(database.server, "transaction")
    through = database.server.url(database.name, host=pooler.host, port=pooler.port)
    environ = {
        "DATABASE_URL": through.replace(f":{database.server.password}", ""),
        "DB_POOLER": "transaction",
        "DB_PASSWORD": "of another user",
    }
    done = forked.viralfx("migrate", environ={**environ, "DATABASE_MIGRATION_URL": database.url})
    assert done.returncode == 0, done.stderr
    environ = {"DATABASE_URL": database.url, "DATABASE_MIGRATION_URL": through}
    done = forked.viralfx("migrate", environ=environ)
    assert done.returncode == 3
    assert "DATABASE_MIGRATION_URL: the database at" in done.stderr
    assert "unsupported startup parameter" in done.stderr


def doctor(
    database: Database, pooler: PgBouncer | None, **environ: str
) -> tuple[list[str], list[str]]:
    """Return what doctor found about database, pool and migrations: good news and problems."""
    place: dict[str, Any] = {} if pooler is None else {"host": pooler.host, "port": pooler.port}
    url = database.server.url(database.name, **place)
    if environ.get("DB_POOLER") == "transaction":
        environ["DATABASE_LISTEN_URL"] = database.url
    run = visit({"PORT": "0", "DATABASE_URL": url, **environ})
    own = [f for f in run.findings if f["area"] in {"database", "pool", "migrations"}]
    problems = [f"{f['found']} -> {f['remedy']}" for f in own if f["remedy"]]
    return [f["found"] for f in own if f["status"] == "pass"], problems


@pytest.mark.parametrize("mode", MODES)
def test_doctor_has_no_untrue_line_behind_a_pooler(
    migrated_database: Database, pgbouncer: Poolers, certificates: Certificates, mode: str
) -> None:
    """TLS is that of our end, limits are in force, and the pool is the pooler's client."""
    pooler = pgbouncer(migrated_database.server, mode, tls=certificates)
    well, problems = doctor(migrated_database, pooler, DB_POOLER=mode)
    assert problems == []
    assert "answers over TLSv1.3 as far as a pooler in front of it" in well[0]
    assert "to a pooler; its pool size decides" in well[1]

    plain = pgbouncer(migrated_database.server, mode)
    well, problems = doctor(migrated_database, plain, DB_POOLER=mode)
    assert problems == []
    assert "answers in plain text as far as a pooler in front of it" in well[0]


def test_doctor_names_a_pooler_that_the_settings_do_not(
    migrated_database: Database, pgbouncer: Poolers
) -> None:
    """A pooler that they name where there is none, too."""
    server = migrated_database.server
    session = pgbouncer(server, "session", ignore_startup_parameters=DROPPED)
    _, problems = doctor(migrated_database, session)
    assert len(problems) == 2
    assert "a pooler answers in place of the server, and DB_POOLER=none" in problems[0]
    assert "DB_STATEMENT_TIMEOUT=60000 is not in force" in problems[1]

    transaction = pgbouncer(server, "transaction")
    _, problems = doctor(migrated_database, transaction, DB_POOLER="session")
    assert len(problems) == 1
    assert "after each transaction, and DB_POOLER=session -> set DB_POOLER=tr" in problems[0]

    _, problems = doctor(migrated_database, None, DB_POOLER="transaction")
    assert len(problems) == 1
    assert "no pooler answers, and DB_POOLER=transaction" in problems[0]

    _, problems = doctor(migrated_database, transaction)
    assert len(problems) == 1
    assert "unsupported startup parameter" in problems[0]
    assert "-> set DB_POOLER to the pooler's mode: session or transaction" in problems[0]

    # Its second address is examined, too.
    url = server.url(migrated_database.name, host=session.host, port=session.port)
    _, problems = doctor(migrated_database, None, DATABASE_MIGRATION_URL=url)
    assert len(problems) == 1
    assert "a pooler answers at DATABASE_MIGRATION_URL" in problems[0]
