"""The job ledger on a real server: questions and answers that are lost on the way."""

import asyncio
from collections.abc import Callable

import pytest
from tests.contracts.ledgers import ERROR, draft
from tests.integration.job_ledgers import NOBODY, QUICK, ledger_in, work
from tests.integration.postgres_clients import until
from tests.servers.fault_proxy import BLACKHOLE, PASS, RESET, CutAfter, FaultProxy, Mode
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database

from viralfx.domain.jobs.job import (
    JobNotFoundError,
    JobState,
    LedgerUnavailableError,
    completed,
    failed,
    retried,
)


@pytest.fixture
def database(migrated_database: Database) -> Database:
    """Return a database with the tables of jobs."""
    return migrated_database


@pytest.fixture
def proxy(database: Database, fault_proxy: FaultProxies) -> FaultProxy:
    """Return a proxy in front of the database's server."""
    return fault_proxy(database.server.port)


def lose_the_answer(proxy: FaultProxy) -> None:
    """Let the next question arrive, and cut its answer; all is well a little later."""
    _lose(proxy, CutAfter(0))


def lose_the_question(proxy: FaultProxy) -> None:
    """Let the next question not arrive; all is well a little later."""
    _lose(proxy, BLACKHOLE)


def _lose(proxy: FaultProxy, mode: Mode) -> None:
    loop, before = asyncio.get_running_loop(), proxy.struck
    proxy.mode = mode

    def go_on() -> None:
        if proxy.struck == before:  # not yet: however long the question takes, it is lost
            loop.call_later(0.005, go_on)
        elif mode is BLACKHOLE:
            proxy.mode = RESET
            loop.call_later(0.05, setattr, proxy, "mode", PASS)
        else:
            proxy.mode = PASS

    go_on()


LOSSES: dict[str, Callable[[FaultProxy], None]] = {
    "the answer": lose_the_answer,
    "the question": lose_the_question,
}
lost = pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
Lose = Callable[[FaultProxy], None]


# -- one answer is lost ----------------------------------------------------------------------


@lost
async def test_accepting_without_an_answer_accepts_once(
    database: Database, proxy: FaultProxy, lose: Lose
) -> None:
    """The caller hears that it was accepted just now, whichever of the two was lost."""
    drafts = [draft(), draft(key="key")]
    async with ledger_in(database, through=proxy) as ledger:
        await work(ledger)
        lose(proxy)
        accepted = await ledger.accept(drafts)
        again = await ledger.accept(drafts)

    assert [each.created for each in accepted] == [True, True]
    assert [each.created for each in again] == [False, False]
    assert [each.job for each in again] == [each.job for each in accepted]
    assert database.execute("select count(*) from viralfx_jobs") == [(4,)]


async def test_a_job_of_which_its_caller_heard_nothing_is_kept(
    database: Database, proxy: FaultProxy
) -> None:
    """Accepting it once more, when that can be done again, finds it."""
    asked = draft()
    async with ledger_in(database, through=proxy, patience=QUICK) as ledger:
        await work(ledger)
        proxy.mode = CutAfter(0)
        with pytest.raises(LedgerUnavailableError):
            await ledger.accept([asked])
        kept = database.execute("select count(*) from viralfx_jobs")
        proxy.mode = PASS
        (accepted,) = await ledger.accept([asked])

    assert kept == [(3,)]
    assert (accepted.created, accepted.job.id) == (False, asked.id)


@lost
@pytest.mark.parametrize("by_ids", [False, True])
async def test_a_claim_without_an_answer_is_made_again(
    database: Database, proxy: FaultProxy, lose: Lose, *, by_ids: bool
) -> None:
    """What the lost one took is given to the one that comes through."""
    drafts = [draft() for _ in range(5)]
    async with ledger_in(database, through=proxy) as ledger:
        other = await work(ledger)
        await ledger.claim("default", "w", 1, [NOBODY])
        await ledger.accept(drafts)
        lose(proxy)
        claims = await ledger.claim("default", "w", 3, [d.id for d in drafts] if by_ids else None)
        taken = await ledger.settle([completed(claim, b"1") for claim in claims])
        counts = (await ledger.counts())["default"]

    expected = [asked.id for asked in drafts[:3]]
    assert [claim.id for claim in claims] == expected
    assert {claim.number for claim in claims} == {2 if lose is lose_the_answer else 1}
    assert set(taken) == set(expected)
    assert (counts.waiting, counts.active, counts.completed) == (2, 1, 4)
    assert other.id not in expected


async def test_what_a_claim_took_whose_caller_heard_nothing_comes_back(
    database: Database, proxy: FaultProxy
) -> None:
    """Its worker lives, so no sweep takes it; the worker does not name it, so it waits again."""
    lease = 2.0
    async with ledger_in(database, through=proxy, patience=QUICK) as ledger:
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
async def test_settling_without_an_answer_settles_once(
    database: Database, proxy: FaultProxy, lose: Lose
) -> None:
    """Each outcome counts once, and the caller hears that it was taken."""
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


async def test_settling_without_an_answer_takes_nothing_that_is_anothers(
    database: Database, proxy: FaultProxy
) -> None:
    """A job that was swept meanwhile looks as if it had been handed back, and was not."""
    async with ledger_in(database, through=proxy) as ledger:
        mine = await work(ledger)
        database.execute("update viralfx_workers set lease_until = now() - interval '1 s'")
        await ledger.sweep(5)
        lose_the_answer(proxy)
        taken = await ledger.settle([retried(mine, ERROR, 0.0), completed(mine, b"1")])
        job = await ledger.get(mine.id)

    assert set(taken) == set()
    assert job is not None
    assert (job.state, job.crashes, job.attempts) == (JobState.WAITING, 1, 0)


@lost
async def test_a_change_without_an_answer_is_made_once(
    database: Database, proxy: FaultProxy, lose: Lose
) -> None:
    """Retry and cancel are answered with what the job is now."""
    async with ledger_in(database, through=proxy) as ledger:
        claim = await work(ledger)
        await ledger.settle([failed(claim, ERROR)])
        for change in (ledger.retry, ledger.cancel):
            with pytest.raises(JobNotFoundError):
                await change(NOBODY)
        lose(proxy)
        retried_job = await ledger.retry(claim.id)
        await until(lambda: proxy.mode is PASS)
        lose(proxy)
        cancelled_job = await ledger.cancel(claim.id)
        await until(lambda: proxy.mode is PASS)
        counts = (await ledger.counts())["default"]

    assert (retried_job.state, cancelled_job.state) == (JobState.WAITING, JobState.CANCELLED)
    assert (counts.failed, counts.cancelled, counts.completed) == (0, 1, 1)
