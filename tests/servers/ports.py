"""Picks ports."""

import os
import random
import socket
from collections.abc import Iterator
from contextlib import closing
from itertools import cycle


def _in_turn() -> Iterator[int]:
    """Yield the ports that are this test process's own, over and over."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = range(15000 + worker, 32000, count)
    first = random.SystemRandom().randrange(len(own))
    return cycle([*own[first:], *own[:first]])


_ports = _in_turn()


def free_port() -> int:
    """Return a port of this machine that nobody listens on, another one each time.

    No other process of this test run is given it: the server it is for may take a while to listen.
    It lies below the range from which outgoing connections take theirs: while a server is down,
    nobody may come by its port by accident, nor connect to itself there.
    """
    for _ in range(100):
        port = next(_ports)
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port was found")
