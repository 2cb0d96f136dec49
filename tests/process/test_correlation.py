"""Correlation ids in a forked child process."""

import os

import pytest

from viralfx.core.correlation import new_correlation_id


# Other tests' threads may run: the child is one that starts none.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_generates_its_own_ids() -> None:
    """The parent process may have generated many ids in advance."""
    new_correlation_id()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, " ".join(new_correlation_id() for _ in range(100)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    of_the_child = os.read(reader, 65536).decode().split()
    os.close(reader)
    os.close(writer)
    of_the_parent = {new_correlation_id() for _ in range(1000)}

    assert len(set(of_the_child)) == 100
    assert of_the_parent.isdisjoint(of_the_child)
