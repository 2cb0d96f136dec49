"""Tests of an application: its jobs without servers, and the contracts of its checks and stages.

The functions work in plain tests, in coroutines, and beside test clients.
"""

from contextlib import suppress

from viralfx.testing.contracts import check_contract, stage_contract, wait_until_ready
from viralfx.testing.jobs import (
    Jobs,
    JobsOfTest,
    SubmittedJob,
    assert_submitted,
    run_pending,
    submitted,
)

__all__ = [
    "Jobs",
    "JobsOfTest",
    "SubmittedJob",
    "assert_submitted",
    "check_contract",
    "run_pending",
    "stage_contract",
    "submitted",
    "wait_until_ready",
]

with suppress(ImportError):  # without pytest there is no fixture
    from viralfx.testing.jobs import viralfx_jobs as viralfx_jobs
