"""Ids of jobs and events: UUIDs of version 7, in the order of their creation."""

import os
import re
import time


class _Ids:
    """Makes UUIDs of version 7 (RFC 9562)."""

    def __init__(self) -> None:
        self._last = 0

    def make(self) -> int:
        # From the operating system: forked or seeded processes draw different numbers.
        chance = int.from_bytes(os.urandom(10), "big") >> 7
        # Milliseconds and counter form one number that only grows, also within a millisecond and
        # while the clock is set back.
        moment = time.time_ns() // 1_000_000 << 12 | chance >> 62
        self._last = max(self._last + 1, moment)
        milliseconds, count = divmod(self._last, 1 << 12)
        value = milliseconds << 80 | 0x7 << 76 | count << 64
        return value | 0b10 << 62 | chance & 2**62 - 1


_ids = _Ids()
_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DIGITS = re.compile(r"[0-9a-f]{32}")


def is_job_id(text: str) -> bool:
    """Return True if ``text`` has the form of a job's id."""
    return _JOB_ID.fullmatch(text) is not None


def canonical_job_id(text: str) -> str | None:
    """Return an id in the form of a job's; None if it is no UUID.

    It may have upper case letters and lack the hyphens.
    """
    digits = text.replace("-", "").lower()
    return _spelled(digits) if _DIGITS.fullmatch(digits) else None


def _spelled(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def new_job_id() -> str:
    """Return a new UUID; ids of one process sort in the order of their creation."""
    return _spelled(f"{_ids.make():032x}")
