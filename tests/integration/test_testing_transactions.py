"""``viralfx.testing`` beside a database: transactional tasks, and an asynchronous session."""

from collections.abc import Callable

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from tests.servers.postgres import Database

from viralfx import JobContext, OperationsConfig, OperationsPlugin, Settings, task
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
