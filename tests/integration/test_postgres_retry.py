"""``execute_with_retry`` on a real server: which errors are retried."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import asyncpg
import pytest
from tests.integration.postgres_clients import config_of, opened
from tests.servers.fault_proxy import BLACKHOLE, PASS, RESET, CutAfter
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database
from tests.servers.waiting import until, wait_until
from tests.unit.resilience.scripted import SkippingClock

from viralfx.postgres import PoolTimeoutError
from viralfx.postgres.database import Lease

Fault = Callable[[], None]


@pytest.fixture
def rows(database: Database) -> Database:
    """Return a database with a table of numbers, each once."""
    database.execute("create table rows (number int primary key, hits int not null default 0)")
    database.execute("insert into rows values (1), (2)")
    return database


def numbers(database: Database) -> list[int]:
    """Return what is in the table."""
    return [number for (number,) in database.execute("select number from rows order by 1")]


class Insertion:
    """An operation that adds one row and calls a hook at the end of an attempt."""

    def __init__(
        self,
        *at_the_end: Callable[[Lease], Awaitable[object]],
        number: int = 3,
        upsert: bool = False,
    ) -> None:
        self.attempts = 0
        self._at_the_end = at_the_end
        self._number = number
        self._conflict = "on conflict do nothing" if upsert else ""

    async def __call__(self, connection: Lease) -> int:
        """Return the number of the attempt."""
        self.attempts += 1
        await connection.execute(
            f"insert into rows values ($1) {self._conflict}",  # noqa: S608 - of this class
            self._number,
        )
        if self.attempts <= len(self._at_the_end):
            await self._at_the_end[self.attempts - 1](connection)
        return self.attempts


def kill(database: Database, pid: int) -> None:
    """End a session; return when its process has exited."""
    database.execute(f"select pg_terminate_backend({pid})")
    running = f"select 1 from pg_stat_activity where pid = {pid}"  # noqa: S608 - a number
    wait_until(lambda: not database.execute(running))


async def lose(database: Database, connection: Lease) -> None:
    """End a session; return when the driver has noticed."""
    lost = asyncio.Event()
    connection.add_termination_listener(lambda _: lost.set())
    await asyncio.to_thread(kill, database, connection.get_server_pid())
    await lost.wait()


async def conflict(_: Lease) -> None:
    """Raise a serialization error."""
    raise asyncpg.SerializationError("could not serialize access")


async def test_result_of_the_operation_is_returned(rows: Database) -> None:
    """Without an error there is one attempt, which is committed."""
    insertion = Insertion()
    async with opened(config_of(rows)) as pool:
        assert await pool.execute_with_retry(insertion) == 1

    assert numbers(rows) == [1, 2, 3]


@pytest.mark.each_python
async def test_serialization_failure_is_retried(rows: Database) -> None:
    """The next attempt sees the changes of the other transaction."""
    attempts = 0

    async def count(connection: Lease) -> int:
        nonlocal attempts
        attempts += 1
        await connection.execute("set transaction isolation level repeatable read")
        hits: int = await connection.fetchval("select hits from rows where number = 1")
        if attempts == 1:
            rows.execute("update rows set hits = hits + 10 where number = 1")
        await connection.execute("update rows set hits = $1 where number = 1", hits + 1)
        return hits

    async with opened(config_of(rows)) as pool:
        assert await pool.execute_with_retry(count) == 10

    assert attempts == 2
    assert rows.execute("select hits from rows where number = 1") == [(11,)]


async def test_the_transaction_has_the_given_options(rows: Database) -> None:
    """Its isolation level, and whether it may write."""

    async def options(connection: Lease) -> tuple[str, str]:
        level = await connection.fetchval("show transaction_isolation")
        return level, await connection.fetchval("show transaction_read_only")

    async with opened(config_of(rows)) as pool:
        seen = await pool.execute_with_retry(options, isolation="serializable", readonly=True)
        usual = await pool.execute_with_retry(options)

    assert (seen, usual) == (("serializable", "on"), ("read committed", "off"))


async def test_deadlock_is_retried(rows: Database) -> None:
    """Postgres aborts one of the transactions; in the end both have succeeded."""
    both_began, attempts = asyncio.Barrier(2), []

    async def count(first: int, second: int, connection: Lease) -> None:
        attempts.append(first)
        await connection.execute("set local deadlock_timeout = '10ms'")
        await connection.execute("update rows set hits = hits + 1 where number = $1", first)
        if len(attempts) <= 2:
            await both_began.wait()
        await connection.execute("update rows set hits = hits + 1 where number = $1", second)

    async with opened(config_of(rows)) as pool, asyncio.TaskGroup() as group:
        for first, second in ((1, 2), (2, 1)):
            group.create_task(pool.execute_with_retry(partial(count, first, second)))

    assert len(attempts) == 3
    assert rows.execute("select hits from rows") == [(2,), (2,)]


async def test_constraint_violation_is_not_retried(rows: Database) -> None:
    """It would be violated again; the attempt is rolled back."""
    insertion = Insertion(number=1)
    async with opened(config_of(rows)) as pool:
        with pytest.raises(asyncpg.UniqueViolationError):
            await pool.execute_with_retry(insertion)
        assert pool.in_use == 0

    assert insertion.attempts == 1
    assert numbers(rows) == [1, 2]


async def test_pool_timeout_is_not_retried(rows: Database) -> None:
    """A retry would wait in the same queue again."""
    clock = SkippingClock()
    config = config_of(rows, pool_max=1, pool_timeout=0.05)
    async with opened(config, clock=clock) as pool, pool.acquire():
        with pytest.raises(PoolTimeoutError):
            await pool.execute_with_retry(Insertion())

    assert clock.slept == []


@pytest.mark.parametrize("allowed", [1, 3, 4])
async def test_attempts_and_waits_follow_the_policy(rows: Database, allowed: int) -> None:
    """As many attempts as allowed, with growing random waits; then the last error."""
    clock, insertion = SkippingClock(), Insertion(*[conflict] * 10)
    async with opened(config_of(rows), clock=clock) as pool:
        with pytest.raises(asyncpg.SerializationError):
            await pool.execute_with_retry(insertion, attempts=allowed)

    assert insertion.attempts == allowed
    assert len(clock.slept) == allowed - 1
    assert all(0 <= wait <= 0.1 * 2**number for number, wait in enumerate(clock.slept))
    assert numbers(rows) == [1, 2]


async def test_connection_lost_before_commit_is_retried(rows: Database) -> None:
    """During a statement, or after the last one: COMMIT was not sent."""

    async def during(connection: Lease) -> None:
        sleeping = asyncio.ensure_future(connection.execute("select pg_sleep(60)"))
        await asyncio.to_thread(kill, rows, connection.get_server_pid())
        await sleeping

    async def after(connection: Lease) -> None:
        await lose(rows, connection)

    insertion = Insertion(during, after)
    async with opened(config_of(rows), clock=SkippingClock()) as pool:
        assert await pool.execute_with_retry(insertion) == 3

    assert numbers(rows) == [1, 2, 3]


async def test_connection_lost_between_statements_is_retried(rows: Database) -> None:
    """The driver reports it as a released connection at the next statement."""

    async def between(connection: Lease) -> None:
        await lose(rows, connection)
        await connection.execute("select 1")

    async with opened(config_of(rows), clock=SkippingClock()) as pool:
        assert await pool.execute_with_retry(Insertion(between)) == 2

    assert numbers(rows) == [1, 2, 3]


async def test_error_of_another_service_stays_after_a_lost_connection(rows: Database) -> None:
    """It is raised as it is, and judged by itself: a missing file is no reason to repeat."""

    async def fail(connection: Lease) -> None:
        await lose(rows, connection)
        raise FileNotFoundError("planted")

    insertion = Insertion(fail, conflict)
    async with opened(config_of(rows)) as pool:
        with pytest.raises(FileNotFoundError, match="planted"):
            await pool.execute_with_retry(insertion)

    assert insertion.attempts == 1
    assert numbers(rows) == [1, 2]


@pytest.mark.parametrize("applied", [True, False])
async def test_commit_without_a_response_is_not_retried(
    rows: Database, fault_proxy: FaultProxies, *, applied: bool
) -> None:
    """It may have taken effect: in one case here it did, in the other it did not."""
    proxy = fault_proxy(rows.server.port)

    async def cut(_: Lease) -> None:
        if applied:
            proxy.mode = CutAfter(0)  # the answer
        else:
            proxy.mode = BLACKHOLE  # the question
            asyncio.get_running_loop().call_later(0.05, setattr, proxy, "mode", RESET)

    insertion = Insertion(cut)
    async with opened(config_of(rows, through=proxy)) as pool:
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)) as caught:
            await pool.execute_with_retry(insertion)

    assert caught.value.maybe_applied  # type: ignore[attr-defined]
    assert insertion.attempts == 1
    await until(lambda: numbers(rows) == ([1, 2, 3] if applied else [1, 2]))


async def test_idempotent_commit_without_a_response_is_retried(
    rows: Database, fault_proxy: FaultProxies
) -> None:
    """The caller declares that a repetition is harmless."""
    proxy = fault_proxy(rows.server.port)

    async def cut(_: Lease) -> None:
        proxy.mode = CutAfter(0)
        asyncio.get_running_loop().call_later(0.1, setattr, proxy, "mode", PASS)

    insertion = Insertion(cut, upsert=True)
    async with opened(config_of(rows, through=proxy)) as pool:
        assert await pool.execute_with_retry(insertion, attempts=10, idempotent=True) == 2

    assert numbers(rows) == [1, 2, 3]


async def test_refused_commit_is_rolled_back(rows: Database) -> None:
    """A deferred constraint is an error of the operation, and nothing is left."""
    rows.execute(
        "create table parts (id int, number int references rows deferrable initially deferred)"
    )
    async with opened(config_of(rows)) as pool:
        with pytest.raises(asyncpg.ForeignKeyViolationError) as caught:
            await pool.execute_with_retry(
                lambda connection: connection.execute("insert into parts values (1, 99)")
            )

    assert not hasattr(caught.value, "maybe_applied")
    assert rows.execute("select count(*) from parts") == [(0,)]


async def test_swallowed_statement_error_fails_the_transaction(rows: Database) -> None:
    """Postgres has aborted the transaction, so COMMIT would do nothing."""

    async def hide(connection: Lease) -> None:
        await connection.execute("insert into rows values (3)")
        with contextlib.suppress(asyncpg.UniqueViolationError):
            await connection.execute("insert into rows values (1)")

    async def hide_apart(connection: Lease) -> None:
        await connection.execute("insert into rows values (4)")
        with contextlib.suppress(asyncpg.UniqueViolationError):
            async with connection.transaction():
                await connection.execute("insert into rows values (1)")

    async with opened(config_of(rows)) as pool:
        with pytest.raises(asyncpg.InFailedSQLTransactionError) as caught:
            await pool.execute_with_retry(hide)
        await pool.execute_with_retry(hide_apart)

    assert not hasattr(caught.value, "maybe_applied")
    assert numbers(rows) == [1, 2, 4]


async def test_wait_between_attempts_can_be_cancelled(rows: Database) -> None:
    """Cancellation ends the call."""

    class Endless(SkippingClock):
        async def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)
            await asyncio.Event().wait()

    clock = Endless()
    async with opened(config_of(rows), clock=clock) as pool:
        task = asyncio.create_task(pool.execute_with_retry(Insertion(*[conflict] * 10)))
        await until(lambda: clock.slept)
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait({task})
        assert task.cancelled()
        assert pool.in_use == 0
