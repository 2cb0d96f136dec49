"""Transactional effects on a real server: one transaction with the completion of their job."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from tests.contracts.ledgers import ERROR, LONG_LEASE, draft
from tests.integration.job_ledgers import ledger_in, work
from tests.integration.postgres_clients import config_of, opened
from tests.servers.fault_proxy import PASS, RESET
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database
from tests.servers.waiting import until

from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.codec import ResultError
from viralfx.jobs.ledger import ProgressReport
from viralfx.jobs.model import JobState, failed, retried
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresDatabase


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


@pytest.fixture
def table(database: Database) -> Database:
    """Return a database with a table for effects, each number once."""
    database.execute("create table effects (number int primary key)")
    return database


@pytest.fixture
async def pool(table: Database) -> AsyncIterator[PostgresDatabase]:
    """Return a pool on a database that is migrated."""
    async with opened(config_of(table)) as pool:
        yield pool


def effects(database: Database) -> list[int]:
    """Return the numbers that effects wrote."""
    return [number for (number,) in database.execute("select number from effects order by 1")]


class Effect:
    """Writes a number, and signals that it has."""

    def __init__(self, number: int = 1) -> None:
        self.runs = 0
        self._number = number

    async def __call__(self, connection: Any) -> bytes:
        """Write."""
        self.runs += 1
        await connection.execute("insert into effects values ($1)", self._number)
        return b"1"


async def test_heartbeats_continue_during_long_effects(table: Database) -> None:
    """Twenty slow effects and three connections: one runs at a time."""
    begun, running, most, over = 0, 0, 0, asyncio.Event()

    async def slow(connection: Any) -> bytes:
        nonlocal begun, running, most
        begun, running = begun + 1, running + 1
        most = max(most, running)
        await connection.execute("select 1")
        await over.wait()
        running -= 1
        return b"1"

    async with ledger_in(table, pool_max=3) as ledger:
        await work(ledger)
        await ledger.accept([draft() for _ in range(20)])
        claims = await ledger.claim("default", "w", 20)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            calls = [group.create_task(ledger.settle_with_effect(claim, slow)) for claim in claims]
            await until(lambda: begun)
            for _ in range(50):
                await ledger.register("w", ["default"], LONG_LEASE, [claim.id for claim in claims])
            # None of them waited for the effect.
            assert (begun, most) == (1, 1)
            over.set()
        counts = (await ledger.counts())["default"]

    assert all(call.result() for call in calls)
    assert (most, counts.completed) == (1, 21)


async def test_effect_may_exceed_the_ledger_timeout(table: Database) -> None:
    """Only the timeout of the task applies."""

    async def slow(connection: Any) -> bytes:
        await connection.execute("select pg_sleep(1.2)")
        return b"1"

    async with ledger_in(table, call_timeout=1.0) as ledger:
        assert await ledger.settle_with_effect(await work(ledger), slow)


async def test_swallowed_sql_error_rolls_everything_back(
    pool: PostgresDatabase, table: Database
) -> None:
    """Postgres has aborted the transaction, so the job must not be completed."""

    async def hide(connection: Any) -> bytes:
        await connection.execute("insert into effects values (1)")
        with contextlib.suppress(asyncpg.UniqueViolationError):
            await connection.execute("insert into effects values (1)")
        return b"1"

    ledger = PostgresJobLedger(pool)
    claim = await work(ledger)
    with pytest.raises(asyncpg.InFailedSQLTransactionError) as caught:
        await ledger.settle_with_effect(claim, hide)
    taken = await ledger.settle([retried(claim, ERROR, 0.0)])

    assert "after a statement of its transaction had failed" in str(caught.value.__notes__)
    assert set(taken) == {claim.id}
    assert effects(table) == []


async def test_sql_error_in_a_savepoint_rolls_back_only_that(
    pool: PostgresDatabase, table: Database
) -> None:
    """A task that continues after an error needs a savepoint."""

    async def hide(connection: Any) -> bytes:
        await connection.execute("insert into effects values (1)")
        with contextlib.suppress(asyncpg.UniqueViolationError):
            async with connection.transaction():
                await connection.execute("insert into effects values (1)")
        return b"1"

    ledger = PostgresJobLedger(pool)

    assert await ledger.settle_with_effect(await work(ledger), hide)
    assert effects(table) == [1]


@pytest.mark.parametrize("statement", ["commit", "rollback"])
async def test_effect_must_not_end_the_transaction(
    pool: PostgresDatabase, table: Database, statement: str
) -> None:
    """The job is not completed."""

    async def end(connection: Any) -> bytes:
        await connection.execute(statement)
        return b"1"

    ledger = PostgresJobLedger(pool)
    claim = await work(ledger)
    with pytest.raises(RuntimeError, match="ended the transaction"):
        await ledger.settle_with_effect(claim, end)
    job = await ledger.get(claim.id)

    assert job is not None
    assert job.state is JobState.ACTIVE
    assert (await ledger.counts())["default"].completed == 1
    assert effects(table) == []


async def test_an_effect_must_not_leave_a_statement_behind(
    pool: PostgresDatabase, table: Database
) -> None:
    """It is the task's error, and no outage after which the job would run again."""
    helpers: list[asyncio.Task[Any]] = []

    async def effect(connection: Any) -> bytes:
        await connection.execute("insert into effects values (1)")
        helpers.append(asyncio.create_task(connection.execute("select pg_sleep(60)")))
        await asyncio.sleep(0)
        return b"1"

    ledger = PostgresJobLedger(pool)
    with pytest.raises(RuntimeError, match="left behind uses its connection"):
        await ledger.settle_with_effect(await work(ledger), effect)
    await asyncio.wait(helpers)

    assert helpers[0].exception() is not None
    assert effects(table) == []
    assert (await ledger.counts())["default"].active == 1


async def test_error_of_an_effect_is_raised(pool: PostgresDatabase) -> None:
    """Also errors of the same types as those of the database and the network."""
    ledger = PostgresJobLedger(pool)
    claim = await work(ledger)
    for error in (asyncpg.UniqueViolationError("x"), ConnectionResetError("x"), TimeoutError("x")):

        async def fail(_: Any, error: Exception = error) -> bytes:
            raise error

        with pytest.raises(type(error)) as caught:
            await ledger.settle_with_effect(claim, fail)
        assert caught.value is error


async def test_lost_connection_of_an_effect_is_an_outage(
    pool: PostgresDatabase, table: Database
) -> None:
    """It is not a failure of the task and costs no attempt."""

    async def lose(connection: Any) -> bytes:
        await connection.execute("insert into effects values (1)")
        pid = connection.get_server_pid()
        await asyncio.to_thread(table.execute, f"select pg_terminate_backend({pid})")
        await connection.execute("select 1")
        return b"1"

    ledger = PostgresJobLedger(pool)
    claim = await work(ledger)
    with pytest.raises(LedgerUnavailableError):
        await ledger.settle_with_effect(claim, lose)

    assert await ledger.settle_with_effect(claim, Effect(2))
    assert effects(table) == [2]


@pytest.mark.parametrize("result", [b"nonsense", b"\xff", b'"\x00"', b""])
async def test_result_without_json_rolls_the_effect_back(
    pool: PostgresDatabase, table: Database, result: bytes
) -> None:
    """The ledger raises its own error; only this job fails."""

    async def effect(connection: Any) -> bytes:
        await connection.execute("insert into effects values (1)")
        return result

    ledger = PostgresJobLedger(pool)
    claim = await work(ledger)
    with pytest.raises(ResultError):
        await ledger.settle_with_effect(claim, effect)

    assert effects(table) == []
    assert await ledger.settle_with_effect(claim, Effect())


@pytest.mark.parametrize(
    ("statement", "sqlstate"),
    [("raise exception 'no'", "P0001"), ("perform 1/0", "22012"), ("perform nothing()", "42883")],
)
async def test_a_refused_completion_rolls_the_effect_back(
    pool: PostgresDatabase, table: Database, statement: str, sqlstate: str
) -> None:
    """A trigger of the user's refuses it; the job can be settled otherwise."""
    table.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin"
        f" if new.result is not null then {statement}; end if; return new; end $$"
    )
    ledger = PostgresJobLedger(pool)
    claim = await work(ledger)
    table.execute(
        "create trigger refuses before insert on viralfx_finished_jobs"
        " for each row execute function refuse()"
    )
    with pytest.raises(ResultError, match=f"cannot be stored: .*SQLSTATE {sqlstate}"):
        await ledger.settle_with_effect(claim, Effect())

    assert effects(table) == []
    assert await ledger.settle([failed(claim, ERROR)]) == {claim.id}


async def test_a_constraint_that_refuses_the_effect_at_commit_is_the_tasks_error(
    pool: PostgresDatabase, table: Database
) -> None:
    """The ledger is available: another attempt at once would fail in the same way."""
    table.execute(
        "alter table effects add parent int references effects deferrable initially deferred"
    )

    async def orphan(connection: Any) -> bytes:
        await connection.execute("insert into effects values (1, 2)")
        return b"1"

    ledger = PostgresJobLedger(pool)
    claim = await work(ledger)
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await ledger.settle_with_effect(claim, orphan)

    assert effects(table) == []
    assert await ledger.settle_with_effect(claim, Effect())


# -- COMMIT without an answer ----------------------------------------------------------------


def close_the_gate(database: Database) -> None:
    """Let each COMMIT of an effect wait for the advisory lock 4711."""
    database.execute("create table seen (setting text)")
    database.execute(
        "create function wait() returns trigger language plpgsql as $$ begin"
        " insert into seen values (current_setting('idle_in_transaction_session_timeout'));"
        " perform pg_advisory_xact_lock(4711); return null; end $$"
    )
    database.execute(
        "create constraint trigger waits after insert on effects deferrable initially deferred"
        " for each row execute function wait()"
    )


def waiting(database: Database, event: str) -> list[int]:
    """Return the server's processes that wait for a kind of lock."""
    rows = database.execute(
        f"select pid from pg_stat_activity where wait_event = '{event}'"  # noqa: S608 - of this test
        " and datname = current_database()"
    )
    return [pid for (pid,) in rows]


@pytest.mark.parametrize("applied", [True, False])
async def test_commit_without_a_response_is_looked_up(
    table: Database, fault_proxy: FaultProxies, *, applied: bool
) -> None:
    """After the decision: the query waits for the lock on the job's row."""
    proxy = fault_proxy(table.server.port)
    close_the_gate(table)
    effect = Effect()
    async with (
        ledger_in(table, through=proxy) as ledger,
        opened(config_of(table)) as beside,
        beside.acquire() as gate,
        asyncio.timeout(30),
    ):
        claim = await work(ledger)
        await gate.execute("select pg_advisory_lock(4711)")
        settling = asyncio.create_task(ledger.settle_with_effect(claim, effect))
        (pid,) = await eventually(lambda: waiting(table, "advisory"))
        proxy.mode = RESET
        proxy.mode = PASS
        assert await eventually(lambda: waiting(table, "transactionid"))
        if applied:
            await gate.execute("select pg_advisory_unlock(4711)")
            assert await settling
        else:
            table.execute(f"select pg_terminate_backend({pid})")
            with pytest.raises(LedgerUnavailableError):
                await settling
            assert effects(table) == []
            await gate.execute("select pg_advisory_unlock(4711)")
            assert await ledger.settle_with_effect(claim, effect)
        assert not await ledger.settle_with_effect(claim, effect)
        assert (await ledger.counts())["default"].completed == 2

    assert effect.runs == (1 if applied else 2)
    assert effects(table) == [1]


async def test_an_effect_with_one_snapshot_completes_beside_reports(
    table: Database,
) -> None:
    """Also if a default of the database makes the transaction fail after a change of its row."""
    (name,) = table.execute("select current_database()")[0]
    isolation = "default_transaction_isolation = 'serializable'"
    table.execute(f'alter database "{name}" set {isolation}')
    progress = b'{"current": 1, "total": 2, "message": null}'
    async with ledger_in(table) as ledger, asyncio.timeout(30):
        claim = await work(ledger)
        report = ProgressReport(claim=claim, progress=progress)

        async def effect(connection: Any) -> bytes:
            (level,) = await connection.fetchrow("show transaction_isolation")
            await ledger.report([report])
            return f'"{level}"'.encode()

        assert await ledger.settle_with_effect(claim, effect, lambda: progress)
        job = await ledger.get(claim.id)

    assert job is not None
    assert (job.state, job.result) == (JobState.COMPLETED, b'"serializable"')
    assert job.progress == progress


@pytest.mark.parametrize("owner", ["role", "database"])
async def test_an_effect_has_the_search_path_of_its_role(table: Database, owner: str) -> None:
    """Statements of the ledger name their schema, so the tables of an application are found."""
    (names,) = table.execute("select current_database(), current_user")
    database, role = names
    of = (
        f'database "{database}"'
        if owner == "database"
        else f'role "{role}" in database "{database}"'
    )
    table.execute(f'alter {of} set search_path = planted, "$user", public')

    async def effect(connection: Any) -> bytes:
        path = await connection.fetchval("show search_path")
        return json.dumps(path).encode()

    async with ledger_in(table) as ledger:
        claim = await work(ledger)
        assert await ledger.settle_with_effect(claim, effect)
        job = await ledger.get(claim.id)

    assert job is not None
    assert json.loads(job.result or b"") == 'planted, "$user", public'


async def test_client_lost_before_commit_locks_the_row_for_seconds(
    pool: PostgresDatabase, table: Database
) -> None:
    """The server ends its session; the limit does not apply to the next user of a connection."""
    close_the_gate(table)
    ledger = PostgresJobLedger(pool)
    assert await ledger.settle_with_effect(await work(ledger), Effect())
    async with pool.acquire() as connection:
        after = await connection.fetchval("show idle_in_transaction_session_timeout")

    assert table.execute("select setting from seen") == [("10s",)]
    assert after == "0"


async def eventually(query: Any) -> list[int]:
    """Repeat a query until it returns rows."""
    found: list[int] = []

    def found_some() -> bool:
        found[:] = query()
        return bool(found)

    await until(found_some)
    return found
