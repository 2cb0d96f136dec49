"""What Postgres cannot store, and where: the job ledger's words for it."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from tests.contracts.ledgers import LONG, draft
from tests.integration.job_ledgers import work
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database

from viralfx.adapters.postgres import PostgresJobLedger
from viralfx.domain.jobs.codec import PayloadError
from viralfx.domain.jobs.job import JobDraft, JobError, JobState, completed, failed, retried


@pytest.fixture
async def ledger(migrated_database: Database) -> AsyncIterator[PostgresJobLedger]:
    """Return a ledger."""
    async with opened(config_of(migrated_database)) as pool:
        yield PostgresJobLedger(pool)


@pytest.mark.parametrize(
    "bad",
    [
        draft(payload=b""),
        draft(payload=b"nonsense"),
        draft(payload=b'{"a": NaN}'),
        draft(payload=b'"\xff"'),
        draft(payload=b'"\x00"'),
        draft(key="a\x00b"),
        draft(key="\ud800"),
        draft(key="k" * 2001),
        draft(task="a\x00b"),
    ],
)
async def test_a_draft_that_cannot_be_stored_is_refused(
    ledger: PostgresJobLedger, bad: JobDraft
) -> None:
    """For good, not as an outage; and of what was asked for beside it nothing is kept."""
    with pytest.raises(PayloadError, match="the job cannot be stored"):
        await ledger.accept([draft(), bad, draft()])

    assert await ledger.counts() == {}


@pytest.mark.parametrize(
    "payload",
    [
        b'"\\u0000"',
        b'"\\ud800"',
        b' \t{"a":1,"a":2}\r\n',
        b"1e999",
        b"[" * 500 + b"]" * 500,
        b'"' + b"x" * 1_000_000 + b'"',
    ],
)
async def test_whatever_is_json_is_kept_to_the_byte(
    ledger: PostgresJobLedger, payload: bytes
) -> None:
    """As payload and as result."""
    (accepted,) = await ledger.accept([draft(payload=payload)])
    await ledger.register("w", ["default"], LONG)
    (claim,) = await ledger.claim("default", "w", 1)
    await ledger.settle([completed(claim, payload)])
    job = await ledger.get(claim.id)

    assert job is not None
    assert (accepted.job.payload, claim.payload, job.payload) == (payload,) * 3
    assert job.result == payload


@pytest.mark.parametrize(
    ("given", "kept"),
    [("a\x00b", "a\ufffdb"), ("\ud800", "?"), ("x" * 1_000_000, "x" * 1_000_000), ("", "")],
)
async def test_what_a_task_raises_is_kept_as_well_as_it_can_be(
    ledger: PostgresJobLedger, given: str, kept: str
) -> None:
    """An outcome is never refused for its words."""
    claim = await work(ledger)
    error = JobError(code="error", message=given)
    taken = await ledger.settle([retried(claim, error, float("inf"))])
    job = await ledger.get(claim.id)

    assert set(taken) == {claim.id}
    assert job is not None
    assert job.error == JobError(code="error", message=kept)
    assert job.run_at > datetime(2100, 1, 1, tzinfo=UTC)


async def test_a_result_that_is_no_json_fails_its_job_and_no_other(
    ledger: PostgresJobLedger,
) -> None:
    """Otherwise those beside it would be run again, and the job for ever."""
    await ledger.accept([draft() for _ in range(4)])
    await ledger.register("w", ["default"], LONG)
    first, bad, worse, other = await ledger.claim("default", "w", 4)
    error = JobError(code="error", message="the task raised")
    taken = await ledger.settle(
        [
            completed(first, b"1"),
            completed(bad, b"nonsense"),
            completed(worse, b"\xff"),
            failed(other, error),
        ]
    )
    jobs = [await ledger.get(claim.id) for claim in (first, bad, worse, other)]

    assert set(taken) == {claim.id for claim in (first, bad, worse, other)}
    states = [job.state for job in jobs if job is not None]
    assert states == [JobState.COMPLETED, *[JobState.FAILED] * 3]
    codes = [job.error and job.error.code for job in jobs if job is not None]
    assert codes == [None, "result", "result", "error"]


async def test_an_odd_correlation_id_loses_no_job(ledger: PostgresJobLedger) -> None:
    """It is only for finding things."""
    (accepted,) = await ledger.accept([draft(correlation_id="a\x00b", traceparent="\udfff")])

    assert await ledger.get(accepted.job.id) == accepted.job
    assert (accepted.job.correlation_id, accepted.job.traceparent) == ("a\ufffdb", "?")


async def test_tables_may_be_in_a_schema_of_their_own(database: Database) -> None:
    """Also where somebody changes a job from outside it: it is counted where it belongs."""
    database.execute('create schema "Mixed Case"')
    config = await migrated(config_of(database, schema="Mixed Case"))
    async with opened(config) as pool:
        ledger = PostgresJobLedger(pool)
        claim = await work(ledger)
        database.execute(
            """update "Mixed Case".viralfx_jobs set state = 'cancelled' where state = 'active'"""
        )
        counts = (await ledger.counts())["default"]
        job = await ledger.get(claim.id)

    assert (counts.completed, counts.cancelled, counts.active) == (1, 1, 0)
    assert job is not None
    assert job.state is JobState.CANCELLED
