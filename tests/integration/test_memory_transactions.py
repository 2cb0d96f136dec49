"""Jobs in memory that are submitted in transactions of a database, by each kind of connection."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import asyncpg
import psycopg
import pytest
from litestar import Litestar
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from tests.servers.postgres import Database
from tests.servers.waiting import until

from viralfx import (
    JobNotFoundError,
    JobState,
    LedgerUnavailableError,
    OperationsConfig,
    OperationsPlugin,
    Settings,
    TransactionError,
    task,
)
from viralfx.settings import read_settings

INSERT = "INSERT INTO orders VALUES ({})"
TABLE = "CREATE TABLE orders (number int UNIQUE DEFERRABLE INITIALLY DEFERRED)"


@task("orders.ship")
async def ship(order: int) -> int:
    """Return the order."""
    return order


@dataclass(frozen=True)
class Shop:
    """A started application with jobs in memory, and a database."""

    plugin: OperationsPlugin
    database: Database
    engine: AsyncEngine

    async def submit(self, order: int, connection: Any) -> str:
        """Submit a job, which does not exist yet; return its id."""
        accepted = await self.plugin.jobs.submit("orders.ship", order, connection=connection)
        assert accepted.created
        with pytest.raises(JobNotFoundError):
            await self.plugin.jobs.get(accepted.job.id)
        return accepted.job.id

    async def exists(self, job_id: str) -> bool:
        """Return whether a job exists at this moment."""
        try:
            await self.plugin.jobs.get(job_id)
        except JobNotFoundError:
            return False
        return True

    def orders(self) -> list[int]:
        """Return the orders that were committed."""
        return [number for (number,) in self.database.execute("SELECT * FROM orders ORDER BY 1")]

    async def shipped(self) -> list[int]:
        """Return the orders of the jobs, once all of them have run."""
        found = (await self.plugin.jobs.search()).jobs
        jobs = [await self.plugin.jobs.wait(job.id, timeout=20) for job in found]
        assert all(job.state is JobState.COMPLETED for job in jobs)
        return sorted(int(job.payload) for job in jobs)


def created(settings: Settings | None = None) -> OperationsPlugin:
    """Return a plugin with jobs in memory."""
    return OperationsPlugin(OperationsConfig(settings=settings or Settings(), tasks=[ship]))


@pytest.fixture
async def shop(database: Database) -> AsyncIterator[Shop]:
    """Return an empty shop, whose worker runs."""
    database.execute(TABLE)
    plugin = created()
    engine = create_async_engine(database.url.replace("postgresql:", "postgresql+asyncpg:"))
    started, ends = asyncio.Event(), asyncio.Event()

    async def live() -> None:  # one task enters the lifespan and leaves it
        async with Litestar(plugins=[plugin], logging_config=None).lifespan():
            started.set()
            await ends.wait()

    living = asyncio.create_task(live())
    await started.wait()
    yield Shop(plugin, database, engine)
    await engine.dispose()
    ends.set()
    await living


Place = Callable[[int], Awaitable[str]]
"""Writes an order and submits its job; commits an even one, and rolls back an odd one."""


def kept(number: int) -> bool:
    """Return True if the transaction of an order is committed."""
    return number % 2 == 0


@asynccontextmanager
async def by_asyncpg(shop: Shop) -> AsyncIterator[Place]:
    """On a connection of asyncpg, in a block that an error may end."""
    connection = await asyncpg.connect(shop.database.url)

    async def place(number: int) -> str:
        with suppress(LookupError):
            async with connection.transaction():
                await connection.execute(INSERT.format(number))
                job_id = await shop.submit(number, connection)
                end(number)
        return job_id

    def end(number: int) -> None:
        if not kept(number):
            raise LookupError

    yield place
    driver: Any = connection
    assert not driver._query_loggers
    await connection.close()


@asynccontextmanager
async def by_pool(shop: Shop) -> AsyncIterator[Place]:
    """On a connection of a pool of asyncpg, which is released at once, begun by hand."""
    async with asyncpg.create_pool(shop.database.url, min_size=1, max_size=1) as pool:

        async def place(number: int) -> str:
            async with pool.acquire() as connection:
                await connection.execute("begin work")
                await connection.execute(INSERT.format(number))
                job_id = await shop.submit(number, connection)
                await connection.execute("select 1; commit" if kept(number) else "ROLLBACK work")
            return job_id

        yield place


@asynccontextmanager
async def by_savepoint(shop: Shop) -> AsyncIterator[Place]:
    """In a savepoint of asyncpg, within a transaction that commits."""
    connection = await asyncpg.connect(shop.database.url)

    async def place(number: int) -> str:
        async with connection.transaction():
            savepoint = connection.transaction()
            await savepoint.start()
            await connection.execute(INSERT.format(number))
            job_id = await shop.submit(number, connection)
            await (savepoint.commit() if kept(number) else savepoint.rollback())
        return job_id

    yield place
    await connection.close()


@asynccontextmanager
async def by_session(shop: Shop) -> AsyncIterator[Place]:
    """In a session whose first statement comes after the job."""

    async def place(number: int) -> str:
        async with AsyncSession(shop.engine) as session:
            job_id = await shop.submit(number, session)
            await session.execute(text(INSERT.format(number)))
            await (session.commit() if kept(number) else session.rollback())
        return job_id

    yield place


@asynccontextmanager
async def by_scoped_session(shop: Shop) -> AsyncIterator[Place]:
    """In the session of the current task, which is closed instead of rolled back."""
    scoped = async_scoped_session(async_sessionmaker(shop.engine), asyncio.current_task)

    async def place(number: int) -> str:
        job_id = await shop.submit(number, scoped)
        await scoped.execute(text(INSERT.format(number)))
        if kept(number):
            await scoped.commit()
        await scoped.remove()
        return job_id

    yield place


@asynccontextmanager
async def by_connection(shop: Shop) -> AsyncIterator[Place]:
    """On a connection of SQLAlchemy, also in a block that commits and closes it."""

    async def place(number: int) -> str:
        if number % 4 == 0:
            async with shop.engine.begin() as connection:
                await connection.execute(text(INSERT.format(number)))
                return await shop.submit(number, connection)
        async with shop.engine.connect() as connection:
            job_id = await shop.submit(number, connection)
            await connection.execute(text(INSERT.format(number)))
            if kept(number):
                await connection.commit()
        return job_id

    yield place


@asynccontextmanager
async def by_thread(shop: Shop) -> AsyncIterator[Place]:
    """In a thread with a synchronous session or connection, which submits on a loop of its own."""
    engine = create_engine("sqlite://", poolclass=NullPool)

    def place_here(number: int) -> str:
        with Session(engine) if number % 4 < 2 else engine.connect() as given:
            submitting = shop.plugin.jobs.submit("orders.ship", number, connection=given)
            job_id = asyncio.run(job_id_of(submitting))
            if kept(number):
                shop.database.execute(INSERT.format(number))  # stands for that of the session
                given.commit()
        return job_id

    async def place(number: int) -> str:
        return await asyncio.to_thread(place_here, number)

    yield place
    engine.dispose()


@asynccontextmanager
async def by_blocking_call(shop: Shop) -> AsyncIterator[Place]:
    """In a thread with a synchronous session or connection, and without an event loop."""
    engine = create_engine("sqlite://", poolclass=NullPool)

    def place_here(number: int) -> str:
        with Session(engine) if number % 4 < 2 else engine.connect() as given:
            accepted = shop.plugin.jobs.submit_sync("orders.ship", number, connection=given)
            if kept(number):
                shop.database.execute(INSERT.format(number))  # stands for that of the session
                given.commit()
        return accepted.job.id

    async def place(number: int) -> str:
        return await asyncio.to_thread(place_here, number)

    yield place
    engine.dispose()


async def job_id_of(submitting: Awaitable[Any]) -> str:
    """Return the id of the job."""
    accepted = await submitting
    job_id: str = accepted.job.id
    return job_id


WAYS: dict[str, Callable[[Shop], AbstractAsyncContextManager[Place]]] = {
    way.__name__.removeprefix("by_"): way
    for way in (
        by_asyncpg,
        by_pool,
        by_savepoint,
        by_session,
        by_scoped_session,
        by_connection,
        by_thread,
        by_blocking_call,
    )
}


@pytest.mark.parametrize("way", list(WAYS))
async def test_a_job_exists_if_and_only_if_its_transaction_commits(shop: Shop, way: str) -> None:
    """From the commit on, and it runs then."""
    async with WAYS[way](shop) as place:
        for number in range(8):
            job_id = await place(number)
            assert await shop.exists(job_id) == kept(number)

    assert await shop.shipped() == shop.orders() == [0, 2, 4, 6]


async def test_savepoints_of_asyncpg_keep_earlier_jobs(shop: Shop) -> None:
    """A rollback takes the jobs back that came after its savepoint."""
    connection = await asyncpg.connect(shop.database.url)
    async with connection.transaction():
        await shop.submit(1, connection)
        async with connection.transaction():
            await shop.submit(2, connection)
        lost = connection.transaction()
        await lost.start()
        await shop.submit(3, connection)
        async with connection.transaction():
            await shop.submit(4, connection)
        await lost.rollback()
        await connection.execute("SAVEPOINT mine")
        await shop.submit(5, connection)
        await connection.execute("RELEASE mine; SELECT 'commit'")
    await connection.close()

    assert await shop.shipped() == [1, 2, 5]


@pytest.mark.parametrize("way", ["asyncpg", "session", "connection", "block"])
async def test_a_commit_that_fails_leaves_no_job(shop: Shop, way: str) -> None:
    """Such as one with a constraint that is checked then."""
    shop.database.execute(INSERT.format(7))
    submitted: list[str] = []

    async def place(connection: Any, statement: Any) -> None:
        await connection.execute(statement)
        submitted.append(await shop.submit(7, connection))

    async def place_twice(stack: AsyncExitStack) -> None:
        if way == "asyncpg":
            connection = await asyncpg.connect(shop.database.url)
            stack.push_async_callback(connection.close)
            async with connection.transaction():
                await place(connection, INSERT.format(7))
        elif way == "block":
            async with shop.engine.begin() as given:
                await place(given, text(INSERT.format(7)))
        else:
            made = AsyncSession(shop.engine) if way == "session" else shop.engine.connect()
            session: Any = await stack.enter_async_context(made)
            await place(session, text(INSERT.format(7)))
            await session.commit()

    async with AsyncExitStack() as stack:
        with pytest.raises((asyncpg.UniqueViolationError, DBAPIError)):
            await place_twice(stack)
        assert len(submitted) == 1
        assert not await shop.exists(submitted[0])

    assert await shop.shipped() == []


async def test_a_commit_after_an_error_is_a_rollback(shop: Shop) -> None:
    """As the server does, unless a savepoint has undone the error."""
    connection = await asyncpg.connect(shop.database.url)
    for undone in (False, True):
        await connection.execute("BEGIN")
        await connection.execute("SAVEPOINT before")
        lost = await shop.submit(1, connection)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute("SELECT 1 / 0")
        if undone:
            await connection.execute("ROLLBACK TO SAVEPOINT before")
            await shop.submit(2, connection)
        await connection.execute("COMMIT")
        assert not await shop.exists(lost)
    # An argument that the driver refuses does not reach the server.
    async with connection.transaction():
        with pytest.raises(asyncpg.DataError):
            await connection.fetch("SELECT $1::int", "text")
        last = await shop.submit(3, connection)
    assert await shop.exists(last)
    await connection.close()

    assert await shop.shipped() == [2, 3]


async def test_a_connection_that_is_lost_leaves_no_job(shop: Shop) -> None:
    """Nor does a session that is dropped, and neither is kept."""
    memory = shop.plugin.assembly.jobs.memory
    assert memory is not None
    kept = memory.transactions
    connection = await asyncpg.connect(shop.database.url)
    await connection.execute("BEGIN")
    lost = await shop.submit(1, connection)
    connection.terminate()
    assert not await shop.exists(lost)
    engine = create_engine("sqlite://")
    session = Session(engine)
    for number in range(2):
        await shop.submit(number, session)
        session.begin_nested()
        session.rollback()
        session.begin_nested()
    del connection, session
    await until(lambda: gc.collect() >= 0 and not (kept.of_asyncpg or kept._sqlalchemy))
    engine.dispose()

    assert await shop.shipped() == []


async def test_no_job_runs_while_its_commit_is_under_way(shop: Shop) -> None:
    """The event of a connection comes before the commit."""
    engine = create_engine("sqlite://", connect_args={"check_same_thread": False})
    begun, go_on = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        begun.set()
        go_on.wait(20)

    def commit(connection: Connection) -> None:
        event.listen(connection, "commit", wait)  # after that of the ledger
        connection.commit()

    connection = engine.connect()
    job_id = await shop.submit(1, connection)
    committing = asyncio.create_task(asyncio.to_thread(commit, connection))
    await asyncio.to_thread(begun.wait, 20)
    early = await shop.exists(job_id)
    go_on.set()
    await committing
    assert not early
    assert await shop.exists(job_id)
    connection.close()
    engine.dispose()


async def test_a_connection_without_a_transaction_is_refused(shop: Shop) -> None:
    """And each object that cannot report its commit, with what to do."""
    connection = await asyncpg.connect(shop.database.url)
    automatic = shop.engine.execution_options(isolation_level="AUTOCOMMIT")
    sync = create_engine("sqlite://", isolation_level="AUTOCOMMIT")
    with pytest.raises(TransactionError, match=r"async with connection\.transaction"):
        await shop.plugin.jobs.submit("orders.ship", 1, connection=connection)
    async with automatic.connect() as autocommit, AsyncSession(automatic) as session:
        for given in (autocommit, session, sync.connect(), Session(sync)):
            with pytest.raises(TransactionError, match="AUTOCOMMIT"):
                await shop.plugin.jobs.submit("orders.ship", 1, connection=given)
            if not isinstance(given, AsyncSession) and given is not autocommit:
                given.close()
    for wrong in (shop.engine, shop.engine.connect(), "postgresql://", object()):
        with pytest.raises(TransactionError, match="connection="):
            await shop.plugin.jobs.submit("orders.ship", 1, connection=wrong)
    sync.dispose()
    await connection.close()

    assert await shop.shipped() == []


async def test_a_blocking_call_takes_a_synchronous_session(shop: Shop) -> None:
    """The error about an asynchronous one says how to pass it, and psycopg reports no commit."""
    submit = shop.plugin.jobs.submit_sync
    connection = await asyncpg.connect(shop.database.url)
    await connection.execute("BEGIN")
    scoped = async_scoped_session(async_sessionmaker(shop.engine), lambda: None)
    for given in (connection, AsyncSession(shop.engine), scoped):
        with pytest.raises(TransactionError, match=r"use `await jobs\.submit"):
            await asyncio.to_thread(submit, "orders.ship", 1, connection=given)
    with (
        psycopg.connect(shop.database.url) as blocking,
        pytest.raises(TransactionError, match="set DATABASE_URL, or submit the job after"),
    ):
        await asyncio.to_thread(submit, "orders.ship", 1, connection=blocking)
    await connection.close()

    assert await shop.shipped() == []


async def test_a_committed_job_is_stored_beyond_the_limit(database: Database) -> None:
    """Open transactions may have more jobs together than fit; each of them was accepted."""
    plugin = created(read_settings({"JOB_MEMORY_MAX_JOBS": "1"}))
    connections = [await asyncpg.connect(database.url) for _ in range(2)]
    for number, connection in enumerate(connections):
        await connection.execute("BEGIN")
        await plugin.jobs.submit("orders.ship", number, connection=connection)
    for connection in connections:
        await connection.execute("COMMIT")
        await connection.close()

    assert len((await plugin.jobs.search()).jobs) == 2


async def test_before_the_start_and_after_the_stop(database: Database) -> None:
    """A job waits for the start. After the stop the refusal comes at once, and says why."""
    plugin = created()
    connection = await asyncpg.connect(database.url)
    async with connection.transaction():
        early = await plugin.jobs.submit("orders.ship", 1, connection=connection)
    async with Litestar(plugins=[plugin], logging_config=None).lifespan():
        job = await plugin.jobs.wait(early.job.id, timeout=20)
    async with connection.transaction():
        with pytest.raises(LedgerUnavailableError, match="the process stops"):
            await plugin.jobs.submit("orders.ship", 2, connection=connection)
    await connection.close()

    assert job.state is JobState.COMPLETED
