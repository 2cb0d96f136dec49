"""Waits on conditions with a deadline."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    look: Callable[[], T | None],
    *,
    seconds: float = 20.0,
    what: Callable[[], str] | str = "condition",
) -> T:
    """Look until what is seen is true and return it; fail with ``what`` after ``seconds``."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while True:
        if seen := look():
            return seen
        if time.monotonic() > deadline:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {seconds:g} s: {told}")
        pause.wait(0.01)
