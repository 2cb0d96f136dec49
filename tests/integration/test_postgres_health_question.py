"""The question that the checks of database and queues share: asked once, answered to both."""

import asyncio
import time
from typing import Any

import pytest
from tests.integration.postgres_clients import checked, config_of, migrated, opened, until
from tests.manual_clock import ManualClock
from tests.servers.fault_proxy import REFUSE
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer, postgres_server

from viralfx.adapters.postgres import PostgresConfig, PostgresDatabase, PostgresJobLedger
from viralfx.domain.clock import SystemClock
from viralfx.domain.health import CheckPolicy, Status
from viralfx.domain.jobs.backlog import BacklogCheck
from viralfx.domain.jobs.job import JobDraft, LedgerUnavailableError, NotMigratedError, new_job_id
from viralfx.domain.monitor import HealthMonitor


async def prepared(database: Database | PostgresServer) -> PostgresConfig:
    """Return how to reach a database whose schema is current."""
    return await migrated(config_of(database))


def a_job() -> JobDraft:
    """Return a job."""
    return JobDraft(id=new_job_id(), queue="default", task="t", payload=b"{}")


async def test_the_counts_are_those_of_the_ledger(database: Database) -> None:
    """Also where the question is the first one ever, and where there is no job at all."""
    async with opened(await prepared(database)) as pool, checked(pool) as check:
        ledger = PostgresJobLedger(pool)
        assert await check.question.counts() == {} == await ledger.counts()
        await ledger.accept([a_job() for _ in range(3)])
        assert (await check.question.counts())["default"].waiting == 3
        assert (await check.question.counts(max_age=60.0))["default"].waiting == 3
        await ledger.accept([a_job()])
        # As young as was asked for, which these are.
        assert (await check.question.counts(max_age=60.0))["default"].waiting == 3
        assert (await check.question.counts())["default"].waiting == 4


async def test_they_are_to_be_had_while_the_pool_is_exhausted(database: Database) -> None:
    """How many jobs wait matters most when everything is busy."""
    config = config_of(database, pool_max=1, pool_timeout=60.0)
    await migrated(config)
    async with opened(config) as pool, checked(pool) as check, pool.acquire():
        assert await check.question.counts() == {}


async def test_both_checks_together_cost_one_command_an_interval() -> None:
    """Whatever their phases are."""
    settings = {"log_statement": "all", "log_line_prefix": "[%a] "}
    interval = 0.25
    with postgres_server(settings=settings) as server:

        def asked() -> int:
            lines = server.log().splitlines()
            return sum("LOG:  execute" in line and "health]" in line for line in lines)

        async with opened(await prepared(server)) as pool, checked(pool) as check:
            monitor = HealthMonitor(clock=SystemClock())
            policy = CheckPolicy(interval=interval)
            monitor.register("database", check, policy)
            queues = BacklogCheck(counts=lambda: check.question.counts(1.25 * interval))
            monitor.register("queues", queues, policy)
            monitor.start()
            await until(lambda: monitor.report().started)
            before, began = asked(), time.monotonic()
            await until(lambda: time.monotonic() > began + 3.0)
            questions, seconds = asked() - before, time.monotonic() - began
            report = monitor.report()
            await monitor.stop()

    assert 4 <= questions <= seconds / interval + 1
    assert [check.status for check in report.checks.values()] == [Status.PASS, Status.PASS]


async def test_a_forced_round_counts_what_was_there_when_it_was_asked_for(
    database: Database,
) -> None:
    """Whenever that is: the queues are looked at after the database, and share its new answer."""
    gap, interval = 0.1, 0.3
    told = []
    async with opened(await prepared(database)) as pool, checked(pool) as check:
        ledger = PostgresJobLedger(pool)
        monitor = HealthMonitor(clock=SystemClock(), refresh_gap=gap)
        monitor.register("database", check, CheckPolicy(interval=0.6 * interval))
        queues = BacklogCheck(counts=lambda: check.question.counts(1.25 * interval))
        monitor.register("queues", queues, CheckPolicy(interval=interval, follows="database"))
        monitor.start()
        await until(lambda: monitor.report().started)
        for turn in range(1, 31):
            later = time.monotonic() + gap + turn * interval / 30
            await until(lambda later=later: time.monotonic() > later)  # type: ignore[misc]
            await ledger.accept([a_job()])
            details: Any = (await monitor.refresh()).checks["queues"].details
            told.append(details[0]["metrics"]["waiting"])
        await monitor.stop()

    assert told == list(range(1, 31))


async def test_a_question_under_way_answers_nobody_who_asks_for_a_new_one(
    own_postgres: PostgresServer,
) -> None:
    """The server may have counted already; who is content with some age waits for it."""
    async with opened(await prepared(own_postgres)) as pool, checked(pool) as check:
        await check.check()
        own_postgres.freeze()
        try:
            asked = []
            for max_age in (0.0, 60.0, 0.0):
                asked.append(asyncio.create_task(check.question.ask(max_age)))
                await asyncio.sleep(0)
        finally:
            own_postgres.thaw()
        under_way, shared, new = await asyncio.gather(*asked)

    assert shared is under_way
    assert new is not under_way


async def test_locked_tables_of_jobs_are_no_fault_of_the_database(database: Database) -> None:
    """A migration of them must not take every instance out of the traffic."""
    async with opened(await prepared(database)) as pool, checked(pool, within=1.0) as check:
        queues = BacklogCheck(counts=check.question.counts)
        assert (await check.check()).status is Status.PASS
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK TABLE viralfx_jobs IN ACCESS EXCLUSIVE MODE")
            locked = await check.check()
            backlog = await queues.check()
        after = await queues.check()

    assert (locked.status, locked.code) == (Status.PASS, None)
    assert (backlog.status, backlog.code) == (Status.FAIL, "unavailable")
    assert str(backlog.error) == "the database cancelled a statement"
    assert after.status is Status.PASS


async def test_a_schema_that_is_behind_has_no_counts(database: Database) -> None:
    """And says so."""
    async with opened(config_of(database)) as pool, checked(pool) as check:
        seen = await BacklogCheck(counts=check.question.counts).check()

    assert (seen.status, seen.code) == (Status.FAIL, "not_migrated")
    assert isinstance(seen.error, NotMigratedError)


async def test_a_failure_is_shared_by_all_who_wait_for_the_answer(
    own_postgres: PostgresServer,
) -> None:
    """Nobody waits for a second question after the first was not answered."""
    within = 0.5
    async with (
        opened(await prepared(own_postgres)) as pool,
        checked(pool, within=within) as check,
    ):
        await check.check()
        own_postgres.freeze()
        try:
            began = time.monotonic()
            asked = [check.question.ask(), check.question.counts(), check.question.ask()]
            errors = await asyncio.gather(*asked, return_exceptions=True)
            took = time.monotonic() - began
        finally:
            own_postgres.thaw()

    assert [type(error) for error in errors] == [
        TimeoutError,
        LedgerUnavailableError,
        TimeoutError,
    ]
    assert within <= took < 2 * within


async def test_a_failure_is_shared_for_a_second_with_who_takes_answers_of_some_age(
    database: Database, fault_proxy: FaultProxies
) -> None:
    """A database that fails is not asked again by the next check of the same round."""
    proxy = fault_proxy(database.server.port)
    proxy.mode = REFUSE
    clock = ManualClock()
    failing = PostgresDatabase(config_of(database, through=proxy), clock=SystemClock())
    asked = []
    async with checked(failing, clock=clock) as check:
        assert (await check.check()).status is Status.FAIL
        for seconds, max_age in ((1.0, 60.0), (0.01, 60.0), (0.5, 0.4), (0.3, 0.4), (0.01, 0.0)):
            await clock.advance(seconds)
            with pytest.raises(LedgerUnavailableError):
                await check.question.counts(max_age)
            asked.append(failing.failed_connections)

    assert asked == [1, 2, 3, 3, 4]


async def test_who_asked_and_went_away_leaves_the_turn_to_the_next(
    own_postgres: PostgresServer,
) -> None:
    """The next one asks anew, on another connection."""
    async with opened(await prepared(own_postgres)) as pool, checked(pool) as check:
        await check.check()
        own_postgres.freeze()
        try:
            gone = asyncio.create_task(check.question.ask())
            waiting = asyncio.create_task(check.question.ask())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait({gone})
        finally:
            own_postgres.thaw()
        assert not (await waiting).read_only
