"""Which process listens on a port, without the list of all connections of the machine.

After thousands of connections that list is long: to read it takes longer than most servers take to
start.
"""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_DIAG = 4
"""NETLINK_SOCK_DIAG, which answers questions about sockets; only Linux has it."""
_BY_FAMILY, _DUMP = 20, 0x301
_DONE, _ERROR = 3, 2
_HEADER = struct.Struct("=IHHII")
_LISTENING = 1 << 10
_PORT, _INODE = 20, 84
"""Where a message about a socket has its port and its number."""


def listens(process: psutil.Process, port: int) -> bool:
    """Return whether a process listens on a TCP port of any address."""
    try:
        numbers = set(_listening(port))
    except (AttributeError, OSError):
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in process.net_connections("tcp")
        )
    return bool(numbers) and not numbers.isdisjoint(_sockets(process.pid))


def _listening(port: int) -> Iterator[str]:
    """Return the numbers of the sockets that listen on a port, as /proc shows them."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _DIAG) as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            question = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _LISTENING)
            question += struct.pack("!H", port).ljust(48, b"\0")
            head = _HEADER.pack(_HEADER.size + len(question), _BY_FAMILY, _DUMP, 0, 0)
            kernel.send(head + question)
            for kind, message in _messages(kernel):
                if kind == _ERROR:
                    raise OSError("the kernel does not describe sockets")
                if struct.unpack_from("!H", message, _PORT)[0] == port:
                    yield f"socket:[{struct.unpack_from('=I', message, _INODE)[0]}]"


def _messages(kernel: socket.socket) -> Iterator[tuple[int, bytes]]:
    while True:
        received = kernel.recv(65536)
        while received:
            length, kind = _HEADER.unpack_from(received)[:2]
            if kind == _DONE:
                return
            yield kind, received[:length]
            received = received[(length + 3) & ~3 :]


def _sockets(pid: int) -> Iterator[str]:
    folder = Path(f"/proc/{pid}/fd")
    # The process may end meanwhile, and close files before that.
    with suppress(OSError):
        for descriptor in folder.iterdir():
            with suppress(OSError):
                yield os.readlink(descriptor)  # noqa: PTH115 - it leads to no path
