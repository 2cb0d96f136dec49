"""A program with the packages that applications most likely have: ``python beside_jobs.py``.

It needs the distribution with all extras and these packages, and no package of the tests.
DATABASE_URL is an empty database.
"""

import asyncio
import os
import time
from typing import Any

import boto3
import httpx
import sentry_sdk
import structlog
from advanced_alchemy.extensions.litestar import SQLAlchemyAsyncConfig, SQLAlchemyPlugin
from alembic.autogenerate import produce_migrations
from alembic.migration import MigrationContext
from celery import Celery
from fastapi import FastAPI
from litestar import Litestar, get, post
from litestar.testing import TestClient
from pydantic import BaseModel
from sqlalchemy import Column, Connection, Integer, MetaData, Table, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

import viralfx
from viralfx import JobService, OperationsConfig, OperationsPlugin
from viralfx.asgi import OperationsMiddleware
from viralfx.cli import main

URL = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://", 1)
READY_WITHIN = 60.0


class Order(BaseModel):
    """The body of a request."""

    number: int


@viralfx.task("ship")
async def ship(number: int) -> int:
    """Ship an order."""
    return number


@post("/orders", status_code=201)
async def order(data: Order, db_session: AsyncSession, jobs: JobService) -> dict[str, Any]:
    """Keep an order and its job in one transaction of SQLAlchemy."""
    await db_session.execute(text("create table if not exists kept (number int)"))
    await db_session.execute(text("insert into kept values (:number)"), {"number": data.number})
    accepted = await jobs.submit("ship", data.number, connection=db_session)
    await db_session.commit()
    return {"job": accepted.job.id}


@get("/fails")
async def fails() -> None:
    """Fail, so that Sentry has an event."""
    raise RuntimeError("planted")


def wait_until_ready(client: Any) -> None:
    """Return once the readiness probe passes."""
    deadline = time.monotonic() + READY_WITHIN
    while (seen := client.get("/health/ready")).status_code != 200:
        assert time.monotonic() < deadline, seen.text
        time.sleep(0.05)


def in_litestar(events: list[Any]) -> None:
    """Serve probes, an order with its job, and an error, beside advanced-alchemy and Sentry."""
    operations = OperationsPlugin(OperationsConfig(tasks=[ship], jobs_api=True))
    sessions = SQLAlchemyPlugin(config=SQLAlchemyAsyncConfig(connection_string=URL))
    app = Litestar([order, fails], plugins=[operations, sessions])
    with TestClient(app) as client:
        wait_until_ready(client)
        kept = client.post("/orders", json={"number": 42})
        assert kept.status_code == 201, kept.text
        job = client.get(f"/api/v1/jobs/{kept.json()['job']}")
        assert (job.status_code, job.json()["task"]) == (200, "ship"), job.text
        assert client.get("/fails").status_code == 500
    assert {event["exception"]["values"][-1]["value"] for event in events} == {"planted"}


async def in_fastapi() -> None:
    """Serve a probe beside a route of FastAPI."""
    inner = FastAPI()
    inner.add_api_route("/own", lambda: "own")
    app = OperationsMiddleware(inner, OperationsConfig())
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/own")).json() == "own"
        assert (await client.get("/health/live")).status_code == 200


async def proposed() -> list[str]:
    """Return the operations of a migration that Alembic proposes for a new table."""
    shop = MetaData()
    Table("shop_order", shop, Column("id", Integer, primary_key=True))

    def compare(connection: Connection) -> list[str]:
        made = produce_migrations(MigrationContext.configure(connection), shop).upgrade_ops
        return [type(each).__name__ for each in made.ops] if made else []

    engine = create_async_engine(URL)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(compare)
    finally:
        await engine.dispose()


def twice(number: int) -> int:
    """Return twice the number, as a task of Celery."""
    return number * 2


def others() -> None:
    """Use the packages that have no part in the application."""
    queue = Celery(broker="memory://", backend="cache+memory://")
    queue.conf.task_always_eager = True
    assert queue.task(twice).delay(21).get() == 42
    assert boto3.client("s3", region_name="eu-west-1").meta.region_name == "eu-west-1"
    structlog.get_logger().info("other packages work")


def everything() -> None:
    """Run all of it in one process, as an application has it."""
    events: list[Any] = []

    def keep(event: Any, _hint: Any) -> Any:
        events.append(event)
        return event

    # Its integrations change Litestar, httpx, redis, SQLAlchemy and others from here on.
    sentry_sdk.init(dsn="http://key@127.0.0.1:1/1", before_send=keep)
    assert main(["migrate"]) == 0
    assert asyncio.run(proposed()) == ["CreateTableOp"], "Alembic sees the tables of the jobs"
    in_litestar(events)
    asyncio.run(in_fastapi())
    others()


if __name__ == "__main__":
    everything()
