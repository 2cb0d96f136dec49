"""``viralfx.testing`` beside a database: transactional tasks, and an asynchronous session."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from tests.guide import shown
from tests.servers.postgres import Database

from viralfx import JobContext, OperationsConfig, OperationsPlugin, Settings, task
from viralfx.jobs.tasks import declared_task, mark
from viralfx.testing import JobsOfTest, viralfx_jobs

__all__ = ["viralfx_jobs"]

Hold = Callable[[OperationsPlugin], JobsOfTest]


@task("shop.ship")
async def ship(order: int) -> int:
    """Return the order."""
    return order


@task("shop.pay", transactional=True)
async def pay(order: int, context: JobContext) -> None:
    """Write an order and submit two jobs for it; fail for odd orders."""
    await context.connection.execute("INSERT INTO orders VALUES ($1)", order)
    await context.submit("shop.ship", order)
    await plugin.jobs.submit("shop.ship", order, connection=context.connection)
    if order % 2:
        raise RuntimeError("planted")


plugin = OperationsPlugin(OperationsConfig(settings=Settings(), tasks=[ship, pay]))


@pytest.fixture
def orders(database: Database) -> Database:
    """Return a database with a table."""
    database.execute("CREATE TABLE orders (number int)")
    return database


async def test_a_transactional_task_on_a_connection_of_the_test(
    viralfx_jobs: Hold, orders: Database
) -> None:
    """The writes and the jobs of a failed attempt are rolled back."""
    jobs = viralfx_jobs(plugin)
    connection = await asyncpg.connect(orders.url)
    for order in (1, 2):
        await plugin.jobs.submit("shop.pay", order)
    transaction = connection.transaction()
    await transaction.start()
    ran = await jobs.run_pending(connection=connection)
    written = await connection.fetch("SELECT number FROM orders")
    await transaction.rollback()
    await connection.close()

    assert [tuple(row) for row in written] == [(2,)]
    assert [(job.task, job.payload, job.state) for job in ran] == [
        ("shop.pay", 1, "failed"),
        ("shop.pay", 2, "completed"),
        ("shop.ship", 2, "completed"),
        ("shop.ship", 2, "completed"),
    ]


async def test_the_transactions_of_the_guide(viralfx_jobs: Hold, orders: Database) -> None:
    """The transfer, the payment with its follow-up job, and the test that the page shows."""
    names = shown(
        "### Transactions",
        "## Follow-up jobs",
        "### Transactions in a test",
        AsyncSession=AsyncSession,
        asyncpg=asyncpg,
    )
    orders.execute("CREATE TABLE accounts (id int, cents int)")
    orders.execute("INSERT INTO accounts VALUES (1, 50)")
    orders.execute("ALTER TABLE orders RENAME number TO id")
    orders.execute("ALTER TABLE orders ADD paid bool DEFAULT false")
    orders.execute("INSERT INTO orders VALUES (17)")
    declared = declared_task(ship)
    assert declared is not None
    mark(shipped := partial(ship), replace(declared, name="orders.ship"))
    guide = OperationsPlugin(
        OperationsConfig(settings=Settings(), tasks=[names["transfer"], names["pay"], shipped])
    )
    names["plugin"] = guide
    engine = create_async_engine(orders.url.replace("postgresql:", "postgresql+asyncpg:"))
    connection = await asyncpg.connect(orders.url)
    async with AsyncSession(engine) as session:
        await names["test_payment"](viralfx_jobs, session, connection)
    await engine.dispose()
    jobs = viralfx_jobs(guide)
    await guide.jobs.submit("bank.transfer", {"account": 1, "cents": 25})
    (transferred,) = await jobs.run_pending(connection=connection, raise_errors=True)
    await guide.jobs.submit("orders.pay", 17)
    ran = await jobs.run_pending(connection=connection, raise_errors=True)
    await connection.close()

    assert transferred.result == 25
    assert orders.execute("SELECT cents FROM accounts") == [(75,)]
    assert [(job.task, job.payload) for job in ran] == [("orders.pay", 17), ("orders.ship", 17)]


async def test_jobs_in_an_asynchronous_session(viralfx_jobs: Hold, orders: Database) -> None:
    """They are there after its commit."""
    jobs = viralfx_jobs(plugin)
    engine = create_async_engine(orders.url.replace("postgresql:", "postgresql+asyncpg:"))
    async with AsyncSession(engine) as session:
        for order in (1, 2):
            await session.execute(text("INSERT INTO orders VALUES (:order)"), {"order": order})
            await plugin.jobs.submit("shop.ship", order, connection=session)
            assert await jobs.submitted() == []
            await (session.commit() if order == 2 else session.rollback())
    async with engine.begin() as begun:
        await plugin.jobs.submit("shop.ship", 3, connection=begun)
    await engine.dispose()

    assert [job.payload for job in await jobs.submitted()] == [2, 3]


async def test_jobs_in_a_transaction_of_asyncpg(viralfx_jobs: Hold, orders: Database) -> None:
    """They are there after its commit, which awaiting the jobs does not miss."""
    jobs = viralfx_jobs(plugin)
    connection = await asyncpg.connect(orders.url)
    async with connection.transaction():
        await plugin.jobs.submit("shop.ship", 1, connection=connection)
        assert await jobs.submitted() == []
    found = await jobs.submitted()
    await connection.close()

    assert [job.payload for job in found] == [1]
