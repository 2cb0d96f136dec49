"""The leader of the workers deletes jobs that are older than their retention."""

import asyncio
from typing import Any

from tests.unit.jobs.fleet import Fleet

from viralfx.jobs.worker.maintenance import PERIOD_SECONDS, Retention
from viralfx.resilience.policy import BackoffPolicy

RETENTION = Retention(finished=7200.0, failed=0.0)


async def fail(payload: Any) -> None:
    """Raise."""
    raise ValueError(payload)


async def test_old_jobs_are_deleted_without_a_job(fleet: Fleet) -> None:
    """Also while the queues have no free slot; zero keeps failed jobs."""
    fleet.declare("fail", fail, retry=BackoffPolicy(attempts=1))
    done, broken = await fleet.accept(), await fleet.accept("fail")
    fleet.start(retention=RETENTION, queues={"default": 1})
    await fleet.final(done, broken)
    await fleet.submit("sleep", "100000.0")
    await asyncio.sleep(RETENTION.finished - PERIOD_SECONDS)
    kept = await fleet.memory_ledger.get(done)
    await asyncio.sleep(3 * PERIOD_SECONDS)

    assert kept is not None
    assert await fleet.memory_ledger.get(done) is None
    assert await fleet.memory_ledger.get(broken) is not None


async def test_only_the_leader_deletes_jobs(fleet: Fleet) -> None:
    """Another worker follows when it stops."""
    workers = [fleet.start(name, retention=RETENTION) for name in ("a", "b", "c")]
    await asyncio.sleep(10.5 * PERIOD_SECONDS)
    calls = fleet.ledger.count("prune")
    await workers[0].drain(1.0)
    await asyncio.sleep(10.5 * PERIOD_SECONDS)

    assert calls == 10
    assert 18 <= fleet.ledger.count("prune") <= 21


async def test_pruning_goes_on_after_an_outage(fleet: Fleet) -> None:
    """The next period tries again."""
    done = await fleet.accept()
    fleet.start(retention=RETENTION)
    await fleet.final(done)
    await asyncio.sleep(RETENTION.finished - PERIOD_SECONDS)
    fleet.ledger.unavailable = frozenset({"prune"})
    await asyncio.sleep(2.5 * PERIOD_SECONDS)
    kept = await fleet.memory_ledger.get(done)
    fleet.ledger.unavailable = frozenset()
    await asyncio.sleep(PERIOD_SECONDS)

    assert kept is not None
    assert await fleet.memory_ledger.get(done) is None
