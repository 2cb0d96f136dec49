"""The load that many idle workers put on the database together."""

import asyncio

import pytest
from tests.integration.job_ledgers import ledger_in
from tests.servers.postgres import Database, transactions
from tests.soak import only_in_soak

from viralfx.adapters.codec import MsgspecCodec
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.tasks import TaskRegistry
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig

WORKERS = 100
QUEUES = {"default": 10, "notifications": 10, "analytics": 10}
LEASE = 30.0
MAX_TRANSACTIONS = 30.0
"""A second: renewals, polls and sweeps. The health checks of the processes have as many again."""


class Disconnected(MemoryNotifier):
    """Announces nothing, as without Redis."""

    def is_connected(self, _: str) -> bool:
        """Return False."""
        return False


@only_in_soak
@pytest.mark.parametrize("notifier", [MemoryNotifier(), Disconnected()], ids=["notified", "polls"])
async def test_a_hundred_idle_workers_make_few_transactions(
    migrated_database: Database, notifier: MemoryNotifier
) -> None:
    """With the default settings: ten renewals and ten polls a second, and a sweep in five."""
    async with ledger_in(migrated_database) as ledger:
        workers = [
            JobWorker(
                WorkerConfig(name=f"w-{number:03}", queues=QUEUES, lease=LEASE),
                ledger=ledger,
                notifier=notifier,
                tasks=TaskRegistry(),
                codec=MsgspecCodec(),
            )
            for number in range(WORKERS)
        ]
        for worker in workers:
            worker.start()
        # From its second renewal on, each worker knows of all the others.
        await asyncio.sleep(LEASE / 3 + 2.0)
        before = await asyncio.to_thread(transactions, migrated_database)
        await asyncio.sleep(LEASE / 3)
        rate = (await asyncio.to_thread(transactions, migrated_database) - before) / (LEASE / 3)
        async with asyncio.timeout(30.0):
            for worker in workers:
                await worker.drain(1.0)

    assert 5.0 < rate < MAX_TRANSACTIONS
