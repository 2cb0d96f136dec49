"""The ports of test servers: free and unique."""

import socket
from contextlib import ExitStack
from itertools import combinations

import pytest
from tests.servers.ports import free_port, outgoing, share

from viralfx.settings.model import WORKER_MANAGEMENT_PORT, Settings

USUAL = range(32768, 61000)


@pytest.mark.parametrize("workers", [1, 2, 4, 64])
def test_test_processes_share_no_port(workers: int) -> None:
    """Nor does a process that replaces a crashed one."""
    shares = [set(share(worker, workers, USUAL)) for worker in range(2 * workers)]

    assert all(one.isdisjoint(other) for one, other in combinations(shares, 2))
    assert not set().union(*shares) & {Settings().port, WORKER_MANAGEMENT_PORT}


@pytest.mark.parametrize("taken", [USUAL, range(16000, 65536), range(1024, 20000), outgoing()])
def test_outgoing_connections_have_other_ports(taken: range) -> None:
    """For any range of ephemeral ports."""
    assert not set(share(1, 4, taken)) & set(taken)


@pytest.mark.parametrize(
    ("worker", "workers", "taken", "said"),
    [
        (0, 1, range(1024, 65536), r"each of 1 test processes has 0 ports.* is 1024 to 65535"),
        (3, 400, USUAL, r"each of 400 test processes has 2\d ports.*run fewer of them"),
        (8, 4, USUAL, r"test process 8 has no ports of its own: there are 8 shares"),
    ],
    ids=["all are for outgoing connections", "too many processes", "too many crashed"],
)
def test_too_few_ports_are_a_clear_error(
    worker: int, workers: int, taken: range, said: str
) -> None:
    """With the remedy."""
    with pytest.raises(RuntimeError, match=said):
        share(worker, workers, taken)


def test_each_port_is_unique_and_free() -> None:
    """PORT and MANAGEMENT_PORT always differ."""
    ports = [free_port() for _ in range(20)]
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.create_server(("", port)))
        more = [free_port() for _ in range(20)]

    assert len({*ports, *more}) == 40
    assert not {*ports, *more} & set(outgoing())
