"""What is said of a job that went wrong: on the job itself, and in the log."""

import logging
from collections.abc import Callable

from viralfx.domain.jobs.job import Claim

_logger = logging.getLogger("viralfx.jobs")

MESSAGE_LIMIT = 2000
"""Characters of an error's message that are kept."""


def message_of(error: BaseException, clean: Callable[[str], str]) -> str:
    """Return an error's message as it can be kept: not too long, and text everywhere.

    ``clean`` takes the secrets out of it, for a driver's error may quote the address it was given.
    """
    try:
        text = str(error) or type(error).__name__
    except Exception:  # noqa: BLE001 - a boundary: the text is the task's own code
        text = type(error).__name__
    # In this order: of a secret that is cut in two nobody would know the first half.
    text = clean(text)[:MESSAGE_LIMIT]
    # Neither of these two can be stored as text everywhere.
    text = text.replace("\0", "\\0")
    return text.encode("utf-8", "backslashreplace").decode()


def log_failure(claim: Claim, code: str, error: BaseException | None) -> None:
    """Tell that a job failed for good."""
    _logger.error("Job failed", exc_info=error, extra={**names_of(claim), "code": code})


def names_of(claim: Claim) -> dict[str, object]:
    """Return the fields by which log lines name an execution."""
    return {
        "job": claim.id,
        "task": claim.task,
        "queue": claim.queue,
        "attempt": claim.attempt,
    }
