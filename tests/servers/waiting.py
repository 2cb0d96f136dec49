"""Waits on conditions with a deadline, and picks ports."""

import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
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


def free_port() -> int:
    """Return a port of this machine that nobody listens on.

    It lies below the range from which outgoing connections take theirs: while a server is down,
    nobody may come by its port by accident, nor connect to itself there.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(15000, 32000)
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port was found")
