"""A process that has used up what the system gives it."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator

import pytest

MANY = 1100
"""More descriptors than ``select`` can take."""


@contextlib.contextmanager
def descriptors_used_up() -> Iterator[list[int]]:
    """Open as many as there may be, which are a little more than a thousand; return them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MANY, hard))
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
    """Let no thread start: none could have a stack of the size that is asked for."""
    usual = threading.stack_size(2**46)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threading.Thread().start()
        yield
    finally:
        threading.stack_size(usual)
