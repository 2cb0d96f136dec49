"""Jobs submitted in a transaction of the caller, and by the SQL function ``enqueue``."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import psycopg2
import pytest
from litestar import Litestar
from psycopg.rows import dict_row
from psycopg2.extras import RealDictCursor
from sqlalchemy import create_engine, func, literal, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import NullPool
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.ports import free_port
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import until
from tests.soak import SOAK

from viralfx import (
    Accepted,
    JobContext,
    KeyHeldError,
    LedgerUnavailableError,
    OperationsConfig,
    OperationsPlugin,
    Settings,
    task,
)
from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.clock import SystemClock
from viralfx.core.errors import TransactionError
from viralfx.jobs.codec import unique_key_of
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.model import JobState, KeyConflictError
from viralfx.jobs.notifier import JobNotification
from viralfx.jobs.postgres import PostgresJobLedger, PostgresNotifier
from viralfx.jobs.service import JobService
from viralfx.jobs.submission import Submission
from viralfx.jobs.tasks import TaskRegistry, declared_task
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig
from viralfx.postgres import PostgresDatabase
from viralfx.settings import Secret

SCHEMA = "viralfx_ops"
ORDERS = (200, 10_000)[SOAK]


@task("orders.ship")
async def ship(order: Any) -> Any:
    """Return the order."""
    return order


@task("orders.chain", transactional=True)
async def chain(order: int, context: JobContext) -> None:
    """Submit the next job in the transaction of this one; fail for odd orders."""
    await context.connection.execute("insert into orders values ($1)", order)
    await context.submit("orders.ship", order)
    if order % 2:
        raise RuntimeError("planted")


TASKS = [found for function in (ship, chain) if (found := declared_task(function)) is not None]


class Announced(list[tuple[str, str]]):
    """The announced jobs, by queue and id."""

    def notify(self, queue: str, ids: Any, due_in: float) -> None:
        """Record jobs."""
        self.extend((queue, each) for each in ids)
        assert due_in >= 0


class Shop:
    """A database with orders and jobs."""

    def __init__(self, database: Database, ledger: PostgresJobLedger) -> None:
        self.database = database
        self.ledger = ledger
        self.announced = Announced()
        self.engine: AsyncEngine = create_async_engine(
            database.url.replace("postgresql:", "postgresql+asyncpg:"), pool_size=4
        )
        self.jobs = JobService(
            ledger=ledger,
            tasks=TaskRegistry(TASKS),
            codec=MsgspecCodec(),
            queues=["default"],
            notify=self.announced.notify,
        )

    def orders(self) -> list[int]:
        """Return the orders that were committed."""
        return [number for (number,) in self.database.execute("select * from orders order by 1")]

    def shipped(self) -> list[int]:
        """Return the orders of the jobs that exist."""
        rows = self.database.execute(
            "select payload::text::int from viralfx_jobs where task = 'orders.ship' order by 1"
        )
        return [number for (number,) in rows]


@pytest.fixture
async def shop(migrated_database: Database) -> AsyncIterator[Shop]:
    """Return an empty shop."""
    migrated_database.execute("create table orders (number int primary key)")
    async with opened(config_of(migrated_database, pool_max=4)) as pool:
        shop = Shop(migrated_database, PostgresJobLedger(pool))
        yield shop
        await shop.engine.dispose()


Place = Callable[[int], Awaitable[None]]
"""Writes an order and submits its job; commits an even one, and rolls back an odd one."""
INSERT = "insert into orders values ({})"


def kept(number: int) -> bool:
    """Return True if the transaction of an order is committed."""
    return number % 2 == 0


@asynccontextmanager
async def by_asyncpg(shop: Shop) -> AsyncIterator[Place]:
    """On a connection whose application has codecs of its own, for JSON and for times."""
    connection = await asyncpg.connect(
        shop.database.url, server_settings={"datestyle": "German", "timezone": "Asia/Kolkata"}
    )
    await connection.set_type_codec(
        "json", encoder=json.dumps, decoder=json.loads, schema="pg_catalog"
    )
    for name in ("timestamptz", "uuid"):
        await connection.set_type_codec(name, encoder=str, decoder=str, schema="pg_catalog")

    async def place(number: int) -> None:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(INSERT.format(number))
        key = f"order-{number}"
        accepted, again = [
            await shop.jobs.submit("orders.ship", number, key=key, connection=connection)
            for _ in range(2)
        ]
        assert accepted.created
        assert accepted.job == again.job
        await (transaction.commit() if kept(number) else transaction.rollback())

    yield place
    await connection.close()


@asynccontextmanager
async def by_pool(shop: Shop) -> AsyncIterator[Place]:
    """On a connection of a pool of asyncpg, in a transaction begun by hand."""
    async with asyncpg.create_pool(shop.database.url, min_size=1, max_size=2) as pool:

        async def place(number: int) -> None:
            async with pool.acquire() as connection:
                await connection.execute("begin")
                await connection.execute(INSERT.format(number))
                await shop.jobs.submit("orders.ship", number, connection=connection)
                await connection.execute("commit" if kept(number) else "rollback")

        yield place


@asynccontextmanager
async def by_session(shop: Shop) -> AsyncIterator[Place]:
    """In a session whose first statement is that of the job."""
    sessions = async_sessionmaker(shop.engine)

    async def place(number: int) -> None:
        async with sessions() as session:
            await shop.jobs.submit("orders.ship", number, connection=session)
            await session.execute(text(INSERT.format(number)))
            await (session.commit() if kept(number) else session.rollback())

    yield place


@asynccontextmanager
async def by_savepoint(shop: Shop) -> AsyncIterator[Place]:
    """In a savepoint of a session that is committed anyway."""

    async def place(number: int) -> None:
        async with AsyncSession(shop.engine) as session, session.begin():
            savepoint = await session.begin_nested()
            await session.execute(text(INSERT.format(number)))
            await shop.jobs.submit("orders.ship", number, connection=session)
            await (savepoint.commit() if kept(number) else savepoint.rollback())

    yield place


@asynccontextmanager
async def by_scoped_session(shop: Shop) -> AsyncIterator[Place]:
    """In the session of the current task."""
    scoped = async_scoped_session(async_sessionmaker(shop.engine), asyncio.current_task)

    async def place(number: int) -> None:
        await shop.jobs.submit("orders.ship", number, connection=scoped)
        await scoped.execute(text(INSERT.format(number)))
        await (scoped.commit() if kept(number) else scoped.rollback())
        await scoped.remove()

    yield place


@asynccontextmanager
async def by_connection(shop: Shop) -> AsyncIterator[Place]:
    """On a connection of SQLAlchemy."""

    async def place(number: int) -> None:
        async with shop.engine.connect() as connection:
            await shop.jobs.submit("orders.ship", number, connection=connection)
            await connection.execute(text(INSERT.format(number)))
            await (connection.commit() if kept(number) else connection.rollback())

    yield place


@asynccontextmanager
async def by_sync_session(shop: Shop) -> AsyncIterator[Place]:
    """In the session and on the connection inside those of asyncio."""

    async def place(number: int) -> None:
        async with AsyncSession(shop.engine) as session:
            inner = session.sync_session
            given = inner if number % 4 < 2 else (await session.connection()).sync_connection
            await session.execute(text(INSERT.format(number)))
            await shop.jobs.submit("orders.ship", number, connection=given)
            await (session.commit() if kept(number) else session.rollback())

    yield place


def place_blocking(shop: Shop, number: int, connection: Any, execute: Callable[[str], Any]) -> None:
    """Write an order and submit its job, twice, from a thread without an event loop."""
    execute(INSERT.format(number))
    options: dict[str, Any] = {"key": f"order-{number}", "connection": connection}
    accepted, again = [shop.jobs.submit_sync("orders.ship", number, **options) for _ in range(2)]
    assert accepted.created
    assert accepted.job == again.job
    with pytest.raises(KeyConflictError):
        shop.jobs.submit_sync("orders.ship", -1, **options)


@asynccontextmanager
async def by_psycopg(shop: Shop) -> AsyncIterator[Place]:
    """On a connection of psycopg with rows and a time zone of its own."""
    options = "-c timezone=Asia/Kolkata -c datestyle=German"
    with psycopg.connect(shop.database.url, row_factory=dict_row, options=options) as connection:

        def place(number: int) -> None:
            place_blocking(shop, number, connection, connection.execute)
            (connection.commit if kept(number) else connection.rollback)()

        yield lambda number: asyncio.to_thread(place, number)


@asynccontextmanager
async def by_pipeline(shop: Shop) -> AsyncIterator[Place]:
    """In a pipeline of psycopg, whose cursors take parameters without names."""
    with psycopg.connect(shop.database.url, cursor_factory=psycopg.RawCursor) as connection:

        def place(number: int) -> None:
            connection.autocommit = number >= 4
            keep = kept(number)
            with connection.pipeline():
                if connection.autocommit:
                    with connection.transaction(force_rollback=not keep):
                        place_blocking(shop, number, connection, connection.execute)
                else:
                    place_blocking(shop, number, connection, connection.execute)
                    (connection.commit if keep else connection.rollback)()

        yield lambda number: asyncio.to_thread(place, number)


@asynccontextmanager
async def by_autocommit(shop: Shop) -> AsyncIterator[Place]:
    """In a block of psycopg, without which each statement would be a transaction."""
    with psycopg.connect(shop.database.url, autocommit=True) as connection:

        def place(number: int) -> None:
            with connection.transaction(force_rollback=not kept(number)):
                place_blocking(shop, number, connection, connection.execute)

        yield lambda number: asyncio.to_thread(place, number)


@asynccontextmanager
async def by_psycopg2(shop: Shop) -> AsyncIterator[Place]:
    """On a connection of psycopg2 with rows of its own."""
    connection = psycopg2.connect(shop.database.url, cursor_factory=RealDictCursor)

    def place(number: int) -> None:
        with connection.cursor() as cursor:
            place_blocking(shop, number, connection, cursor.execute)
        (connection.commit if kept(number) else connection.rollback)()

    yield lambda number: asyncio.to_thread(place, number)
    connection.close()


@asynccontextmanager
async def by_blocking_session(shop: Shop) -> AsyncIterator[Place]:
    """In a synchronous session of SQLAlchemy, of each driver; and on its connection."""
    engines = [
        create_engine(shop.database.url.replace("postgresql:", f"postgresql+{driver}:"))
        for driver in ("psycopg", "psycopg2")
    ]

    def place(number: int) -> None:
        with Session(engines[number // 2 % 2]) as session:
            given = session if number < 4 else session.connection()
            place_blocking(shop, number, given, lambda sql: session.execute(text(sql)))
            (session.commit if kept(number) else session.rollback)()

    yield lambda number: asyncio.to_thread(place, number)
    for engine in engines:
        engine.dispose()


WAYS: dict[str, Callable[[Shop], AbstractAsyncContextManager[Place]]] = {
    way.__name__.removeprefix("by_"): way
    for way in (
        by_asyncpg,
        by_pool,
        by_session,
        by_savepoint,
        by_scoped_session,
        by_connection,
        by_sync_session,
        by_psycopg,
        by_pipeline,
        by_autocommit,
        by_psycopg2,
        by_blocking_session,
    )
}


@pytest.mark.parametrize("way", list(WAYS))
async def test_a_job_exists_if_and_only_if_its_transaction_commits(shop: Shop, way: str) -> None:
    """By every kind of connection."""
    async with WAYS[way](shop) as place:
        for number in range(8):
            await place(number)

    assert shop.orders() == shop.shipped() == [0, 2, 4, 6]


def psql() -> str:
    """Return the client, of the machine or of a wheel of the servers."""
    packages = Path(pytest.__file__).parents[1]
    beside = next(iter(packages.glob("*/pginstall/bin/psql")), None)
    if (found := shutil.which("psql") or beside) is None:
        pytest.skip("psql is not here")
    return str(found)


@pytest.mark.soak
@pytest.mark.timeout(900 if SOAK else 90)
@pytest.mark.parametrize("way", ["asyncpg", "session", "psql"])
async def test_half_of_the_orders_roll_back(shop: Shop, way: str) -> None:
    """Each order that was committed has one job, and no other order has one."""
    if way == "psql":
        script = "".join(
            f"begin; {INSERT.format(number)};"
            f" select {SCHEMA}.enqueue('orders.ship', '{number}');"
            f" {('commit', 'rollback')[number % 2]};\n"
            for number in range(ORDERS)
        )
        command = [psql(), "-qAt", "-v", "ON_ERROR_STOP=1", shop.database.url]
        ran = await asyncio.to_thread(
            lambda: subprocess.run(
                command, input=script, text=True, capture_output=True, check=False
            )
        )
        assert ran.returncode == 0, ran.stderr
    else:
        async with WAYS[way](shop) as place:
            for number in range(ORDERS):
                await place(number)

    assert shop.orders() == shop.shipped() == list(range(0, ORDERS, 2))


async def test_a_connection_in_no_transaction_is_refused(shop: Shop) -> None:
    """And any other object, with what to do; no job is accepted."""
    connection = await asyncpg.connect(shop.database.url)
    automatic = shop.engine.execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(TransactionError, match=r"async with connection\.transaction"):
        await shop.jobs.submit("orders.ship", 1, connection=connection)
    async with automatic.connect() as autocommit, AsyncSession(automatic) as session:
        for given in (autocommit, session):
            with pytest.raises(TransactionError, match="AUTOCOMMIT"):
                await shop.jobs.submit("orders.ship", 1, connection=given)
    for wrong in (shop.engine, shop.engine.connect(), "postgresql://", object()):
        with pytest.raises(TransactionError, match="connection="):
            await shop.jobs.submit("orders.ship", 1, connection=wrong)
    await connection.close()

    assert shop.shipped() == []


async def test_a_blocking_call_takes_a_synchronous_connection(shop: Shop) -> None:
    """Any other one is refused, with the call to use instead."""
    native = await asyncpg.connect(shop.database.url)
    latest = await psycopg.AsyncConnection.connect(shop.database.url)
    former = psycopg2.connect(shop.database.url, async_=True)
    session = AsyncSession(shop.engine)
    scoped = async_scoped_session(async_sessionmaker(shop.engine), lambda: None)
    wrong = {
        native: "await jobs.submit(",
        session: "await jobs.submit(",
        session.sync_session: "await jobs.submit(",
        scoped: "await jobs.submit(",
        latest: "SQL function enqueue()",
        former: "not psycopg2.extensions.connection",
        object(): "not builtins.object",
    }
    said = {each: await asyncio.to_thread(refusal, shop, each) for each in wrong}
    with psycopg.connect(shop.database.url) as synchronous:
        for each, part in ((synchronous, "jobs.submit_sync() takes it"), (latest, wrong[latest])):
            with pytest.raises(TransactionError, match=re.escape(part)):
                await shop.jobs.submit("orders.ship", 1, connection=each)
    await scoped.remove()
    await session.close()
    await native.close()
    await latest.close()
    former.close()

    assert [said[each] for each, part in wrong.items() if part not in said[each]] == []
    assert shop.shipped() == []


def refusal(shop: Shop, connection: Any) -> str:
    """Return why a connection is refused, in this thread, which has no event loop."""
    with pytest.raises(TransactionError) as error:
        shop.jobs.submit_sync("orders.ship", 1, connection=connection)
    return str(error.value)


def test_a_transaction_that_cannot_have_the_job_is_refused(shop: Shop) -> None:
    """None at all, also in a pipeline, and one that is read only; with the remedy of the driver."""
    former = psycopg2.connect(shop.database.url)
    former.autocommit = True
    with psycopg.connect(shop.database.url, autocommit=True) as latest:
        automatic = refusal(shop, latest)
        with latest.pipeline():
            in_pipeline = refusal(shop, latest)
        set_apart = refusal(shop, former)
        latest.autocommit, latest.read_only = False, True
        reading = refusal(shop, latest)
    former.close()

    assert "with connection.transaction():" in automatic
    assert in_pipeline == automatic
    assert "set connection.autocommit = False" in set_apart
    assert "is read only; begin one that may write" in reading
    assert shop.shipped() == []


async def test_another_database_or_a_failed_transaction_is_refused(
    shop: Shop, database: Database
) -> None:
    """With the reason."""
    connection = await asyncpg.connect(database.url)
    engine = create_async_engine(
        database.url.replace("postgresql:", "postgresql+asyncpg:"), poolclass=NullPool
    )
    async with connection.transaction():
        with pytest.raises(TransactionError, match="DATABASE_URL"):
            await shop.jobs.submit("orders.ship", 1, connection=connection)
        with pytest.raises(TransactionError, match="has failed"):
            await shop.jobs.submit("orders.ship", 1, connection=connection)
        await connection.execute("rollback; begin")
    async with engine.connect() as given:
        with pytest.raises(TransactionError, match="DATABASE_URL"):
            await shop.jobs.submit("orders.ship", 1, connection=given)
    await connection.close()
    await engine.dispose()


@pytest.fixture
def copied(shop: Shop, migrated_template: str) -> Iterator[Database]:
    """Return a second database on the same server, whose ledger has the same schema."""
    server = shop.database.server
    name = server.create_database(migrated_template)
    yield Database(server, name)
    server.drop_database(name)


@pytest.mark.parametrize("way", ["asyncpg", "pool", "lent", "session", "sync", "connection"])
async def test_another_database_with_a_ledger_is_refused(
    shop: Shop, copied: Database, way: str
) -> None:
    """Nothing is stored there, and the transaction goes on: its workers do not know the job."""
    engine = create_async_engine(copied.url.replace("postgresql:", "postgresql+asyncpg:"))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.dispose)
        enter: Any = stack.enter_async_context
        if way in {"session", "sync"}:
            given = session = await enter(AsyncSession(engine))
            given = session.sync_session if way == "sync" else session
        elif way == "connection":
            given = session = await enter(engine.connect())
        elif way == "lent":  # by the pool of another configuration
            given = session = await enter((await enter(opened(config_of(copied)))).acquire())
        elif way == "pool":
            pool = await enter(asyncpg.create_pool(copied.url, min_size=1))
            given = session = await enter(pool.acquire())
        else:
            given = session = await asyncpg.connect(copied.url)
            stack.push_async_callback(given.close)
        is_of_asyncpg = way in {"asyncpg", "pool", "lent"}
        if is_of_asyncpg:
            await session.execute("begin")
        with pytest.raises(TransactionError, match="to the database of DATABASE_URL"):
            await shop.jobs.submit("orders.ship", 1, connection=given)
        with pytest.raises(TransactionError, match="to the database of DATABASE_URL"):
            await shop.jobs.accept_all(
                [Submission(task="orders.ship", payload=b"1", key="key")], connection=given
            )
        statement = "create table kept (number int)"
        await session.execute(statement if is_of_asyncpg else text(statement))
        await (session.execute("commit") if is_of_asyncpg else session.commit())

    assert copied.execute("select count(*) from viralfx_all_jobs") == [(0,)]
    assert copied.execute("select count(*) from kept") == [(0,)]


async def test_a_session_of_no_postgres_is_refused(shop: Shop) -> None:
    """And one whose database depends on the table."""
    engine = create_engine("sqlite://")
    with (
        Session(engine) as session,
        pytest.raises(TransactionError, match="to the database of DATABASE_URL"),
    ):
        await shop.jobs.submit("orders.ship", 1, connection=session)
    with (
        Session(binds={DeclarativeBase: engine}) as session,
        pytest.raises(TransactionError, match=r"session\.connection\(bind_arguments=\.\.\.\)"),
    ):
        await shop.jobs.submit("orders.ship", 1, connection=session)
    engine.dispose()


async def test_the_own_database_is_recognized_without_a_round_trip(shop: Shop) -> None:
    """One connection asks for many callers at once; each submission is one statement."""
    own, asked = shop.ledger._own, list[object]()
    connect = own._connect

    async def ask() -> Any:
        asked.append(await connect())
        return asked[-1]

    own._connect = ask
    connections = [await asyncpg.connect(shop.database.url) for _ in range(5)]
    statements: list[str] = []
    for connection in connections:
        connection.add_query_logger(lambda query: statements.append(query.query))
        await connection.execute("begin")
    async with asyncio.TaskGroup() as group:
        for number, connection in enumerate(connections):
            group.create_task(shop.jobs.submit("orders.ship", number, connection=connection))
    for connection in connections:
        await shop.jobs.submit("orders.ship", 9, connection=connection)
        await connection.execute("commit")
        await connection.close()

    assert shop.shipped() == [0, 1, 2, 3, 4, *[9] * 5]
    assert len(asked) == 1
    assert len(statements) == 5 * len(("begin", "submit", "submit", "commit"))


async def test_a_job_joins_a_transaction_while_the_pool_is_in_use(shop: Shop) -> None:
    """Also one of the pool's only connection, and before the start and after the stop."""
    config = config_of(shop.database, pool_max=1)
    unopened = PostgresDatabase(config, clock=SystemClock())
    async with opened(config) as pool:
        first = Shop(shop.database, PostgresJobLedger(pool))
        second = Shop(shop.database, PostgresJobLedger(unopened))
        async with pool.acquire() as lent, lent.transaction(), AsyncSession(shop.engine) as session:
            await first.jobs.submit("orders.ship", 1, connection=lent)
            await first.jobs.submit("orders.ship", 2, connection=session)
            await second.jobs.submit("orders.ship", 3, connection=session)
            await session.commit()
    async with AsyncSession(shop.engine) as session:
        await first.jobs.submit("orders.ship", 4, connection=session)
        await session.commit()
    for each in (first, second):
        await each.engine.dispose()

    assert shop.shipped() == [1, 2, 3, 4]


async def test_a_database_that_does_not_answer_accepts_nothing(shop: Shop) -> None:
    """A connection to another database would look the same."""
    nowhere = config_of(shop.database, port=free_port(), connection_timeout=1.0)
    other = Shop(shop.database, PostgresJobLedger(PostgresDatabase(nowhere, clock=SystemClock())))
    async with AsyncSession(other.engine) as session:
        with pytest.raises(LedgerUnavailableError, match="refuses connections"):
            await other.jobs.submit("orders.ship", 1, connection=session)
        await session.commit()
    await other.engine.dispose()

    assert shop.shipped() == []


async def test_a_database_that_restarts_stays_the_same(own_postgres: PostgresServer) -> None:
    """A new server in its place is recognized, as after a failover."""
    config = await migrated(config_of(own_postgres))
    database = Database(own_postgres, "postgres")
    async with opened(config) as pool:
        shop = Shop(database, PostgresJobLedger(pool))
        for number in range(2):
            async with AsyncSession(shop.engine) as session:
                await shop.jobs.submit("orders.ship", number, connection=session)
                await session.commit()
            await shop.engine.dispose()
            if not number:
                await asyncio.to_thread(own_postgres.restart)

        assert shop.shipped() == [0, 1]


async def test_a_key_needs_read_committed(shop: Shop) -> None:
    """Another isolation level is refused; a job without a key needs none."""
    connection = await asyncpg.connect(shop.database.url)
    for number, key in ((1, None), (2, "key")):
        async with connection.transaction(isolation="serializable"):
            submitted = shop.jobs.submit("orders.ship", number, key=key, connection=connection)
            if key is None:
                await submitted
                continue
            with pytest.raises(TransactionError, match="READ COMMITTED"):
                await submitted
            await connection.execute("rollback; begin")
    await connection.close()

    assert shop.shipped() == [1]


async def test_a_key_in_a_transaction_has_one_job(shop: Shop) -> None:
    """A different job is a conflict, which leaves the transaction usable."""
    first = await shop.jobs.submit("orders.ship", 1, key="key")
    async with AsyncSession(shop.engine) as session, session.begin():
        again = await shop.jobs.submit("orders.ship", 1, key="key", connection=session)
        with pytest.raises(KeyConflictError, match=first.job.id):
            await shop.jobs.submit("orders.ship", 2, key="key", connection=session)
        await shop.jobs.submit("orders.ship", 3, connection=session)

    assert (again.created, again.job) == (False, first.job)
    assert shop.shipped() == [1, 3]


@pytest.fixture
async def hasty(shop: Shop) -> AsyncIterator[JobService]:
    """Return a service on the database of the shop whose calls last two seconds at most."""
    async with opened(config_of(shop.database, pool_max=4)) as pool:
        ledger = PostgresJobLedger(pool, timeout=2.0)
        yield JobService(
            ledger=ledger,
            tasks=TaskRegistry(TASKS),
            codec=MsgspecCodec(),
            queues=["default"],
            notify=shop.announced.notify,
        )


@pytest.mark.parametrize(
    ("option", "commits"), [({"key": "held"}, True), ({"unique": "unfinished"}, False)]
)
async def test_a_key_that_an_open_transaction_holds_is_named(
    shop: Shop, hasty: JobService, option: dict[str, Any], *, commits: bool
) -> None:
    """Callers of the same moment are not affected; the same call succeeds after the transaction."""
    batch = [
        Submission(task="orders.ship", payload=b"4", key="new"),
        Submission(task="orders.ship", payload=b"1", **option),
    ]
    async with AsyncSession(shop.engine) as session:
        first = await shop.jobs.submit("orders.ship", 1, connection=session, **option)
        held, *others, together = await asyncio.gather(
            hasty.submit("orders.ship", 1, **option),
            *(hasty.submit("orders.ship", number, key=f"free {number}") for number in (2, 3)),
            hasty.accept_all(batch),
            return_exceptions=True,
        )
        await (session.commit() if commits else session.rollback())
    again = await hasty.submit("orders.ship", 1, **option)

    assert [type(each) for each in (held, *others, together)] == [
        KeyHeldError,
        Accepted,
        Accepted,
        KeyHeldError,
    ]
    assert issubclass(KeyHeldError, LedgerUnavailableError)
    assert str(held).startswith("an open transaction holds the same ")
    assert again.created is not commits
    assert (again.job.id == first.job.id) is commits
    assert shop.shipped() == [1, 2, 3]


async def test_a_key_is_waited_for_until_its_transaction_ends(
    shop: Shop, hasty: JobService
) -> None:
    """A short transaction is no error."""
    async with AsyncSession(shop.engine) as session:
        first = await shop.jobs.submit("orders.ship", 1, key="held", connection=session)
        second = asyncio.create_task(hasty.submit("orders.ship", 1, key="held"))
        await until(lambda: _waiting(shop.database) == 1)
        await session.commit()

    assert (await second).job.id == first.job.id


async def test_a_lock_of_the_table_is_no_held_key(shop: Shop, hasty: JobService) -> None:
    """Jobs with keys wait for it as all jobs do."""
    connection = await asyncpg.connect(shop.database.url)
    async with connection.transaction():
        await connection.execute("lock table viralfx_ops.viralfx_jobs in access exclusive mode")
        calls = [hasty.submit("orders.ship", number, key=f"key {number}") for number in range(2)]
        submitted = asyncio.ensure_future(asyncio.gather(*calls))
        # Longer than a call of several callers waits for a key.
        await until(lambda: _waiting(shop.database, 150) == 1)
    accepted = await submitted
    await connection.close()

    assert [each.created for each in accepted] == [True, True]


async def test_a_held_key_in_a_transaction_with_a_limit_is_named(shop: Shop) -> None:
    """The limit is that of the transaction, and stays as it was."""
    async with AsyncSession(shop.engine) as holder, AsyncSession(shop.engine) as session:
        await shop.jobs.submit("orders.ship", 1, key="held", connection=holder)
        await shop.jobs.submit("orders.ship", 2, key="free", connection=session)
        assert await session.scalar(text("show lock_timeout")) == "0"
        await session.execute(text("set local lock_timeout = '50ms'"))
        with pytest.raises(KeyHeldError):
            await shop.jobs.submit("orders.ship", 1, key="held", connection=session)


def _waiting(database: Database, milliseconds: int = 0) -> int:
    """Return how many statements have waited for a lock for so long."""
    rows = database.execute(
        "select 1000 * extract(epoch from clock_timestamp() - query_start)::float8"
        " from pg_locks join pg_stat_activity using (pid)"
        " where not granted and datname = current_database()"
    )
    return sum(waited > milliseconds for (waited,) in rows)


async def test_many_jobs_share_the_transaction(shop: Shop) -> None:
    """All or none."""
    for keep in (True, False):
        async with AsyncSession(shop.engine) as session:
            accepted = await shop.jobs.submit_many("orders.ship", range(300), connection=session)
            await (session.commit() if keep else session.rollback())
        assert [each.job.payload for each in accepted] == [b"%d" % n for n in range(300)]

    assert shop.shipped() == list(range(300))


async def test_workers_are_notified_after_the_commit(shop: Shop) -> None:
    """Of a session, by the process that commits it; a rolled back job is not announced."""
    async with AsyncSession(shop.engine) as session:
        await shop.jobs.submit("orders.ship", 1, connection=session)
        await session.rollback()
        async with session.begin_nested():
            accepted = await shop.jobs.submit("orders.ship", 2, connection=session)
        await asyncio.sleep(0)
        early = list(shop.announced)
        await session.commit()
    await until(lambda: bool(shop.announced))

    assert early == []
    assert shop.announced == [("default", accepted.job.id)]


async def test_the_transaction_itself_notifies_where_workers_listen(shop: Shop) -> None:
    """With its commit; the function of SQL does so, too."""
    received: list[str] = []

    async def receive(notification: JobNotification) -> None:
        received.extend(notification.ids)

    async with opened(config_of(shop.database, pool_max=4)) as pool:
        jobs = Shop(shop.database, PostgresJobLedger(pool, notifies=True)).jobs
        notifier = PostgresNotifier(pool)
        listening = asyncio.create_task(notifier.listen("default", receive, 10))
        await until(lambda: notifier.is_connected("default"))
        connection = await asyncpg.connect(shop.database.url)
        async with connection.transaction():
            first = await jobs.submit("orders.ship", 1, connection=connection)
            await jobs.submit(
                "orders.ship", 1, connection=connection, run_at=datetime.now(UTC) + timedelta(1)
            )
            second = await connection.fetchval(f"select {SCHEMA}.enqueue('orders.ship')")
            received_early = list(received)
        await until(lambda: len(received) >= 2)
        await connection.close()
        listening.cancel()
        await notifier.close()

    assert received_early == []
    assert received == [first.job.id, str(second)]


async def test_a_task_submits_in_its_transaction(shop: Shop) -> None:
    """The next job exists only if the task's own effects do, and workers are notified."""
    worker = JobWorker(
        WorkerConfig(name="w", queues={"default": 4}, default_retry=_Never(), poll_interval=0.2),
        ledger=shop.ledger,
        notifier=MemoryNotifier(),
        tasks=TaskRegistry(TASKS),
        codec=MsgspecCodec(),
        submit=shop.jobs.submit,
    )
    await shop.jobs.submit_many("orders.chain", range(4))
    worker.start()
    await until(lambda: shop.database.execute(UNFINISHED) == [(0,)], seconds=30.0)
    await worker.drain(5.0)
    rows = shop.database.execute(
        "select payload::text::int from viralfx_all_jobs where task = 'orders.ship' order by 1"
    )

    assert shop.orders() == [0, 2]
    assert rows == [(0,), (2,)]
    assert len(shop.announced) == 6


UNFINISHED = "select count(*) from viralfx_jobs where state in ('waiting', 'active')"


class _Never:
    def next_delay(self, attempt: int, error: BaseException) -> float | None:
        assert attempt == 1
        assert "planted" in str(error)
        return None


def documented(heading: str) -> dict[str, Any]:
    """Return the names that the first Python block below a heading of the guide defines."""
    page = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text("utf-8")
    block = page.partition(f"{heading}\n")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {
        "AsyncSession": AsyncSession,
        "JSONB": JSONB,
        "Session": Session,
        "datetime": datetime,
        "func": func,
        "literal": literal,
        "plugin": SimpleNamespace(),
        "select": select,
        "task": task,
        "text": text,
    }
    exec(block, names)  # noqa: S102 - the text of this repository
    return names


async def test_the_examples_of_the_guide_submit_jobs(shop: Shop) -> None:
    """Each as it is written there."""
    names = {
        heading: documented(heading)
        for heading in (
            "### Priority and time",
            "### Submit in your own transaction",
            "### Many at once",
            "### Unique jobs",
            "## Jobs from SQL",
        )
    }
    refresh = declared_task(names["### Unique jobs"]["refresh"])
    assert refresh is not None
    remind = replace(TASKS[0], name="orders.remind")
    jobs = JobService(
        ledger=shop.ledger,
        tasks=TaskRegistry([*TASKS, refresh, remind]),
        codec=MsgspecCodec(),
        queues=["default"],
    )
    for each in names.values():
        each["plugin"].jobs = jobs
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    await names["### Priority and time"]["remind"](1, tomorrow)
    async with AsyncSession(shop.engine) as session, session.begin():
        await names["### Submit in your own transaction"]["place_order"](session, 2)
        await session.run_sync(names["## Jobs from SQL"]["greet_later"], "Ada")
    shipped = await names["### Many at once"]["ship_all"]([3, 4])
    first, twin = [await jobs.submit("reports.refresh", 5) for _ in range(2)]
    (greeting,) = [job for job in (await jobs.search()).jobs if job.task == "greet"]
    found = await jobs.get(greeting.id)

    assert shop.orders() == [2]
    assert shop.shipped() == [2, 3, 4]
    assert [(await jobs.get(job_id)).priority for job_id in shipped] == [-1, -1]
    assert (first.created, twin.created) == (True, False)
    assert (found.queue, json.loads(found.payload)) == ("default", {"name": "Ada"})


async def test_a_script_submits_within_the_lifespan(migrated_database: Database) -> None:
    """Without one it learns the reason, long before the timeout of the ledger."""
    settings = Settings(database_url=Secret(migrated_database.url))
    plugin = OperationsPlugin(OperationsConfig(settings=settings, tasks=[ship]))
    app = Litestar(plugins=[plugin], logging_config=None)
    began = asyncio.get_running_loop().time()
    with pytest.raises(LedgerUnavailableError, match=r"use `async with app.lifespan\(\):`"):
        await plugin.jobs.submit(ship, 1)
    assert asyncio.get_running_loop().time() - began < plugin.database.config.settings.pool_timeout
    async with app.lifespan():
        accepted = await plugin.jobs.submit(ship, 2)

    assert migrated_database.execute("select id::text from viralfx_jobs") == [(accepted.job.id,)]


# -- the SQL function --------------------------------------------------------------------------


async def test_a_job_from_sql_has_every_option(shop: Shop) -> None:
    """Its id sorts by time, and its payload has the value that was given."""
    before = await shop.jobs.submit("orders.ship", 0)
    ((job_id,),) = shop.database.execute(
        f"""select {SCHEMA}.enqueue(
            'orders.ship', '{{"b": 1,  "a": 2}}', queue => 'mail', priority => 7,
            run_at => '2999-01-01T00:00Z', key => 'k', concurrency_key => 'tenant',
            correlation_id => 'c-1', user_id => 'ada', max_attempts => 7)::text"""
    )
    after = await shop.jobs.submit("orders.ship", 0)
    job = await shop.jobs.get(job_id)

    assert before.job.id < job_id < after.job.id
    assert job_id[14] == "7"
    assert (job.task, job.queue, job.payload) == ("orders.ship", "mail", b'{"a": 2, "b": 1}')
    assert (job.priority, job.key, job.concurrency_key) == (7, "k", "tenant")
    assert job.max_attempts == 7
    assert (job.correlation_id, job.user_id, job.state) == ("c-1", "ada", JobState.WAITING)
    assert job.asked_run_at == job.run_at == datetime(2999, 1, 1, tzinfo=UTC)


async def test_drivers_pass_a_payload_of_their_type(shop: Shop) -> None:
    """As jsonb, by position as the parameters are documented, or as a text."""
    statement = f"select {SCHEMA}.enqueue($1, $2::jsonb, $3, $4, $5, $6)"
    connection = await asyncpg.connect(shop.database.url)
    document = '{"a": [1]}'
    await connection.execute(statement, "orders.ship", document, "default", None, 3, "k")
    await connection.execute(f"select {SCHEMA}.enqueue($1, $2)", "orders.ship", document)
    await connection.close()
    async with AsyncSession(shop.engine) as session, session.begin():
        payload = literal({"a": [1]}, JSONB)
        await session.execute(select(getattr(func, SCHEMA).enqueue("orders.ship", payload)))
    rows = shop.database.execute(
        "select payload::text, priority, key from viralfx_jobs order by id"
    )

    assert rows == [('{"a": [1]}', 3, "k"), *[('{"a": [1]}', 0, None)] * 2]


async def test_a_key_from_sql_has_one_job(shop: Shop) -> None:
    """The payload is compared by its value; a different job is an error."""
    first = await shop.jobs.submit("orders.ship", {"a": 1, "b": 2}, key="k")
    call = f"select {SCHEMA}.enqueue('orders.ship', '{{}}', key => 'k')::text"
    ((again,),) = shop.database.execute(call.replace("{}", '{"b": 2.0, "a": 1}'))
    with pytest.raises(asyncpg.UniqueViolationError, match=first.job.id):
        shop.database.execute(call.replace("{}", "[]"))

    assert again == first.job.id


@pytest.mark.parametrize(
    "arguments",
    [
        "'', '1'",
        "repeat('t', 201)",
        "'t', queue => repeat('q', 201)",
        "'t', run_at => '10000-01-01Z'",
        "'t', run_at => '0044-03-15Z BC'",
        "'t', run_at => 'infinity'",
        "'t', priority => 101",
        "'t', max_attempts => 0",
        "'t', key => ''",
        "'t', key => repeat('€', 667)",
        "'t', concurrency_key => repeat('k', 256)",
        "'t', user_id => repeat('u', 256)",
        "'t', unique_while => 'always'",
    ],
)
def test_sql_refuses_a_value_that_breaks_readers(
    migrated_database: Database, arguments: str
) -> None:
    """Python could not read such a time, and an index would refuse such a key in a later state."""
    name = re.findall(r"(\w+) =>", arguments)
    with pytest.raises(asyncpg.InvalidParameterValueError, match=name[0] if name else "task"):
        migrated_database.execute(f"select {SCHEMA}.enqueue({arguments})")
    assert migrated_database.execute("select from viralfx_jobs") == []


@pytest.mark.parametrize("name", ["task", "payload", "queue"])
def test_sql_refuses_null_for_what_a_job_needs(migrated_database: Database, name: str) -> None:
    """The error names it; a default is not used, because a caller may have meant another value."""
    given = {"task": "'t'", "payload": "'1'", "queue": "'default'", name: "NULL"}
    arguments = ", ".join(f"{parameter} => {value}" for parameter, value in given.items())
    with pytest.raises(asyncpg.NotNullViolationError, match=f'"{name}"'):
        migrated_database.execute(f"select {SCHEMA}.enqueue({arguments})")


async def test_null_for_an_option_in_sql_is_its_default(shop: Shop) -> None:
    """Such as for a driver that passes each parameter."""
    options = (
        *("run_at", "priority", "key", "unique_while", "concurrency_key", "correlation_id"),
        *("traceparent", "user_id", "notify", "max_attempts"),
    )
    arguments = ", ".join(f"{name} => NULL" for name in options)
    rows = shop.database.execute(f"select {SCHEMA}.enqueue('orders.ship', '1', {arguments})")
    job = await shop.jobs.get(str(rows[0][0]))

    assert (job.state, job.queue, job.priority, job.payload) == (
        JobState.WAITING,
        "default",
        0,
        b"1",
    )
    options_of_job = (job.key, job.concurrency_key, job.user_id, job.max_attempts, job.asked_run_at)
    assert options_of_job == (None,) * 5


def test_a_function_of_the_application_is_not_called_in_place_of_a_built_in_one(
    migrated_database: Database,
) -> None:
    """Its exact types would win over those of a built-in function that takes any array."""
    migrated_database.execute(
        """create function public.array_remove(text[], text) returns text[] language plpgsql
        as $$ begin raise exception 'planted'; end $$"""
    )
    migrated_database.execute(f"select {SCHEMA}.enqueue('orders.ship', key => 'k')")

    assert migrated_database.execute("select key from viralfx_jobs") == [("k",)]


PAYLOADS = [
    "null",
    "[]",
    "{}",
    '""',
    '{"bb": 1, "a": [true, false, null, {}], "c": {"x": "y"}, "größe": "€"}',
    r'["\"\\\/\b\f\n\r\t", "\u0001\u001f\u007f", "\u00e9\ud83d\ude00", "1.50 2.0 3.00,"]',
    "[0, -0, 0.0, -0.0, 0e5, 1, 1.0, 1.50, 100, 1e2, 1E+2, 1.5e1, 25e-1, 0.10203, 10.0e-3, 1.0e0]",
    "[123456789012345678901234567890.1234567890123456789000, 9e40, 1.10, -2.500e-7]",
    '{"a": 1, "a": 2.0, "aa": {"b": 1.0, "a": 10}}',
]


@pytest.mark.parametrize("payload", PAYLOADS)
async def test_sql_and_python_know_the_same_duplicates(shop: Shop, payload: str) -> None:
    """A job that is unique is so for both."""
    accepted = await shop.jobs.accept("orders.ship", payload.encode(), unique="unfinished")
    quoted = payload.replace("'", "''")
    ((twin,),) = shop.database.execute(
        f"select {SCHEMA}.enqueue('orders.ship', '{quoted}', unique_while => 'waiting')::text"
    )
    ((other,),) = shop.database.execute(
        f"select {SCHEMA}.enqueue('orders.ship', '[[{quoted}]]', unique_while => 'waiting')::text"
    )

    assert twin == accepted.job.id != other


def test_a_digest_is_that_of_the_value() -> None:
    """White space, the order of names and the spelling of numbers do not matter."""
    same = [b'{"a": 1, "b": [2.50]}', b'{"b":[25e-1],"a":1.0}', b'{"a":9,"a":1e0,"b":[2.5]}']
    others = [b'{"a": "1", "b": [2.5]}', b'{"a": 1, "b": 2.5}', b'{"a": true, "b": [2.5]}']
    huge = [
        b"1e999999999999999999",
        b"[1e99999999, 2e-99999999]",
        b'"\\ud800"',
        b"[" * 499 + b"]" * 499,
    ]
    digests = {unique_key_of("t", each) for each in same}

    assert len(digests) == 1
    assert len({*digests, *(unique_key_of("t", each) for each in others)}) == 4
    assert unique_key_of("u", same[0]) not in digests
    assert len({unique_key_of("t", each) for each in huge}) == 4


async def test_the_function_of_the_version_before_still_works(shop: Shop) -> None:
    """With its parameters by position, as processes of the two versions before send them."""
    call = f"""select id::text from {SCHEMA}.viralfx_accept_jobs(
        array[gen_random_uuid()], array['default'], array['orders.ship'], array['1']::json[],
        array[null]::text[], array['c']::text[], array[null]::text[],
        array[null]::timestamptz[], 60::float8{{more}})"""  # noqa: S608 - constants
    options = """, array[5], array[null]::text[], array[null]::boolean[], array['tenant'],
        array['ada']"""
    ((first,),) = shop.database.execute(call.format(more=""))
    ((second,),) = shop.database.execute(call.format(more=options))
    jobs = [await shop.jobs.get(each) for each in (first, second)]

    assert [(job.priority, job.user_id) for job in jobs] == [(0, None), (5, "ada")]
    assert {(job.correlation_id, job.max_attempts) for job in jobs} == {("c", None)}


def test_sqlalchemy_is_not_imported_for_other_connections() -> None:
    """It takes a tenth of a second, which most processes need not wait."""
    script = """
import asyncio, sys
from unittest.mock import sentinel
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.postgres import enqueue
from viralfx.core.errors import TransactionError
try:
    enqueue._transaction_of(sentinel.connection)
except TransactionError as error:
    assert "sentinel" in str(error) or "mock" in str(error), error
assert "sqlalchemy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
