"""Values that Postgres cannot store, and the errors of the job ledger."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.job_ledgers import work
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database

from viralfx.jobs.codec import PayloadError
from viralfx.jobs.model import JobDraft, JobError, JobState, completed, retried
from viralfx.jobs.postgres import PostgresJobLedger


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
async def test_unstorable_draft_is_refused(ledger: PostgresJobLedger, bad: JobDraft) -> None:
    """Permanently, not as an outage; no job of the same call is kept."""
    with pytest.raises(PayloadError, match="the job cannot be stored"):
        await ledger.accept([draft(), bad, draft()])

    assert await ledger.counts() == {}


@pytest.mark.parametrize(
    "run_at", [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
)
async def test_an_infinite_time_is_the_first_or_last_one(
    ledger: PostgresJobLedger, run_at: datetime
) -> None:
    """A driver sends the first and the last time of Python as infinities."""
    (accepted,) = await ledger.accept([draft(key="k", run_at=run_at)])
    (again,) = await ledger.accept([draft(key="k", run_at=run_at)])

    assert (accepted.created, again.created) == (True, False)
    assert again.job == await ledger.get(accepted.job.id) == accepted.job


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
async def test_json_is_stored_byte_for_byte(ledger: PostgresJobLedger, payload: bytes) -> None:
    """As payload and as result."""
    (accepted,) = await ledger.accept([draft(payload=payload)])
    await ledger.register("w", ["default"], LONG_LEASE)
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
async def test_unstorable_error_text_is_adapted(
    ledger: PostgresJobLedger, given: str, kept: str
) -> None:
    """An outcome is never refused for its text."""
    claim = await work(ledger)
    error = JobError(code="error", message=given)
    taken = await ledger.settle([retried(claim, error, float("inf"))])
    job = await ledger.get(claim.id)

    assert set(taken) == {claim.id}
    assert job is not None
    assert job.error == JobError(code="error", message=kept)
    assert job.run_at > datetime(2100, 1, 1, tzinfo=UTC)


async def test_unstorable_correlation_id_is_adapted(ledger: PostgresJobLedger) -> None:
    """It serves only for searching."""
    (accepted,) = await ledger.accept([draft(correlation_id="a\x00b", traceparent="\udfff")])

    assert await ledger.get(accepted.job.id) == accepted.job
    assert (accepted.job.correlation_id, accepted.job.traceparent) == ("a\ufffdb", "?")


async def test_tables_may_be_in_a_custom_schema(database: Database) -> None:
    """Its name may be a word of SQL; changes by hand with any search path are counted."""
    config = await migrated(config_of(database, schema="user"))
    async with opened(config) as pool:
        ledger = PostgresJobLedger(pool)
        claim = await work(ledger)
        database.execute(
            """update "user".viralfx_jobs set state = 'failed' where state = 'active'"""
        )
        counts = (await ledger.counts())["default"]
        job = await ledger.get(claim.id)

    assert (counts.completed, counts.failed, counts.active) == (1, 1, 0)
    assert job is not None
    assert job.state is JobState.FAILED
