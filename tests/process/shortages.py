"""Exhausts resources of the process: descriptors and threads."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator

import pytest

MANY = 1100
"""More descriptors than ``select`` can take."""


def _most() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return MANY if hard == resource.RLIM_INFINITY else min(MANY, hard)


needs_many = pytest.mark.skipif(
    _most() < MANY, reason=f"the hard limit of open files is less than {MANY}"
)
"""Skips a test where no descriptor can have a number that ``select`` refuses."""


@contextlib.contextmanager
def descriptors_used_up() -> Iterator[list[int]]:
    """Open as many descriptors as the limit allows, about a thousand; return them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_most(), hard))
    opened: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(0))
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def no_more_threads() -> Iterator[None]:
    """Make every thread start fail, by asking for a stack size that is not available."""
    usual = threading.stack_size(2**46)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threading.Thread().start()
        yield
    finally:
        threading.stack_size(usual)
