"""Folders for unix sockets."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLACE = Path("/tmp")  # noqa: S108 - each folder in it has a random name


@contextmanager
def socket_folder() -> Iterator[Path]:
    """Make a folder for sockets, and remove it with the block.

    It does not follow ``TMPDIR``: the address of a socket has at most 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="viralfx-", dir=PLACE) as name:
        yield Path(name)
