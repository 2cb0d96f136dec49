"""The jobs that a caller asks for together, and the errors that name one of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from viralfx.core.errors import ViralFXError
from viralfx.core.keys import NamedKey
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import JobDraft, KeyConflictError


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job that is asked for; see :meth:`JobService.accept` for the meaning of the fields."""

    task: str
    payload: bytes
    """JSON."""
    key: str | NamedKey | None = None
    run_at: datetime | None = None
    priority: int | None = None
    unique: str | None = None
    queue: str | None = None
    max_attempts: int | None = None


def require_same(draft: JobDraft, accepted: Accepted) -> None:
    """Raise :class:`KeyConflictError` if the key of a draft belongs to a different job."""
    job = accepted.job
    # A job with another key is its duplicate: one of the same task and payload.
    if not accepted.created and draft.key == job.key is not None and not job.comes_from(draft):
        raise KeyConflictError(
            f"the idempotency key was used for job {job.id}, which asks for something else", job
        )


def require_all_same(drafts: Sequence[JobDraft], accepted: Sequence[Accepted]) -> None:
    """Do as :func:`require_same` for each of several jobs; the error names the job."""
    for index, (draft, one) in enumerate(zip(drafts, accepted, strict=True)):
        with about(index):
            require_same(draft, one)


@contextmanager
def about(index: int) -> Iterator[None]:
    """Name the job of a batch in the errors of the block."""
    try:
        yield
    except (ValueError, ViralFXError) as error:
        error.args = (f"the job at index {index}: {error}",)
        error.index = index  # type: ignore[union-attr]  # read by the HTTP API
        raise
