"""The job ledger on a real server: lost requests and lost responses."""

import asyncio
from collections.abc import Callable

import pytest
from tests.contracts.ledgers import ERROR, draft
from tests.integration.job_ledgers import NO_WORKER, QUICK, ledger_in, work
from tests.servers.fault_proxy import BLACKHOLE, PASS, RESET, CutAfter, FaultProxy, Mode
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database
from tests.servers.waiting import until

from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.model import JobNotFoundError, JobState, completed, failed, retried


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


@pytest.fixture
def proxy(database: Database, fault_proxy: FaultProxies) -> FaultProxy:
    """Return a proxy in front of the database server."""
    return fault_proxy(database.server.port)


def lose_the_response(proxy: FaultProxy) -> None:
    """Let the next statement arrive and cut its response; the network recovers soon."""
    _lose(proxy, CutAfter(0))


def lose_the_request(proxy: FaultProxy) -> None:
    """Cut the next statement before it arrives; the network recovers soon."""
    _lose(proxy, BLACKHOLE)


def _lose(proxy: FaultProxy, mode: Mode) -> None:
    loop, before = asyncio.get_running_loop(), proxy.struck
    proxy.mode = mode

    def go_on() -> None:
        if proxy.struck == before:  # not yet: the next statement is lost in any case
            loop.call_later(0.005, go_on)
        elif mode is BLACKHOLE:
            proxy.mode = RESET
            loop.call_later(0.05, setattr, proxy, "mode", PASS)
        else:
            proxy.mode = PASS

    go_on()


LOSSES: dict[str, Callable[[FaultProxy], None]] = {
    "the answer": lose_the_response,
    "the question": lose_the_request,
}
lost = pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
Lose = Callable[[FaultProxy], None]


# -- one answer is lost ----------------------------------------------------------------------


@lost
async def test_accept_is_idempotent_after_a_lost_message(
    database: Database, proxy: FaultProxy, lose: Lose
) -> None:
    """The caller gets a new job, whichever of the two was lost."""
    drafts = [draft(), draft(key="key")]
    async with ledger_in(database, through=proxy) as ledger:
        await work(ledger)
        lose(proxy)
        accepted = await ledger.accept(drafts)
        again = await ledger.accept(drafts)

    assert [each.created for each in accepted] == [True, True]
    assert [each.created for each in again] == [False, False]
    assert [each.job for each in again] == [each.job for each in accepted]
    assert database.execute("select count(*) from viralfx_all_jobs") == [(4,)]


async def test_unacknowledged_job_is_kept(database: Database, proxy: FaultProxy) -> None:
    """A repeated accept finds it."""
    asked = draft()
    async with ledger_in(database, through=proxy, call_timeout=QUICK) as ledger:
        await work(ledger)
        proxy.mode = CutAfter(0)
        with pytest.raises(LedgerUnavailableError):
            await ledger.accept([asked])
        kept = database.execute("select count(*) from viralfx_all_jobs")
        proxy.mode = PASS
        (accepted,) = await ledger.accept([asked])

    assert kept == [(3,)]
    assert (accepted.created, accepted.job.id) == (False, asked.id)


@lost
@pytest.mark.parametrize("by_ids", [False, True])
async def test_claim_is_repeated_after_a_lost_message(
    database: Database, proxy: FaultProxy, lose: Lose, *, by_ids: bool
) -> None:
    """Jobs of the lost claim are claimed by the repetition."""
    drafts = [draft() for _ in range(5)]
    async with ledger_in(database, through=proxy) as ledger:
        other = await work(ledger)
        await ledger.claim("default", "w", 1, [NO_WORKER])
        await ledger.accept(drafts)
        lose(proxy)
        claims = await ledger.claim("default", "w", 3, [d.id for d in drafts] if by_ids else None)
        taken = await ledger.settle([completed(claim, b"1") for claim in claims])
        counts = (await ledger.counts())["default"]

    expected = [asked.id for asked in drafts[:3]]
    assert [claim.id for claim in claims] == expected
    assert {claim.number for claim in claims} == {2 if lose is lose_the_response else 1}
    assert set(taken) == set(expected)
    assert (counts.waiting, counts.active, counts.completed) == (2, 1, 4)
    assert other.id not in expected


async def test_jobs_of_an_unacknowledged_claim_are_returned(
    database: Database, proxy: FaultProxy
) -> None:
    """The worker is alive, so no sweep returns them; its heartbeat does not list them."""
    lease = 2.0
    async with ledger_in(database, through=proxy, call_timeout=QUICK) as ledger:
        other = await work(ledger)
        await ledger.accept([asked := draft()])
        proxy.mode = CutAfter(0)
        with pytest.raises(LedgerUnavailableError):
            await ledger.claim("default", "w", 1)
        rows = database.execute("select state, worker from viralfx_jobs where key is null")
        assert rows.count(("active", "w")) == 2
        proxy.mode = PASS
        async with asyncio.timeout(10):
            while not (claims := await ledger.claim("default", "w2", 1)):
                await ledger.register("w", ["default"], lease, [other.id])
                swept = await ledger.sweep(1)
                assert (swept.returned, swept.crashed) == ({}, [])

    assert [(claim.id, claim.number, claim.crashes) for claim in claims] == [(asked.id, 2, 0)]


@lost
async def test_settle_is_idempotent_after_a_lost_message(
    database: Database, proxy: FaultProxy, lose: Lose
) -> None:
    """Each outcome counts once, and the caller gets its confirmation."""
    async with ledger_in(database, through=proxy) as ledger:
        await work(ledger)
        await ledger.accept([draft() for _ in range(3)])
        done, again, lost_for_good = await ledger.claim("default", "w", 3)
        lose(proxy)
        outcomes = [
            completed(done, b"1"),
            retried(again, ERROR, 60.0),
            failed(lost_for_good, ERROR),
        ]
        taken = await ledger.settle(outcomes)
        counts = (await ledger.counts())["default"]
        job = await ledger.get(again.id)

    assert set(taken) == {done.id, again.id, lost_for_good.id}
    assert (counts.completed, counts.failed, counts.scheduled) == (2, 1, 1)
    assert job is not None
    assert (job.state, job.attempts) == (JobState.WAITING, 1)


async def test_repeated_settle_respects_newer_claims(database: Database, proxy: FaultProxy) -> None:
    """A swept job looks like one that was handed back, but was not."""
    async with ledger_in(database, through=proxy) as ledger:
        mine = await work(ledger)
        database.execute("update viralfx_workers set lease_until = now() - interval '1 s'")
        await ledger.sweep(5)
        lose_the_response(proxy)
        taken = await ledger.settle([retried(mine, ERROR, 0.0), completed(mine, b"1")])
        job = await ledger.get(mine.id)

    assert set(taken) == set()
    assert job is not None
    assert (job.state, job.crashes, job.attempts) == (JobState.WAITING, 1, 0)


@lost
async def test_retry_and_cancel_are_idempotent_after_a_lost_message(
    database: Database, proxy: FaultProxy, lose: Lose
) -> None:
    """Both return the job's new state."""
    async with ledger_in(database, through=proxy) as ledger:
        claim = await work(ledger)
        await ledger.settle([failed(claim, ERROR)])
        for change in (ledger.retry, ledger.cancel):
            with pytest.raises(JobNotFoundError):
                await change(NO_WORKER)
        lose(proxy)
        retried_job = await ledger.retry(claim.id)
        await until(lambda: proxy.mode is PASS)
        lose(proxy)
        cancelled_job = await ledger.cancel(claim.id)
        await until(lambda: proxy.mode is PASS)
        counts = (await ledger.counts())["default"]

    assert (retried_job.state, cancelled_job.state) == (JobState.WAITING, JobState.CANCELLED)
    assert (counts.failed, counts.cancelled, counts.completed) == (0, 1, 1)
