"""Outcomes and jobs that Postgres refuses, or whose calls do not end, beside good ones."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from tests.contracts.ledgers import ERROR, LONG_LEASE, draft
from tests.integration.job_ledgers import ledger_in, work
from tests.integration.postgres_clients import checked, config_of, opened
from tests.servers.postgres import Database
from tests.servers.waiting import wait_for_code
from tests.soak import SOAK

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.errors import LedgerLimitError, LedgerUnavailableError, UnstorableError
from viralfx.jobs.codec import PayloadError, PayloadTooLargeError
from viralfx.jobs.ledger import PartlyDoneError
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.model import Job, JobState, cancelled, completed, failed
from viralfx.jobs.postgres import PostgresJobLedger, ledger_sql
from viralfx.jobs.postgres.ledger_sql import MAX_SWEPT_JOBS, PROMOTED_AT_ONCE
from viralfx.jobs.postgres.settlements import record, record_unlocked
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import Task, TaskRegistry
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig
from viralfx.postgres.migrations import Statements
from viralfx.postgres.retry import Attempt

HOUR = timedelta(hours=1)
TABLES = ("viralfx_jobs", "viralfx_finished_jobs")
REFUSE = """
create function refuse() returns trigger language plpgsql as $$
begin
    if new.payload::text like '%bad%' and {condition} then {action}; end if;
    return new;
end $$
"""
TRIGGER = """
create trigger refuse before insert or update on {table}
for each row execute function refuse();
"""


WAITS_LONGER = """
select count(*) from pg_stat_activity
where wait_event_type = 'Lock' and query_start < clock_timestamp() - interval '1 s'
"""
"""How many statements wait for a lock, and for longer than a batch waits for that of a job."""
LOCK = "select from viralfx_ops.viralfx_jobs where id = $1 for update"


def refuse(
    database: Database, condition: str, *, sqlstate: str = "P0001", action: str | None = None
) -> None:
    """Refuse changes of jobs whose payload contains "bad", under a condition on the new row."""
    action = action or f"raise exception 'not this one' using errcode = '{sqlstate}'"
    database.execute(REFUSE.format(condition=condition, action=action))
    for table in TABLES:
        database.execute(TRIGGER.format(table=table))


def allow(database: Database) -> None:
    """Drop the triggers."""
    for table in TABLES:
        database.execute(f"drop trigger refuse on {table}")


async def echo(value: object) -> object:
    """Return the payload."""
    return value


class Unchecked(MsgspecCodec):
    """Encodes any raw document, however deep."""

    def encode(self, value: object, *_: Any, **__: Any) -> bytes:
        """Encode without checks."""
        return msgspec.json.encode(value)


@dataclass
class System:
    """A service and its worker."""

    service: JobService
    worker: JobWorker
    ledger: PostgresJobLedger

    async def submit(self, *texts: str, queue: str = "default") -> list[str]:
        """Accept jobs at once; return their ids."""
        calls = [self.service.submit(f"echo.{queue}", text) for text in texts]
        return [accepted.job.id for accepted in await asyncio.gather(*calls)]

    async def final(self, *ids: str, within: float = 20.0) -> list[Job]:
        """Return the jobs once all are final."""
        async with asyncio.timeout(within):
            jobs = [await self.service.get(job_id) for job_id in ids]
            while not all(job.state.final for job in jobs):
                await asyncio.sleep(0.02)
                jobs = [await self.service.get(job_id) for job_id in ids]
        return jobs

    async def until(self, condition: Callable[[], bool], within: float = 20.0) -> None:
        """Wait until a condition holds."""
        async with asyncio.timeout(within):
            while not condition():  # noqa: ASYNC110 - it is looked up
                await asyncio.sleep(0.02)


@asynccontextmanager
async def system(
    database: Database,
    *,
    task: Callable[[Any], Awaitable[object]] = echo,
    codec: MsgspecCodec | None = None,
    call_timeout: float = 8.0,
    max_result_bytes: int = 2**20,
    **config: Any,
) -> AsyncIterator[System]:
    """Run a worker of the queues ``default`` and ``other``; ``task`` is the task of both."""
    codec, queues = codec or MsgspecCodec(), ("default", "other")
    tasks = TaskRegistry()
    for queue in queues:
        tasks.add(
            Task(
                name=f"echo.{queue}",
                function=task,
                queue=queue,
                payload_type=Any,
                wants_context=False,
                transactional=False,
                timeout=None,
                retry=None,
            )
        )
    async with opened(config_of(database, pool_max=10, **config)) as pool:
        ledger = PostgresJobLedger(pool, timeout=call_timeout)
        service = JobService(
            ledger=ledger,
            tasks=tasks,
            codec=codec,
            queues=queues,
            max_payload_bytes=max_result_bytes,
        )
        worker = JobWorker(
            WorkerConfig(
                name="w",
                queues=dict.fromkeys(queues, 20),
                lease=1.5,
                poll_interval=0.05,
                max_result_bytes=max_result_bytes,
            ),
            ledger=ledger,
            notifier=MemoryNotifier(),
            tasks=tasks,
            codec=codec,
        )
        worker.start()
        try:
            yield System(service, worker, ledger)
        finally:
            await worker.drain(2.0)


def outcome(job: Job) -> tuple[JobState, str | None]:
    """Return state and error code."""
    return job.state, None if job.error is None else job.error.code


GOOD = (JobState.COMPLETED, None)
RESULT = (JobState.FAILED, "result")


@pytest.mark.parametrize(
    "sqlstate", ["P0001", "23514", "22012", "42501", "54001", "XX000", "UE001"]
)
async def test_a_trigger_that_refuses_a_result_fails_its_job_alone(
    migrated_database: Database, sqlstate: str
) -> None:
    """With any SQLSTATE that is not the server's own state."""
    async with system(migrated_database) as running:
        refuse(migrated_database, "new.state = 'completed'", sqlstate=sqlstate)
        ids = await running.submit(*"abc", "bad", *"def")
        jobs = await running.final(*ids)

    assert [outcome(job) for job in jobs] == [*[GOOD] * 3, RESULT, *[GOOD] * 3]
    assert jobs[3].error is not None
    assert f"not this one (SQLSTATE {sqlstate})" in jobs[3].error.message
    assert (jobs[3].attempts, jobs[3].claims) == (1, 1)


async def test_a_row_that_refuses_every_outcome_keeps_its_result(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It is reported, blocks nothing, and completes once the trigger is gone."""
    async with system(migrated_database) as running:
        refuse(migrated_database, "new.state not in ('waiting', 'active')")
        bad, *good = await running.submit("bad", *"abcdef")
        other = await running.submit(*"abc", queue="other")
        jobs = await running.final(*good, *other)
        await running.until(lambda: running.worker.unrecorded == 1)
        report = running.worker.report_unrecorded()
        later = await running.final(*await running.submit(*"ghi"), within=3.0)
        stuck = await running.service.get(bad)
        allow(migrated_database)
        (job,) = await running.final(bad)

    assert {outcome(job) for job in (*jobs, *later)} == {GOOD}
    assert (stuck.state, dict(report)) == (JobState.ACTIVE, {"default": 1})
    assert (outcome(job), job.result, job.claims) == (GOOD, b'"bad"', 1)
    (line,) = [each.__dict__ for each in caplog.records if "longer than" in each.getMessage()]
    assert line["jobs"] == [bad]


async def test_a_stack_that_is_too_deep_fails_its_job_alone(migrated_database: Database) -> None:
    """The server refuses what the codec would."""

    async def deep(value: str) -> object:
        return msgspec.Raw(b"[" * 100_000 + b"]" * 100_000) if value == "bad" else value

    async with system(migrated_database, task=deep, codec=Unchecked()) as running:
        jobs = await running.final(*await running.submit("a", "bad", "b"))

    assert [outcome(job) for job in jobs] == [GOOD, RESULT, GOOD]
    assert jobs[1].error is not None
    assert "SQLSTATE 54001" in jobs[1].error.message


async def test_a_locked_row_delays_only_itself(migrated_database: Database) -> None:
    """Its result is kept until the lock is released."""
    begin = asyncio.Event()

    async def wait(value: object) -> object:
        await begin.wait()
        return value

    within = 2.0
    async with system(migrated_database, task=wait, call_timeout=within) as running:
        bad, *good = await running.submit("bad", *"abcdef")
        other = await running.submit(*"abc", queue="other")
        await running.until(lambda: running.worker.active == 10)
        connection = await asyncpg.connect(migrated_database.url)
        try:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(
                "select from viralfx_ops.viralfx_jobs where id = $1 for update", bad
            )
            began = time.monotonic()
            begin.set()
            await running.final(*other)
            others = time.monotonic() - began
            later = await running.final(*await running.submit(*"ghi"))
            laters = time.monotonic() - began
            jobs = await running.final(*good)
            await running.until(lambda: running.worker.unrecorded == 1)
            await transaction.rollback()
        finally:
            await connection.close()
        (job,) = await running.final(bad)

    assert {outcome(each) for each in (*jobs, *later)} == {GOOD}
    assert (outcome(job), job.claims) == (GOOD, 1)
    assert others < within
    # All halves of the batch take thrice the time of a call.
    assert laters < 2 * within


async def test_a_call_over_the_statement_timeout_is_split(migrated_database: Database) -> None:
    """The statement of one row takes longer than DB_STATEMENT_TIMEOUT."""
    async with system(migrated_database, statement_timeout=0.5) as running:
        refuse(migrated_database, "new.state = 'completed'", action="perform pg_sleep(1)")
        bad, *good = await running.submit("bad", *"abcdef")
        jobs = await running.final(*good)
        await running.until(lambda: running.worker.unrecorded == 1)
        allow(migrated_database)
        (job,) = await running.final(bad)

    assert {outcome(each) for each in jobs} == {GOOD}
    assert (outcome(job), job.claims) == (GOOD, 1)


NO_LOGIN = """
create function refuse_login() returns event_trigger language plpgsql as $$
begin
    if current_setting('application_name') like 'viralfx%' then raise 'not now'; end if;
end $$
"""


async def test_a_refused_login_says_nothing_about_a_job(migrated_database: Database) -> None:
    """Its SQLSTATE may be any: job and outcome are tried again later."""
    if migrated_database.execute("select current_setting('server_version_num')::int / 10000") < [
        (17,)
    ]:
        pytest.skip("event triggers of logins are new in Postgres 17")
    async with (
        ledger_in(migrated_database, call_timeout=2.0) as ledger,
        opened(config_of(migrated_database)) as other,
        checked(other) as check,
    ):
        claim = await work(ledger)
        migrated_database.execute(NO_LOGIN)
        trigger = "create event trigger refuse_login on login execute function refuse_login()"
        migrated_database.execute(trigger)
        migrated_database.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name like 'viralfx%'"
        )
        await wait_for_code(check, "login_refused")
        for call in (ledger.accept([draft()]), ledger.settle([completed(claim, b"1")])):
            with pytest.raises(LedgerUnavailableError, match="refuses the login"):
                await call
        migrated_database.execute("drop event trigger refuse_login")
        await ledger.accept([draft()])
        assert await ledger.settle([completed(claim, b"1")]) == {claim.id}


async def seconds_to_settle(database: Database, result: bytes) -> float:
    """Return how long it takes to record one result."""
    async with ledger_in(database, call_timeout=60.0) as ledger:
        await ledger.accept([draft()])
        await ledger.register("measuring", ["default"], LONG_LEASE)
        (claim,) = await ledger.claim("default", "measuring", 1)
        began = time.monotonic()
        await ledger.settle([completed(claim, result)])
        return time.monotonic() - began


@pytest.mark.soak
@pytest.mark.parametrize("megabytes", [8, 20] if SOAK else [8])
async def test_large_results_at_once_are_recorded(
    migrated_database: Database, megabytes: int
) -> None:
    """Each of them alone passes, all of them in one call would not."""
    count = 10
    result = msgspec.Raw(b'"' + b"x" * (megabytes * 2**20) + b'"')
    patience = max(0.5, 4 * await seconds_to_settle(migrated_database, bytes(result)))

    runs = 0

    async def large(_: object) -> object:
        nonlocal runs
        runs += 1
        return result

    async with system(
        migrated_database,
        task=large,
        call_timeout=patience,
        statement_timeout=60.0,
        pool_timeout=60.0,
        max_result_bytes=2**28,
    ) as running:
        # Submitted first: a call beside so many bytes may take longer than the patience.
        other = await running.submit("x", queue="other")
        await running.submit(*["x"] * count)
        await running.until(lambda: runs == count + 1 and not running.worker.active, within=70.0)
        (beside,) = await running.final(*other)
        counts = (await running.service.queues())["default"]

    assert counts.completed == count + 1
    assert beside.claims == 1
    assert beside.result is not None
    assert len(beside.result) == megabytes * 2**20 + 2


async def test_a_result_over_the_limit_fails_its_job_at_once(migrated_database: Database) -> None:
    """The message has both sizes and the setting."""

    async def large(value: str) -> str:
        return value * 1000

    async with system(migrated_database, task=large, max_result_bytes=2048) as running:
        jobs = await running.final(*await running.submit("a", "large"))

    assert [outcome(job) for job in jobs] == [GOOD, RESULT]
    assert jobs[1].error is not None
    assert jobs[1].error.message.startswith(
        "the result has 5002 bytes of JSON, and JOB_MAX_RESULT_BYTES=2048: "
    )


# -- accepting --------------------------------------------------------------------------------


async def test_a_refused_draft_fails_its_caller_alone(migrated_database: Database) -> None:
    """The other callers of the batch get their jobs."""
    async with system(migrated_database) as running:
        refuse(migrated_database, "true", sqlstate="P0001")
        calls = [running.service.submit("echo.default", text) for text in ("a", "bad", "b", "c")]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        large = running.service.submit("echo.default", "x" * 2**20)
        with pytest.raises(PayloadTooLargeError, match="1048578 bytes of JSON, and JOB_MAX_RES"):
            await large

    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    assert [type(error) for error in errors] == [PayloadError]
    assert str(errors[0]) == "the job cannot be stored: not this one (SQLSTATE P0001)"


async def test_a_fault_of_the_server_is_not_the_callers(migrated_database: Database) -> None:
    """A missing permission, for example."""
    async with ledger_in(migrated_database) as ledger:
        refuse(migrated_database, "true", sqlstate="42501")
        with pytest.raises(UnstorableError, match="SQLSTATE 42501"):
            await ledger.accept([draft(), draft(payload=b'"bad"')])
        assert await ledger.counts() == {}


async def test_a_key_in_an_open_transaction_delays_only_its_caller(
    migrated_database: Database,
) -> None:
    """The other callers are answered within seconds, and not with 503."""
    async with system(migrated_database, call_timeout=3.0) as running:
        connection = await asyncpg.connect(migrated_database.url)
        try:
            async with connection.transaction():
                await running.ledger.accept_in(connection, [draft(key="k", task="echo.default")])
                blocked = asyncio.create_task(running.service.submit("echo.default", "a", key="k"))
                await asyncio.sleep(0.2)
                began = time.monotonic()
                jobs = await running.final(*await running.submit(*"abc"))
                seconds = time.monotonic() - began
                with pytest.raises(LedgerUnavailableError):
                    await blocked
        finally:
            await connection.close()

    assert {outcome(job) for job in jobs} == {GOOD}
    assert seconds < 2.5


# -- sweeping ---------------------------------------------------------------------------------


async def test_a_sweep_returns_the_jobs_beside_one_that_may_not_fail(
    migrated_database: Database,
) -> None:
    """Otherwise no job of a dead worker would run again."""
    refuse(migrated_database, "new.state = 'failed'")
    async with ledger_in(migrated_database) as ledger:
        await ledger.accept([draft(), draft(payload=b'"bad"'), draft()])
        await ledger.register("w", ["default"], 0.05)
        claims = await ledger.claim("default", "w", 3)
        async with asyncio.timeout(10):
            while not (swept := await ledger.sweep(1)).returned:  # noqa: ASYNC110 - it is swept
                await asyncio.sleep(0.02)

    assert set(swept.returned["default"]) == {claim.id for claim in claims}
    assert list(swept.crashed) == []


async def test_a_sweep_takes_the_jobs_beside_one_that_may_not_change(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Each to its own state; the one is named in the log, and taken once the trigger is gone."""
    async with ledger_in(migrated_database) as ledger:
        drafts = [draft(payload=each) for each in (b"1", b'"bad"', b"2", b'"poison"', b"3")]
        bad, poison = drafts[1].id, drafts[3].id
        await ledger.accept(drafts)
        migrated_database.execute(
            "update viralfx_jobs set crashes = 4 where payload::text like '%poison%'"
        )
        await ledger.register("w", ["default"], 0.05)
        await ledger.claim("default", "w", 5)
        refuse(migrated_database, "tg_op = 'UPDATE'")
        async with asyncio.timeout(10):
            while not (swept := await ledger.sweep(5)).returned:  # noqa: ASYNC110 - it is swept
                await asyncio.sleep(0.02)
        again = await ledger.sweep(5)
        allow(migrated_database)
        last = await ledger.sweep(5)

    good = {drafts[0].id, drafts[2].id, drafts[4].id}
    assert (set(swept.returned["default"]), list(swept.crashed)) == (good, [poison])
    assert (dict(again.returned), dict(last.returned)) == ({}, {"default": [bad]})
    lines = [each.__dict__ for each in caplog.records if "Sweep refused" in each.getMessage()]
    assert {(*line["jobs"], line["code"]) for line in lines} == {(bad, "P0001")}


async def test_scheduled_jobs_become_due_beside_one_that_may_not(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The refused one is named in the log."""
    async with ledger_in(migrated_database) as ledger:
        later = datetime.now(UTC) + HOUR
        drafts = [draft(payload=text, run_at=later) for text in (b"1", b'"bad"', b"2")]
        await ledger.accept(drafts)
        migrated_database.execute("update viralfx_jobs set run_at = now()")
        refuse(migrated_database, "tg_op = 'UPDATE' and new.state = 'waiting'")
        await ledger.register("w", ["default"], LONG_LEASE)
        await ledger.sweep(5)
        claims = await ledger.claim("default", "w", 3)

    assert {claim.id for claim in claims} == {drafts[0].id, drafts[2].id}
    (line,) = [each.__dict__ for each in caplog.records if "Promotion" in each.getMessage()]
    assert (line["jobs"], line["code"]) == ([drafts[1].id], "P0001")


async def test_a_sweep_returns_jobs_although_one_may_not_become_due(
    migrated_database: Database,
) -> None:
    """The sweep comes before the promotion of scheduled jobs."""
    async with ledger_in(migrated_database) as ledger:
        await ledger.accept([draft(payload=b'"bad"', run_at=datetime.now(UTC) + HOUR), draft()])
        migrated_database.execute("update viralfx_jobs set run_at = now()")
        refuse(migrated_database, "tg_op = 'UPDATE'")
        await ledger.register("w", ["default"], 0.05)
        (claim,) = await ledger.claim("default", "w", 3)
        swept: Mapping[str, Sequence[str]] = {}
        async with asyncio.timeout(10):
            while not swept:
                with suppress(LedgerUnavailableError):
                    swept = (await ledger.sweep(5)).returned
                await asyncio.sleep(0.02)

    assert swept == {"default": [claim.id]}


async def test_a_job_that_may_not_be_cancelled_keeps_no_other_active(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named in the log, and cancelled once the trigger is gone."""
    refuse(migrated_database, "new.state = 'cancelled'")
    async with ledger_in(migrated_database) as ledger:
        drafts = [draft(payload=text) for text in (b"1", b'"bad"', b"2", b"3", b'"bad"')]
        await ledger.accept(drafts)
        await ledger.register("w", ["default"], LONG_LEASE)
        claims = await ledger.claim("default", "w", 5)
        for claim in claims:
            await ledger.cancel(claim.id, running=True)
        await ledger.settle([cancelled(claim) for claim in claims])
        before = await ledger.counts()
        allow(migrated_database)
        swept = await ledger.sweep(5)

    bad = {drafts[1].id, drafts[4].id}
    assert (before["default"].cancelled, before["default"].active) == (3, 2)
    (line,) = [each.__dict__ for each in caplog.records if "Cancell" in each.getMessage()]
    assert (set(line["jobs"]), line["code"]) == (bad, "P0001")
    assert set(swept.cancelled) == bad


COPIES = """
insert into viralfx_jobs
select (json_populate_record(
    job, json_build_object('id', '00000000-0000-7000-8000-' || lpad(number::text, 12, '0'))
)).*
from viralfx_jobs as job, generate_series(1, {0}) as number where payload::text like '%bad%'
"""
"""Copies the job that the trigger refuses; the ids of the copies come before those of others."""
UPDATE = "update viralfx_jobs set claims = 1, "
WAITING = {
    "sweep": UPDATE + "state = 'active', worker = 'dead'",
    "promotion": UPDATE
    + "state = 'scheduled', run_at = now() - interval '1 s' * length(payload::text)",
    "cancellation": UPDATE + "state = 'active', cancel_requested = true",
}
"""Statements after which all jobs wait for a step of the sweep."""


@pytest.mark.parametrize("step", WAITING)
async def test_many_refused_jobs_do_not_stop_those_that_follow_them(
    migrated_database: Database, step: str
) -> None:
    """If a sweep takes no more than them, the next one goes on after them."""
    async with ledger_in(migrated_database) as ledger:
        good, bad = draft(payload=b"1"), draft(payload=b'"bad"')
        await ledger.accept([good, bad])
        migrated_database.execute(WAITING[step])
        at_once = PROMOTED_AT_ONCE if step == "promotion" else MAX_SWEPT_JOBS
        migrated_database.execute(COPIES.format(at_once))
        refuse(migrated_database, "(tg_op = 'UPDATE' or new.state = 'cancelled')")
        for _ in range(2):
            await ledger.sweep(5)
        states = "select payload::text, state from {0} where id in ('{1}', '{2}')"
        rows = [
            row
            for table in TABLES
            for row in migrated_database.execute(states.format(table, good.id, bad.id))
        ]

    expected = "cancelled" if step == "cancellation" else "waiting"
    before = "scheduled" if step == "promotion" else "active"
    assert dict(rows) == {"1": expected, '"bad"': before}


# -- jobs whose rows another session has locked -----------------------------------------------


@asynccontextmanager
async def locked(database: Database, job_id: str) -> AsyncIterator[None]:
    """Lock the row of a job, as a session of psql may."""
    connection = await asyncpg.connect(database.url)
    try:
        async with connection.transaction():
            await connection.execute(LOCK, job_id)
            yield
    finally:
        await connection.close()


async def test_outcomes_are_recorded_beside_one_whose_row_is_locked(
    migrated_database: Database,
) -> None:
    """It is recorded once the lock is gone, and its task runs once."""
    finish = asyncio.Event()

    async def wait(value: object) -> object:
        await finish.wait()
        return value

    async with system(migrated_database, task=wait) as running:
        first, *others = await running.submit(*"abcdef")
        await running.until(lambda: len(running.worker.running) == 6)
        async with locked(migrated_database, first):
            finish.set()
            jobs = await running.final(*others, within=5.0)
            kept = await running.service.get(first)
        (job,) = await running.final(first)

    assert {outcome(each) for each in (*jobs, job)} == {GOOD}
    assert (kept.state, job.claims) == (JobState.ACTIVE, 1)


async def test_outcomes_are_recorded_beside_several_whose_rows_are_locked(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if each is the only one of its batch."""
    caplog.set_level("WARNING", "viralfx.jobs")
    finish = {value: asyncio.Event() for value in "abcd"}

    async def wait(value: str) -> str:
        await finish[value].wait()
        return value

    async with system(migrated_database, task=wait) as running, AsyncExitStack() as locks:
        *ids, last = await running.submit(*finish)
        await running.until(lambda: len(running.worker.running) == 4)
        for job_id in ids:
            await locks.enter_async_context(locked(migrated_database, job_id))
        for value in "abc":
            before = len(caplog.messages)
            finish[value].set()
            await running.until(lambda: len(caplog.messages) > before)  # noqa: B023 - it is awaited
        finish["d"].set()
        (job,) = await running.final(last, within=5.0)
        await locks.aclose()
        jobs = await running.final(*ids)

    assert {(outcome(each), each.claims) for each in (*jobs, job)} == {(GOOD, 1)}
    assert {text.partition(":")[0] for text in caplog.messages} == {"Outcome waits"}


@pytest.mark.parametrize("again", [False, True], ids=["first attempt", "after a lost answer"])
async def test_a_lock_may_be_that_of_an_attempt_without_an_answer(
    migrated_database: Database, *, again: bool
) -> None:
    """The server still carries it out, so that the outcome may be recorded after all."""
    statements = Statements("viralfx_ops", ledger_sql)
    async with opened(config_of(migrated_database)) as pool:
        ledger = PostgresJobLedger(pool)
        claim = await work(ledger)
        outcomes = [completed(claim, b"1")]
        async with pool.acquire() as lost, pool.acquire() as other:
            async with lost.transaction():
                assert await record(Attempt(lost, again=False), statements, outcomes) == {claim.id}
                with pytest.raises(PartlyDoneError) as caught:
                    await record_unlocked(Attempt(other, again=again), statements, outcomes)
            settled = await ledger.settle(outcomes)

    assert (caught.value.left, caught.value.doubtful) == ({claim.id}, again)
    assert settled == set()


async def test_a_batch_waits_for_the_lock_of_a_trigger(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It belongs to no job, so each outcome would wait for it, also alone."""
    caplog.set_level("WARNING", "viralfx.jobs")
    migrated_database.execute("create table shared (number integer)")
    migrated_database.execute("insert into shared values (0)")
    async with system(migrated_database) as running:
        taken = "update public.shared set number = number + 1"
        refuse(migrated_database, "new.state = 'completed'", action=taken)
        connection = await asyncpg.connect(migrated_database.url)
        try:
            async with connection.transaction():
                await connection.execute("update public.shared set number = 10")
                ids = await running.submit(*[f"bad {number}" for number in range(6)])
                await running.until(lambda: running.worker.active == 6)
                await running.until(lambda: migrated_database.execute(WAITS_LONGER) != [(0,)])
        finally:
            await connection.close()
        jobs = await running.final(*ids)

    assert {outcome(each) for each in jobs} == {GOOD}
    assert caplog.messages == []
    assert migrated_database.execute("select number from shared") == [(16,)]


@pytest.mark.parametrize("passes", [False, True], ids=["to the end", "passes"])
async def test_a_stop_hands_back_jobs_beside_one_whose_row_is_locked(
    migrated_database: Database, *, passes: bool
) -> None:
    """Only that one is left, until the lock is gone."""
    waiting = {JobState.WAITING}
    async with system(migrated_database, task=lambda _: asyncio.Event().wait()) as running:
        first, *others = await running.submit(*"abcdef")
        await running.until(lambda: len(running.worker.running) == 6)
        async with locked(migrated_database, first):
            draining = asyncio.create_task(running.worker.drain(4.0 if passes else 2.0))
            async with asyncio.timeout(10):
                while await states(running, others) != waiting:  # noqa: ASYNC110 - it is looked up
                    await asyncio.sleep(0.02)
            if not passes:
                await draining
        report = await draining

    assert (report.handed_back, report.unrecorded) == ((6, 0) if passes else (5, 1))


async def states(running: System, ids: Sequence[str]) -> set[JobState]:
    """Return the states of jobs."""
    return {(await running.service.get(job_id)).state for job_id in ids}


async def test_a_stop_hands_back_jobs_beside_one_that_may_not_wait(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named in the log, and its worker keeps the lease for it."""
    async with ledger_in(migrated_database) as ledger:
        drafts = [draft(), draft(payload=b'"bad"'), draft()]
        await ledger.accept(drafts)
        await ledger.register("w", ["default"], LONG_LEASE)
        await ledger.claim("default", "w", 3)
        refuse(migrated_database, "new.state = 'waiting'")
        with pytest.raises(PartlyDoneError) as caught:
            await ledger.deregister("w")
        counts = await ledger.counts()
        allow(migrated_database)
        returned = await ledger.deregister("w")
        gone = await ledger.counts()

    assert set(caught.value.returned["default"]) == {drafts[0].id, drafts[2].id}
    assert (list(caught.value.left), counts["default"].consumers) == ([drafts[1].id], 1)
    assert (returned, gone["default"].consumers) == ({"default": [drafts[1].id]}, 0)
    assert [each.__dict__["jobs"] for each in caplog.records] == [[drafts[1].id]]


@asynccontextmanager
async def locked_worker(database: Database) -> AsyncIterator[None]:
    """Lock the row of the worker."""
    connection = await asyncpg.connect(database.url)
    try:
        async with connection.transaction():
            await connection.execute("select from viralfx_ops.viralfx_workers for update")
            yield
    finally:
        await connection.close()


async def test_a_worker_whose_row_is_locked_is_not_deregistered(
    migrated_database: Database,
) -> None:
    """Its jobs are handed back; the next call removes it."""
    async with ledger_in(migrated_database) as ledger:
        await work(ledger)
        async with locked_worker(migrated_database):
            with pytest.raises(PartlyDoneError, match="the row of the worker is locked") as kept:
                await ledger.deregister("w")
            locked_counts = await ledger.counts()
        returned = await ledger.deregister("w")
        counts = await ledger.counts()

    assert (len(kept.value.returned["default"]), list(kept.value.left)) == (1, [])
    assert (locked_counts["default"].consumers, counts["default"].consumers) == (1, 0)
    assert returned == {}


async def test_a_stop_waits_for_the_lock_of_the_row_of_its_worker(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Within its budget. Otherwise others would count the worker until its lease ends."""
    async with system(migrated_database) as running:
        await running.final(*await running.submit("a"))
        async with locked_worker(migrated_database):
            draining = asyncio.create_task(running.worker.drain(10.0))
            warned = "Job ledger did a part of a step: the row of the worker is locked"
            await running.until(lambda: warned in caplog.messages)
        report = await draining
        gone = migrated_database.execute("select worker from viralfx_workers")

    assert (report.unrecorded, gone) == (0, [])
    assert "Job worker could not deregister" not in caplog.text


async def test_a_lease_is_renewed_beside_a_job_that_may_not_be_released(
    migrated_database: Database,
) -> None:
    """Because its row is locked, or because a trigger refuses it; it is released later."""
    async with ledger_in(migrated_database, call_timeout=3.0) as ledger:
        drafts = [draft(), draft(payload=b'"bad"'), draft()]
        await ledger.accept(drafts)
        await ledger.register("w", ["default"], LONG_LEASE)
        await ledger.claim("default", "w", 3)
        async with locked(migrated_database, drafts[0].id):
            first = await ledger.register("w", ["default"], LONG_LEASE, [drafts[1].id], grace=0.0)
            seen = (await ledger.counts())["default"]
        refuse(migrated_database, "tg_op = 'UPDATE'")
        second = await ledger.register("w", ["default"], LONG_LEASE, [], grace=0.0)
        allow(migrated_database)
        await ledger.register("w", ["default"], LONG_LEASE, [], grace=0.0)
        last = (await ledger.counts())["default"]

    assert second.lease_until > first.lease_until
    assert (seen.waiting, seen.active) == (1, 2)
    assert (last.waiting, last.active) == (3, 0)


# -- the ledger's errors ----------------------------------------------------------------------


async def test_values_over_the_limit_of_a_message_are_refused(migrated_database: Database) -> None:
    """Postgres would end the connection, as in an outage."""
    huge = b'"' + b"x" * (901 * 2**20) + b'"'
    async with ledger_in(migrated_database) as ledger:
        await ledger.accept([draft()])
        await ledger.register("w", ["default"], LONG_LEASE)
        (claim,) = await ledger.claim("default", "w", 1)
        with pytest.raises(UnstorableError, match="a call to the database has at most"):
            await ledger.settle([completed(claim, huge)])
        with pytest.raises(PayloadError, match="a call to the database has at most"):
            await ledger.accept([draft(payload=huge)])
        assert await ledger.settle([failed(claim, ERROR)]) == {claim.id}


async def test_a_statement_that_is_cancelled_is_a_limit(migrated_database: Database) -> None:
    """And not a refusal: the server does not say which value is the reason."""
    async with ledger_in(migrated_database, statement_timeout=0.3) as ledger:
        refuse(migrated_database, "true", action="perform pg_sleep(1)")
        with pytest.raises(LedgerLimitError):
            await ledger.accept([draft(payload=b'"bad"')])


async def test_a_call_without_a_connection_is_no_limit(migrated_database: Database) -> None:
    """Its values were not sent, so they are not the reason."""
    async with (
        opened(config_of(migrated_database, pool_max=1)) as pool,
        pool.acquire(),
    ):
        ledger = PostgresJobLedger(pool, timeout=0.3)
        with pytest.raises(LedgerUnavailableError, match="does not answer") as raised:
            await ledger.counts()

    assert raised.type is LedgerUnavailableError
