"""Picks ports."""

import os
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from itertools import cycle
from pathlib import Path

_TEST_PORTS = range(15000, 32000)
_MIN_PORTS = 50
"""Ports of one process. With fewer, a process could reuse a port that it still needs."""
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

_turn = threading.Lock()


def outgoing() -> range:
    """Return the ports that this machine gives to outgoing connections."""
    if not _RANGE.exists():
        return range(49152, 65536)  # the range of systems other than Linux
    low, high = map(int, _RANGE.read_text(encoding="ascii").split())
    return range(low, high + 1)


def share(worker: int, workers: int, taken: range) -> Sequence[int]:
    """Return the ports of one of a run's test processes, without those that are ``taken``.

    There are two shares for each: xdist numbers on where a process takes the place of one that
    crashed. Raises :class:`RuntimeError` where there are more processes than shares of a useful
    size.
    """
    shares = 2 * workers
    if worker >= shares:
        raise RuntimeError(
            f"test process {worker} has no ports of its own: there are {shares} shares, and too"
            " many of the processes before it crashed"
        )
    own = [port for port in _TEST_PORTS[worker::shares] if port not in taken]
    if len(own) < _MIN_PORTS:
        raise RuntimeError(
            f"each of {workers} test processes has {len(own)} ports, which are fewer than"
            f" {_MIN_PORTS}: run fewer of them (-n), or let outgoing connections have others than"
            f" {_TEST_PORTS[0]} to {_TEST_PORTS[-1]} (net.ipv4.ip_local_port_range is {taken[0]} to"
            f" {taken[-1]})"
        )
    return own


@cache
def _in_turn() -> tuple[Iterator[int], int]:
    """Return this test process's own ports, over and over, and how many there are."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = share(worker, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), outgoing())
    first = random.SystemRandom().randrange(len(own))
    return cycle([*own[first:], *own[:first]]), len(own)


def own_address() -> str:
    """Return an address of this machine that no other test process has: for a port that is fixed.

    All of 127.0.0.0/8 is this machine, where that is Linux.
    """
    pid = os.getpid()  # below 2 ** 22
    return f"127.{64 + (pid >> 16)}.{pid >> 8 & 255}.{pid & 255}"


def free_port() -> int:
    """Return a free port of this machine, another one each time.

    No other process of this test run gets it, since its server may take a while to listen. It is
    outside the range of outgoing connections: while a server is down, no client may get its port
    by accident, nor connect to itself there.
    """
    with _turn:
        ports, count = _in_turn()
        for _ in range(count - 1):  # not as far as the one that was returned before
            port = next(ports)
            with closing(socket.socket()) as probe:
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
                return port
    raise RuntimeError("no free port was found")
