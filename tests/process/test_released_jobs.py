"""Jobs of a worker whose event loop is blocked before they begin, over a ledger in memory."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any

import msgspec
import pytest
from tests.servers.waiting import until
from tests.unit.jobs.fleet import FaultyLedger, Fleet
from tests.unit.metrics.test_jobs import claim

from viralfx.core.clock import SystemClock
from viralfx.jobs.ledger import Claims, Registration
from viralfx.jobs.model import Claim, JobState, completed
from viralfx.jobs.notifier import JobNotification
from viralfx.jobs.worker.running import BegunJobs, Execution

LEASE = 0.6
LIMIT = 20.0
"""Seconds after which a wait of a test fails."""
JOBS, TAKEN = 5, 4
"""Jobs that have not begun, and those of them that another worker takes."""


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Return a ledger and a notifier in real time."""
    fleet = Fleet(SystemClock())
    yield fleet
    await fleet.stop()


class Store:
    """Renews in the ledger; once the loop is blocked, another worker claims what is released."""

    def __init__(self, fleet: Fleet) -> None:
        self._ledger = fleet.memory_ledger
        self._loop = asyncio.get_running_loop()
        self._released = threading.Event()
        self.kept: Collection[str] | None = None
        """The ids of the jobs that the blocked worker has kept."""
        self.taken: list[Claim] = []

    def block(self) -> None:
        """Block the event loop, once, until the other worker has jobs."""
        if not self._released.is_set():
            assert self._released.wait(LIMIT)

    async def register(
        self,
        worker: str,
        queues: Collection[str],
        lease: float,
        holding: Collection[str] | None = None,
        **more: Any,
    ) -> Registration:
        """Renew on the loop of the ledger, or here while that one is blocked."""
        renewing = self._ledger.register(worker, queues, lease, holding, **more)
        if more["eligible"]:
            running = asyncio.run_coroutine_threadsafe(renewing, self._loop)
            return await asyncio.wrap_future(running)
        answer = await renewing
        if not self._released.is_set():
            self.kept = holding
            self.taken += await self._ledger.claim("default", "other", TAKEN)
            self._released.set()
        return answer

    async def close(self) -> None:
        """Do nothing."""


class BlockingLedger(FaultyLedger):
    """A ledger whose caller's loop is blocked at a moment of a call."""

    def __init__(self, fleet: Fleet, block: Callable[[], None], where: str) -> None:
        super().__init__(fleet.memory_ledger)
        self._block = block
        self._where = where

    async def claim(self, *arguments: Any, **options: Any) -> Claims:
        """Claim, and block before the caller has the answer."""
        claims = await super().claim(*arguments, **options)
        if claims and self._where == "before the answer to a claim is read":
            self._block()
        return claims

    async def settle_with_effect(
        self,
        claim: Claim,
        effect: Callable[[Any], Awaitable[bytes]],
        progress: Callable[[], bytes | None] = lambda: None,
    ) -> bool:
        """Block once the transaction has begun, and before the task."""

        async def late(connection: Any) -> bytes:
            self._block()
            return await effect(connection)

        return await super().settle_with_effect(claim, late, progress)


@pytest.mark.parametrize(
    "where",
    ["in a task", "before the answer to a claim is read", "before the task in a transaction"],
)
async def test_jobs_that_have_not_begun_go_to_other_workers(
    fleet: Fleet, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At no cost, and each runs once; those that have begun stay."""
    store, finish = Store(fleet), asyncio.Event()

    async def wait(_: Any) -> None:
        await finish.wait()

    async def block(_: Any) -> None:
        store.block()

    async def write(payload: Any, _: Any) -> Any:
        return await fleet.note(payload)

    fleet.declare("wait", wait)
    fleet.declare("block", block)
    fleet.declare("write", write, transactional=True)
    ledger = BlockingLedger(fleet, store.block, where)
    await ledger.register("other", ["default"], LIMIT)
    begun: list[str] = []
    worker = fleet.worker(lease=LEASE, ledger=ledger, open_lease_store=lambda: store)
    if where != "before the answer to a claim is read":
        begun.append(await fleet.accept("wait"))
        worker.start()
        await until(lambda: [each.id for each in worker.running if each.seconds is not None])
    if where == "in a task":
        begun.append(await fleet.accept("block", priority=1))
    task = "write" if where == "before the task in a transaction" else "note"
    jobs = [await fleet.accept(task, str(number)) for number in range(JOBS)]
    if begun:
        ids = (*begun[1:], *jobs)
        await fleet.notifier.notify(JobNotification(queue="default", ids=ids))
    else:
        worker.start()
    await until(lambda: store.taken)
    await fleet.memory_ledger.settle([completed(each, b"1") for each in store.taken])
    finish.set()
    await fleet.final(*jobs, *begun)
    ended = [await fleet.job(each) for each in jobs]
    kept = [await fleet.job(each) for each in begun]

    assert set(store.kept or ()) == set(begun)
    assert [each.id for each in store.taken] == jobs[:TAKEN]
    assert {(each.state, each.claims, each.crashes) for each in ended} == {
        (JobState.COMPLETED, 2, 0)
    }
    assert {each.history for each in ended} == {()}
    assert fleet.done == list(range(TAKEN, JOBS))
    assert {(each.state, each.claims, each.crashes) for each in kept} <= {
        (JobState.COMPLETED, 1, 0)
    }
    assert worker.fenced == 0
    assert not [text for text in caplog.messages if text.startswith("Outcome not recorded")]


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_job_whose_payload_blocks_the_loop_has_begun(
    fleet: Fleet, *, transactional: bool
) -> None:
    """Otherwise it would block each worker in turn, without an attempt."""
    store = Store(fleet)

    class Blocking(msgspec.Struct):
        def __post_init__(self) -> None:
            store.block()

    async def read(payload: Blocking, *_: Any) -> None:
        fleet.done.append(payload)

    fleet.declare("read", read, payload_type=Blocking, transactional=transactional)
    await fleet.memory_ledger.register("other", ["default"], LIMIT)
    worker = fleet.worker(lease=LEASE, open_lease_store=lambda: store)
    job_id = await fleet.accept("read", "{}")
    worker.start()
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert store.kept == (job_id,)
    assert store.taken == []
    assert (job.state, job.claims, len(fleet.done)) == (JobState.COMPLETED, 1, 1)


def test_a_job_is_kept_or_does_not_begin() -> None:
    """Also if the thread comes between the check and the record of a job that begins."""
    begun = BegunJobs()
    kept: list[Sequence[str]] = []
    thread = threading.Thread(target=lambda: kept.append(begun.release()))

    class Interrupted(Execution):
        """The thread comes when it is recorded."""

        __slots__ = ()

        def __hash__(self) -> int:
            if thread.ident is None:
                thread.start()
                thread.join(0.1)  # without the lock it ends meanwhile
            return id(self)

    first, second = Interrupted(claim(), begun.releases), Execution(claim(), begun.releases)
    began = begun.begin(first)
    thread.join(LIMIT)

    assert began
    assert kept == [(first.claim.id,)]
    assert not begun.begin(second)
    assert begun.is_released(second)
    assert begun.begin(Execution(claim(), begun.releases))


def test_a_job_is_kept_until_its_outcome_is_recorded() -> None:
    """Also if another execution records it, because the task ignores its timeout."""
    begun = BegunJobs()
    task, recording = Execution(claim(), begun.releases), Execution(claim())
    assert begun.begin(task)
    assert begun.release() == (task.claim.id,)
    begun.replace(task, recording)
    begun.end(task)
    assert begun.release() == (task.claim.id,)
    assert not begun.is_released(recording)
    begun.end(recording)
    assert begun.release() == ()
