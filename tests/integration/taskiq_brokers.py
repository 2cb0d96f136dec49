"""Running LedgerBrokers: in memory, and on Postgres with either worker."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import pytest
from taskiq.api import run_receiver_task

from viralfx.bootstrap import Assembly, assemble
from viralfx.settings import read_settings
from viralfx.taskiq import LedgerBroker

MEMORY, TASKIQ, VIRALFX = "memory", "taskiq worker", "viralfx worker"

Running = Callable[[LedgerBroker], AbstractAsyncContextManager[None]]
"""Starts a broker and a worker for its messages, and stops both."""


@asynccontextmanager
async def in_memory(broker: LedgerBroker) -> AsyncIterator[None]:
    """Run the messages in this process, where they are."""
    await broker.startup()
    try:
        yield
    finally:
        await broker.shutdown()


@asynccontextmanager
async def under_taskiq(broker: LedgerBroker) -> AsyncIterator[None]:
    """Run the messages as ``taskiq worker`` does."""
    broker.is_worker_process = True
    await broker.startup()
    worker = asyncio.create_task(run_receiver_task(broker))
    try:
        yield
    finally:
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker
        await broker.shutdown()


@asynccontextmanager
async def under_viralfx(broker: LedgerBroker) -> AsyncIterator[None]:
    """Run the messages as ``viralfx worker`` does."""
    async with assembled(broker) as assembly:
        assembly.jobs.enable_worker()
        assembly.jobs.start()
        await asyncio.sleep(0)
        yield


@asynccontextmanager
async def assembled(broker: LedgerBroker) -> AsyncIterator[Assembly]:
    """Give the broker the jobs of a process with the settings of the environment."""
    assembly = assemble(read_settings(os.environ), tasks=[broker])
    for resource in assembly.operations.resources:
        await resource.open()
    try:
        yield assembly
    finally:
        assembly.operations.shutdown.trigger("the test ends")
        await assembly.operations.shutdown.run()


VARIANTS: Mapping[str, Running] = {
    MEMORY: in_memory,
    TASKIQ: under_taskiq,
    VIRALFX: under_viralfx,
}


def set_environment(monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    """Set the variables that a broker reads; without an address messages are in memory."""
    for name in ("DATABASE_URL", "TASK_MODULES", "REDIS_HOST", "REDIS_URL", "QUEUES"):
        monkeypatch.delenv(name, raising=False)
    if url is not None:
        monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("SHUTDOWN_DRAIN_TIMEOUT", "5000")
