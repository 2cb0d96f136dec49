"""One connection through the fault proxy."""

import asyncio
import ctypes
import math
import socket
import ssl
import struct
from contextlib import suppress
from enum import Enum
from typing import Protocol

CHUNK = 65536
HELD = 64
"""Pieces that one direction keeps before it stops reading."""


class Fate(Enum):
    """The end of a piece from the client."""

    FORWARDED = "the server gets it"
    LOST = "the connection is reset before the server gets it"
    UNANSWERED = "the server gets it, and the connection is reset instead of an answer"


class Policy(Protocol):
    """The decisions that a link needs before it forwards."""

    async def hold(self, accepted: float) -> None:
        """Wait as long as the mode holds back a connection that came at a time of the loop."""

    def cut(self) -> tuple[object, float]:
        """Return how many bytes of answers may pass, and since which switch they count."""

    def fate_of(self, data: bytes) -> Fate:
        """Decide about a piece from the client."""

    def was_cut(self) -> None:
        """Record that the bytes have passed; the connection is about to be closed."""


_ATTACH_FILTER, _DETACH_FILTER = 26, 27
"""Linux's SO_ATTACH_FILTER and SO_DETACH_FILTER."""
_NO_PACKET = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
"""A filter of one instruction, which returns 0: no byte of a packet is taken."""


def reset(connection: socket.socket) -> None:
    """Let the close that follows be a reset: the other side gets an error, not an end."""
    with suppress(OSError):  # closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Link:
    """A client's connection and the one behind it, which lives and ends with it."""

    def __init__(
        self,
        client: socket.socket,
        tls: ssl.SSLContext | None,
        upstream: tuple[str, int],
        policy: Policy,
    ) -> None:
        self.client_left = False
        self._socket, self._tls, self._upstream, self._policy = client, tls, upstream, policy
        self._writers: list[asyncio.StreamWriter] = []
        self._to_server: asyncio.StreamWriter | None = None
        self._since: object = None
        self._answered = 0
        self._unanswered = False
        self._accepted = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Forward until both sides have ended, or one was reset."""
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._forward(tasks)
        except* OSError:
            # A reset of one side, or a server that is not there, is a reset for the other.
            self.reset()
        finally:
            self.client_left = True
            for writer in self._writers:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    def close(self) -> None:
        """Release what is left when ``run`` has ended, or was cancelled before it began."""
        self._socket.close()

    def deafen(self, *, on: bool) -> None:
        """Drop each packet of the client before the system acknowledges it, or no longer."""
        if self._socket.fileno() < 0:
            return
        if not on:
            with suppress(OSError):  # it has no filter
                self._socket.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
            return
        program = struct.pack("HP", 1, ctypes.addressof(_NO_PACKET))
        self._socket.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)

    def reset(self) -> None:
        """End both connections by a reset."""
        reset(self._socket)  # a closed TLS transport of Python 3.11 cannot name it
        if self._to_server is not None:
            reset(self._to_server.get_extra_info("socket"))
        for writer in self._writers:
            writer.transport.abort()

    async def _forward(self, tasks: asyncio.TaskGroup) -> None:
        if self._tls is not None:
            await self._policy.hold(self._accepted)
        from_client, to_client = await self._accept()
        asked: asyncio.Queue[bytes] = asyncio.Queue(HELD)
        # Read from the client before the server is reached, so as to see it leave.
        tasks.create_task(self._take(from_client, asked, is_client=True))
        await self._policy.hold(self._accepted)
        from_server, to_server = await asyncio.open_connection(*self._upstream)
        self._writers.append(to_server)
        self._to_server = to_server
        answered: asyncio.Queue[bytes] = asyncio.Queue(HELD)
        tasks.create_task(self._take(from_server, answered))
        tasks.create_task(self._give(asked, to_server))
        tasks.create_task(self._give(answered, to_client, limited=True))

    async def _accept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, self._socket, ssl=self._tls
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        self._writers.append(writer)
        return reader, writer

    async def _take(
        self, reader: asyncio.StreamReader, pieces: asyncio.Queue[bytes], *, is_client: bool = False
    ) -> None:
        try:
            while data := await reader.read(CHUNK):
                await pieces.put(data)
        finally:
            self.client_left |= is_client
        await pieces.put(b"")

    async def _give(
        self, pieces: asyncio.Queue[bytes], writer: asyncio.StreamWriter, *, limited: bool = False
    ) -> None:
        while True:
            data = await pieces.get()
            await self._policy.hold(self._accepted)
            if not data:
                break
            if self._meets_its_end(data, from_client=not limited):
                self._policy.was_cut()
                self.reset()
                return
            allowed = self._allowed(len(data)) if limited else math.inf
            writer.write(data if allowed > len(data) else data[: int(allowed)])
            await writer.drain()
            if allowed <= len(data):
                self._policy.was_cut()
                for other in self._writers:
                    other.close()
                return
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()

    def _meets_its_end(self, data: bytes, *, from_client: bool) -> bool:
        if not from_client:
            return self._unanswered
        fate = self._policy.fate_of(data)
        self._unanswered |= fate is Fate.UNANSWERED
        return fate is Fate.LOST

    def _allowed(self, count: int) -> float:
        since, limit = self._policy.cut()
        if since is not self._since:
            self._since, self._answered = since, 0
        allowed = limit - self._answered
        self._answered += count
        return allowed
