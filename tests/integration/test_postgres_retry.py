"""``execute_with_retry`` on a real server: what is tried again, and what must not be."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import asyncpg
import pytest
from tests.integration.postgres_clients import config_of, opened, until
from tests.servers.fault_proxy import BLACKHOLE, PASS, RESET, CutAfter
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.unit.resilience.scripted import SkippingClock

from viralfx.adapters.postgres import PoolTimeoutError
from viralfx.adapters.postgres.cleaning import Lease

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
    """An operation that adds one row, with something that happens at the end of an attempt."""

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
    """End a session; return when its process is gone."""
    database.execute(f"select pg_terminate_backend({pid})")
    running = f"select 1 from pg_stat_activity where pid = {pid}"  # noqa: S608 - a number
    wait_until(lambda: not database.execute(running))


async def lose(database: Database, connection: Lease) -> None:
    """End a session; return when the driver knows."""
    lost = asyncio.Event()
    connection.add_termination_listener(lambda _: lost.set())
    await asyncio.to_thread(kill, database, connection.get_server_pid())
    await lost.wait()


async def conflict(_: Lease) -> None:
    """Raise what two transactions that meet raise."""
    raise asyncpg.SerializationError("could not serialize access")


async def test_the_result_is_that_of_the_operation(rows: Database) -> None:
    """Without an error there is one attempt, and it is committed."""
    insertion = Insertion()
    async with opened(config_of(rows)) as pool:
        assert await pool.execute_with_retry(insertion) == 1

    assert numbers(rows) == [1, 2, 3]


async def test_a_serialization_failure_is_tried_again(rows: Database) -> None:
    """What another transaction changed meanwhile is seen by the next attempt."""
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


async def test_a_deadlock_is_tried_again(rows: Database) -> None:
    """Of two that wait for each other one is chosen to lose, and then both have worked."""
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


async def test_an_error_of_the_operation_is_not(rows: Database) -> None:
    """A violated constraint would be violated again; nothing is left of the attempt."""
    insertion = Insertion(number=1)
    async with opened(config_of(rows)) as pool:
        with pytest.raises(asyncpg.UniqueViolationError):
            await pool.execute_with_retry(insertion)
        assert pool.in_use == 0

    assert insertion.attempts == 1
    assert numbers(rows) == [1, 2]


async def test_nor_is_a_pool_that_has_none_left(rows: Database) -> None:
    """Who waited so long must not stand in the queue again."""
    clock = SkippingClock()
    config = config_of(rows, pool_max=1, pool_timeout=0.05)
    async with opened(config, clock=clock) as pool, pool.acquire():
        with pytest.raises(PoolTimeoutError):
            await pool.execute_with_retry(Insertion())

    assert clock.slept == []


@pytest.mark.parametrize("allowed", [1, 3, 4])
async def test_attempts_are_counted_and_waits_are_the_clocks(rows: Database, allowed: int) -> None:
    """As many as allowed, at random moments that come later each time; then the last error."""
    clock, insertion = SkippingClock(), Insertion(*[conflict] * 10)
    async with opened(config_of(rows), clock=clock) as pool:
        with pytest.raises(asyncpg.SerializationError):
            await pool.execute_with_retry(insertion, attempts=allowed)

    assert insertion.attempts == allowed
    assert len(clock.slept) == allowed - 1
    assert all(0 <= wait <= 0.1 * 2**number for number, wait in enumerate(clock.slept))
    assert numbers(rows) == [1, 2]


async def test_a_connection_lost_before_commit_is_tried_again(rows: Database) -> None:
    """During a statement, and when its loss is noticed after the last one: nothing was sent."""

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


async def test_a_connection_lost_in_between_is_no_mistake_of_the_callers(rows: Database) -> None:
    """The driver speaks of a connection that was given back; the next statement finds it gone."""

    async def between(connection: Lease) -> None:
        await lose(rows, connection)
        await connection.execute("select 1")

    async with opened(config_of(rows), clock=SkippingClock()) as pool:
        assert await pool.execute_with_retry(Insertion(between)) == 2

    assert numbers(rows) == [1, 2, 3]


@pytest.mark.parametrize("applied", [True, False])
async def test_a_commit_without_an_answer_is_not_tried_again(
    rows: Database, fault_proxy: FaultProxies, *, applied: bool
) -> None:
    """Nobody knows whether it took effect: here it did, and there it did not."""
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


async def test_unless_the_operation_is_idempotent(
    rows: Database, fault_proxy: FaultProxies
) -> None:
    """Whoever says that it may happen twice gets it done."""
    proxy = fault_proxy(rows.server.port)

    async def cut(_: Lease) -> None:
        proxy.mode = CutAfter(0)
        asyncio.get_running_loop().call_later(0.1, setattr, proxy, "mode", PASS)

    insertion = Insertion(cut, upsert=True)
    async with opened(config_of(rows, through=proxy)) as pool:
        assert await pool.execute_with_retry(insertion, attempts=10, idempotent=True) == 2

    assert numbers(rows) == [1, 2, 3]


async def test_a_commit_that_the_server_refuses_is_no_riddle(rows: Database) -> None:
    """A constraint that is looked at only then: an error of the operation, and nothing is left."""
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


async def test_an_error_that_the_operation_hides_is_told(rows: Database) -> None:
    """To Postgres the transaction is over with it, and COMMIT does nothing."""

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


async def test_a_wait_can_be_cancelled(rows: Database) -> None:
    """Between two attempts as well."""

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
