"""One task of taskiq on the broker that BENCH_BROKER names; it notes each of its runs."""

import asyncio
import os
from pathlib import Path

from taskiq import AsyncBroker
from taskiq_redis import RedisStreamBroker

from viralfx.taskiq import LedgerBroker

BROKER, RUNS = "BENCH_BROKER", "BENCH_RUNS"
"""Environment variables: the name of the broker, and the file of the runs."""
LEDGER, STREAM = "LedgerBroker", "RedisStreamBroker"
TASK_SECONDS = 0.1


def made() -> AsyncBroker:
    """Return the broker, with the settings that taskiq's documentation shows."""
    if os.environ.get(BROKER) == STREAM:
        return RedisStreamBroker(os.environ["BENCH_REDIS_URL"])
    return LedgerBroker()


broker = made()


@broker.task("bench.note")
async def run(number: int) -> None:
    """Take some time, then note the number."""
    await asyncio.sleep(TASK_SECONDS)
    _note(number)


def _note(number: int) -> None:
    with Path(os.environ[RUNS]).open("a", encoding="utf-8") as file:
        print(number, file=file)
