"""Ids of jobs: UUIDs that sort by the time of their creation."""

import time
from uuid import RFC_4122, UUID

import pytest

from viralfx.core.ids import new_job_id


def test_an_id_is_a_uuid_with_its_time() -> None:
    """Of version 7, in the canonical form."""
    before = time.time_ns() // 1_000_000
    made = new_job_id()
    after = time.time_ns() // 1_000_000
    uuid = UUID(made)

    assert str(uuid) == made
    assert (uuid.version, uuid.variant) == (7, RFC_4122)
    # Many ids at once use milliseconds of the future.
    assert before <= uuid.int >> 80 <= after + 20


def test_ids_increase_while_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour."""
    first = new_job_id()
    hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: hour_ago)
    ids = [first, *(new_job_id() for _ in range(10_000))]

    assert sorted(ids) == ids
    assert {UUID(made).version for made in ids} == {7}
