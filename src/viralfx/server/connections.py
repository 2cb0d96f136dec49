"""The connections of one HTTP server: their number, deadlines, memory, turns and rejections."""

import asyncio
import gc
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, Protocol

from viralfx.server.limits import TICK_SECONDS, HttpLimits, Rejection, ThrottledLog

_logger = logging.getLogger("viralfx.http")

_RELIEF = 7 / 8
"""Share of a limit of unsent bytes down to which connections are aborted above it."""
_SAMPLE_BYTES = 2**20
"""Received bytes of bodies after which the memory of the process is measured anew."""
_UNSENT_SECONDS = 5.0
"""Silence of a client above the limit of unsent bytes after which it is aborted."""
_COLLECT_SECONDS = 10.0
"""Shortest time between two collections of garbage when memory is low."""
_COLLECT_SHARE = 200
"""A collection blocks the process, so this multiple of its duration passes before the next one."""
_TURN_SECONDS = 0.005
"""Time in which large reads are parsed in one turn of the event loop; others wait for it."""


def _used_bytes() -> int:
    """Return the memory of the process, without mapped files; 0 on a system that does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - often called
            resident, shared = map(int, file.read().split()[1:3])
            return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class Connection(Protocol):
    """The interface of a connection for :class:`Connections`."""

    transport: asyncio.Transport
    client: tuple[str, int] | None
    tick: int
    """The tick of the next check; -1: no check is scheduled."""
    sent_bytes: int
    """Bytes of responses that the client had acknowledged at the last check; -1: none yet."""
    sent_at: float
    """The monotonic time at which that number was new."""

    def check_deadline(self, now: float) -> float:
        """Enforce deadlines at the monotonic time ``now``; return the time of the next check."""

    def idle_since(self) -> float | None:
        """Return the monotonic time since which the client owes something; None: it owes nothing.

        It owes the rest of a request, the next one, or its reading of a response.
        """


class Connections:
    """The open connections of one server: their number, deadlines and rejections.

    A timing wheel with one entry for each connection holds the deadlines, instead of one timer
    each. So a request that arrives in time costs no timer, and an idle server only counts ticks.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.on_rejected: Callable[[str], None] = lambda _: None
        """Called with the reason of each rejection."""
        self.on_upgrade_ignored: Callable[[], None] = lambda: None
        """Called for each ``Upgrade`` to an unsupported protocol."""
        self.now = monotonic()
        """The time of the last tick, which is precise enough for the age of idle connections."""
        self.server_head = b""
        """The server's own headers as bytes. Each tick renews the Date header."""
        self.open = 0
        self.queued = 0
        """Pipelined requests that wait for the response to an earlier one."""
        self.head_bytes = 0
        """Total size of incomplete heads and trailers."""
        self.request_bytes = 0
        """Total size of large heads of unanswered requests, and of unread bodies."""
        self.unsent_bytes = 0
        """Total size of the responses of the connections whose clients do not read them."""
        self._unsent: dict[Connection, int] = {}
        self._relieve_above: float = limits.max_unsent_bytes
        self._relieving = False
        self._received = 0
        self._is_memory_low = False
        self._collect_at = 0.0
        self.backlogs = Backlogs(self)
        self._members: set[Connection] = set()
        self._wheel: dict[int, set[Connection]] = {}
        self._tick = self._tick_of(self.now)
        self._log = ThrottledLog(_logger, "HTTP request rejected")
        self._upgrades = ThrottledLog(_logger, "HTTP upgrade ignored")

    @property
    def full(self) -> bool:
        """True if no further connection may be opened."""
        return self.open >= self.limits.max_connections

    @property
    def is_overloaded(self) -> bool:
        """True if large responses are dropped: memory is low, and too many bytes are unsent."""
        return self._is_memory_low and self.unsent_bytes > self.limits.max_unsent_bytes

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._members))

    def add(self, connection: Connection, deadline: float) -> None:
        """Add a connection whose first check is at ``deadline`` of the monotonic clock."""
        self._members.add(connection)
        self.check_at(connection, deadline)

    def remove(self, connection: Connection) -> None:
        """Remove a connection."""
        self._members.discard(connection)
        self._unschedule(connection)
        self.resume_writing(connection)
        self.backlogs.drop(connection)

    def check_at(self, connection: Connection, deadline: float) -> None:
        """Schedule a check at ``deadline``, unless an earlier one is scheduled."""
        tick = max(self._tick_of(deadline), self._tick + 1)
        if connection.tick >= 0:
            if connection.tick <= tick:
                return
            self._unschedule(connection)
        connection.tick = tick
        self._wheel.setdefault(tick, set()).add(connection)

    def advance(self) -> None:
        """Check all connections that are due."""
        self.now = now = monotonic()
        last = int(now / TICK_SECONDS)
        if last - self._tick > len(self._wheel):
            due = sorted(tick for tick in self._wheel if tick <= last)
        else:
            due = [tick for tick in range(self._tick + 1, last + 1) if tick in self._wheel]
        self._tick = last
        for tick in due:
            for connection in self._wheel.pop(tick, ()):
                connection.tick = -1
                if connection not in self._members:
                    continue
                try:
                    self.check_at(connection, connection.check_deadline(now))
                except Exception:  # one connection must not stop the checks of all
                    _logger.exception("Deadline check of a connection failed")
                    self.check_at(connection, now + TICK_SECONDS)
        if self._is_memory_low:
            self._measure()
        if self._unsent:
            self._relieve()
        self._log.flush()
        self._upgrades.flush()

    def reject(self, rejection: Rejection, client: str | None) -> None:
        """Count and log a rejection; ``client``: the address of the client."""
        self.on_rejected(rejection.reason)
        routine = rejection is Rejection.KEEP_ALIVE_TIMEOUT
        level = logging.DEBUG if routine else logging.WARNING
        fields: dict[str, object] = {"reason": rejection.reason, "client": client}
        if rejection.status:
            fields["status"] = rejection.status
        self._log.add(rejection.reason, level, **fields)

    def ignore_upgrade(self, protocol: str) -> None:
        """Count and log that the server ignored an ``Upgrade`` to an unsupported protocol."""
        self.on_upgrade_ignored()
        self._upgrades.add("", logging.WARNING, upgrade=protocol)

    def may_buffer_heads(self, own: int) -> bool:
        """Return False if the incomplete heads of all connections use too much memory.

        ``own``: the size of the caller's head. A small head is always accepted, because the limit
        of connections bounds the number of heads.
        """
        limit = self.limits.max_unfinished_head_bytes
        return self.head_bytes <= limit or own <= self._share_of(limit)

    def _share_of(self, limit: int) -> int:
        return max(1024, limit // max(1, self.limits.max_connections))

    def may_buffer_requests(self, own: int) -> bool:
        """Return False if requests, or the whole process, use too much memory.

        ``own``: the size of the caller's request, with the part of its body that the application
        has read. A small one is always accepted, as with heads.
        """
        limit = self.limits.max_request_bytes
        is_full = self._is_memory_low or self.request_bytes > limit
        return not is_full or own <= self._share_of(limit)

    def receive(self, size: int) -> None:
        """Count received bytes of bodies, which an application may collect, and measure memory."""
        self._received += size
        if self._received >= _SAMPLE_BYTES:
            self._measure()

    def is_memory_low(self) -> bool:
        """Measure the memory of the process, and return True if it is above its limit."""
        self._measure()
        return self._is_memory_low

    def _measure(self) -> None:
        self._received = 0
        limit = self.limits.max_resident_bytes
        self._is_memory_low = _used_bytes() > limit
        if self._is_memory_low and monotonic() >= self._collect_at:
            # Objects of closed connections may wait for a collection.
            began = monotonic()
            gc.collect()
            ended = monotonic()
            self._collect_at = ended + max(_COLLECT_SECONDS, _COLLECT_SHARE * (ended - began))
            self._is_memory_low = _used_bytes() > limit

    # -- responses that wait for their clients ---------------------------------------------------

    def pause_writing(self, connection: Connection) -> None:
        """Count the unsent bytes of a connection; above the limit, abort some connections."""
        size = connection.transport.get_write_buffer_size()
        self.unsent_bytes += size - self._unsent.get(connection, 0)
        self._unsent[connection] = size
        self.check_at(connection, monotonic() + TICK_SECONDS)
        if self.unsent_bytes > self._relieve_above:
            self._relieve_above = self.unsent_bytes + self.limits.max_unsent_bytes * (1 - _RELIEF)
            # Other handlers may answer in this turn of the event loop.
            self._measure()
            if not self._relieving:
                self._relieving = True
                # Not now: the transport of this connection is writing.
                asyncio.get_running_loop().call_soon(self._relieve)

    def resume_writing(self, connection: Connection) -> None:
        """Forget the unsent bytes of a connection."""
        self.unsent_bytes -= self._unsent.pop(connection, 0)
        connection.sent_bytes = -1  # its idle time is no silence of the next response

    def _relieve(self) -> None:
        """Count the unsent bytes anew, and abort connections above the limit, the largest first.

        While the process has memory, a client is spared that took a byte in the last seconds: on a
        busy machine an honest one may pause.
        """
        self._relieving = False
        limit = self.limits.max_unsent_bytes
        self._unsent = {each: each.transport.get_write_buffer_size() for each in self._unsent}
        self.unsent_bytes = sum(self._unsent.values())
        if self.unsent_bytes > limit:
            self._measure()
            for connection in sorted(self._unsent, key=self._unsent.__getitem__, reverse=True):
                if self.unsent_bytes <= limit * _RELIEF:
                    break
                silence = self._silence(connection, monotonic())
                if self._is_memory_low or silence >= _UNSENT_SECONDS:
                    self._abort(connection, Rejection.UNSENT)
        # The next count is due at the next tick, or when an eighth of the limit has come.
        self._relieve_above = max(limit, self.unsent_bytes + limit * (1 - _RELIEF))

    def _silence(self, connection: Connection, now: float) -> float:
        """Return for how many seconds the checks have seen no acknowledged byte of a client."""
        acknowledged = _acknowledged(connection.transport)
        if acknowledged != connection.sent_bytes:
            connection.sent_bytes, connection.sent_at = acknowledged, now
        return now - connection.sent_at

    def check_sending(
        self, connection: Connection, now: float, timeout: float, rejection: Rejection | None
    ) -> float:
        """Abort a connection whose client has acknowledged no byte for ``timeout`` seconds.

        Returns the time of the next check. ``rejection`` is counted; None: it was already.
        """
        if self._silence(connection, now) >= timeout:
            self._abort(connection, rejection)
            return now + timeout
        return max(connection.sent_at + timeout, now + TICK_SECONDS)

    def _abort(self, connection: Connection, rejection: Rejection | None) -> None:
        self.resume_writing(connection)
        if rejection is not None:
            self.reject(rejection, connection.client[0] if connection.client else None)
        connection.transport.abort()

    # -- room for new connections ----------------------------------------------------------------

    def make_room(self) -> bool:
        """Abort the connection that waits for its client the longest; return False if none does.

        The limits say whether a server does that.
        """
        if not self.limits.replaces_idle:
            return False
        idle = [(since, each) for each in self._members if (since := each.idle_since()) is not None]
        if not idle:
            return False
        _, oldest = min(idle, key=lambda pair: pair[0])
        self._members.discard(oldest)  # it is not chosen again before its end
        self._abort(oldest, Rejection.IDLE_FOR_NEW)
        return True

    def close(self) -> None:
        """Log the suppressed events."""
        self._log.flush(now=True)
        self._upgrades.flush(now=True)

    def _unschedule(self, connection: Connection) -> None:
        if connection.tick >= 0:
            bucket = self._wheel.get(connection.tick)
            if bucket is not None:
                bucket.discard(connection)
                if not bucket:
                    del self._wheel[connection.tick]
            connection.tick = -1

    @staticmethod
    def _tick_of(deadline: float) -> int:
        return math.ceil(deadline / TICK_SECONDS)


class Reader(Protocol):
    """The interface of a connection for :class:`Backlogs`."""

    transport: asyncio.Transport
    waits_for_application: bool
    """True if the application may leave it waiting, as with a WebSocket."""

    @property
    def may_parse(self) -> bool:
        """True unless the application must first read what has been parsed."""

    def slice_size(self, data: bytearray) -> int:
        """Return how many bytes of a large read to parse at once."""

    def parse_slice(self, data: bytes) -> bool:
        """Parse a part of a large read; return False if the rest of it is to be dropped."""

    def end_backlog(self) -> None:
        """Read on: the large read has been parsed."""

    def abandon(self) -> None:
        """End the connection, and free what it holds."""


class Backlogs:
    """The rests of large reads, which the connections of a server parse in turn.

    One read may hold tens of thousands of chunks or frames, which take a hundred milliseconds. In
    one turn of the event loop all connections together parse for a few milliseconds. The rest of a
    read waits as long, and its connection reads nothing more.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._rests: dict[Reader, bytearray] = {}
        self._ready: dict[Reader, None] = {}
        """The connections that may parse, in their order."""
        self._turn_ends: float | None = None
        """The monotonic time at which this turn ends; None: it has not begun."""
        self._held: dict[Reader, int] = {}
        """The memory of parsed messages that their applications have not read."""
        self._waiting_bytes = 0
        """Total size of these messages and of the rests that wait for the application."""
        self._seen_bytes = 0
        """Their size when memory was last measured for them, or a smaller one since."""

    def __contains__(self, connection: Reader) -> bool:
        return connection in self._rests

    def has_time(self) -> bool:
        """Return True if this turn of the event loop has time for another slice."""
        if self._turn_ends is None:
            self._begin_turn()
        return monotonic() < (self._turn_ends or 0.0)

    def add(self, connection: Reader, data: bytes | memoryview) -> bool:
        """Keep the rest of a read until its turn; return False if there is no memory for it.

        Where memory is low and applications do not read, the connections with most to read end.
        """
        own = connection.waits_for_application
        if not own and not self._connections.may_buffer_requests(len(data)):
            return False
        self._rests.setdefault(connection, bytearray()).extend(data)
        self._count(connection, len(data))
        self._connections.receive(len(data))
        if not connection.transport.is_closing():
            connection.transport.pause_reading()
        self.resume(connection)
        self._relieve()
        return True

    def hold(self, connection: Reader, size: int) -> None:
        """Count ``size`` as the memory of a connection's messages; 0: it has none."""
        self._wait(size - self._held.pop(connection, 0))
        if size:
            self._held[connection] = size
            self._relieve()

    def _count(self, connection: Reader, size: int) -> None:
        if connection.waits_for_application:
            self._wait(size)
        else:
            self._connections.request_bytes += size

    def _wait(self, size: int) -> None:
        self._waiting_bytes += size
        self._seen_bytes = min(self._seen_bytes, self._waiting_bytes)

    def _relieve(self) -> None:
        """End the connections with most to read, if the process is short of memory."""
        limit = self._connections.limits.max_request_bytes
        # Messages are many: memory is measured when another eighth of the limit has come.
        if self._waiting_bytes <= max(limit, self._seen_bytes + limit * (1 - _RELIEF)):
            return
        if self._connections.is_memory_low():
            sizes = dict(self._held)
            for each, rest in self._rests.items():
                if each.waits_for_application:
                    sizes[each] = sizes.get(each, 0) + len(rest)
            for each in sorted(sizes, key=sizes.__getitem__, reverse=True):
                if self._waiting_bytes <= limit:
                    break
                self.drop(each)
                self.hold(each, 0)
                each.abandon()
        self._seen_bytes = self._waiting_bytes

    def resume(self, connection: Reader) -> None:
        """Continue with a connection, because its application has read what was parsed."""
        if connection in self._rests and connection.may_parse:
            self._ready[connection] = None
            if self._turn_ends is None:
                self._begin_turn()

    def drop(self, connection: Any) -> None:
        """Forget the rest of a read."""
        self._ready.pop(connection, None)
        if (rest := self._rests.pop(connection, None)) is not None:
            self._count(connection, -len(rest))

    def _begin_turn(self) -> None:
        self._turn_ends = monotonic() + _TURN_SECONDS
        asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_ends = None
        while self._ready and self.has_time():
            connection = next(iter(self._ready))
            del self._ready[connection]
            try:
                self._parse_slice(connection)
            except Exception:  # one connection must not stop the turns of all
                _logger.exception("A connection could not parse what it has received")
                self.drop(connection)
                connection.transport.abort()

    def _parse_slice(self, connection: Reader) -> None:
        rest = self._rests[connection]
        size = connection.slice_size(rest)
        piece = bytes(rest[:size])
        del rest[:size]
        self._count(connection, -len(piece))
        if not connection.parse_slice(piece) or not rest:
            self.drop(connection)
            if not connection.transport.is_closing():
                connection.end_backlog()
        else:
            self.resume(connection)


_TCP_INFO_BYTES_ACKED = 120
"""Offset of the acknowledged bytes in ``struct tcp_info`` of Linux."""


def _acknowledged(transport: asyncio.Transport) -> int:
    """Return the bytes that the client has acknowledged, or, if unknown, the unsent bytes."""
    connected = transport.get_extra_info("socket")
    try:
        info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return int.from_bytes(info[_TCP_INFO_BYTES_ACKED:][:8], sys.byteorder)
    except (OSError, AttributeError):
        return transport.get_write_buffer_size()
