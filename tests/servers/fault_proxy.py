"""A TCP proxy whose faults are switched while traffic flows."""

import asyncio
import math
import random
import socket
import ssl
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self, TypeVar

from tests.servers.ports import free_port
from tests.servers.proxied import Fate, Link, reset

T = TypeVar("T")


class Fault(Enum):
    """Modes without a number."""

    PASS = "forward everything"
    BLACKHOLE = "keep connections open, accept new ones, and forward nothing until another mode"
    DROP = "forward nothing on the connections of this moment, and everything on new ones"
    SILENCE = "as DROP, and let the system acknowledge nothing on them, as a firewall does"
    RESET = "reset all connections, and each new one"
    REFUSE = "reset all connections, and listen no more"


@dataclass(frozen=True, eq=False)
class CutAfter:
    """Close each connection after so many more bytes of answers, in the middle of one."""

    count: int


@dataclass(frozen=True, eq=False)
class CutCommits:
    """Reset Postgres connections at the end of statements, half before the server sees it.

    The other half is reset once the server has answered, and the answer is lost. ``share`` of the
    statements outside a transaction block meet this, and eight times as many COMMITs.
    """

    share: float
    rng: random.Random = field(default_factory=random.Random)

    def fate_of(self, data: bytes) -> Fate:
        """Decide about a piece from the client."""
        # A Sync or Query message ends the transaction of a statement outside a block.
        if b"COMMIT" in data:
            share = 8 * self.share
        elif data.startswith(b"Q") or data.endswith(_SYNC):
            share = self.share
        else:
            return Fate.FORWARDED
        if self.rng.random() >= share:
            return Fate.FORWARDED
        return self.rng.choice([Fate.LOST, Fate.UNANSWERED])


_SYNC = b"S\0\0\0\4"

Mode = Fault | CutAfter | CutCommits
PASS, BLACKHOLE, DROP, SILENCE = Fault.PASS, Fault.BLACKHOLE, Fault.DROP, Fault.SILENCE
RESET, REFUSE = Fault.RESET, Fault.REFUSE


class FaultProxy:
    """Stands on a port of its own in front of a server; runs in a thread of its own.

    ``mode`` may be set from any thread at any time; it is in force when the assignment returns.
    Data held back by a black hole arrives when the mode ends, as after a network partition. So does
    what a firewall that lost its table, ``DROP`` or ``SILENCE``, holds back.
    With ``tls`` clients speak TLS to the proxy, and the server behind gets plain text.
    """

    host = "127.0.0.1"

    def __init__(
        self, port: int, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        self.port = 0
        self.accepted = 0
        """Connections that clients have made so far, those that were reset included."""
        self.struck = 0
        """How often something came that the mode held back, or an answer that it cut."""
        self.upstream = host, port
        """Where new connections go."""
        self._tls = tls
        self._mode: Mode = PASS
        self._links: dict[asyncio.Task[None], Link] = {}
        self._listener: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._switched = asyncio.Event()
        self._switched_at = 0.0
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._call(self._switch(PASS))
        except BaseException:
            self.close()
            raise

    @property
    def mode(self) -> Mode:
        """The current fault mode."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._call(self._switch(mode))

    @property
    def open(self) -> int:
        """Connections that clients hold open now."""
        return sum(not link.client_left for link in list(self._links.values()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Reset what is open and end."""
        if self._loop.is_closed():
            return
        self._call(self._switch(REFUSE))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _switch(self, mode: Mode) -> None:
        self._mode, self._switched_at = mode, self._loop.time()
        self._switched.set()
        self._switched = asyncio.Event()
        if mode is REFUSE and self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        if mode is not REFUSE and self._listener is None:
            self._listener = self._listen()
            self._loop.add_reader(self._listener, self._accept, self._listener)
        for link in self._links.values():
            link.deafen(on=mode is SILENCE)
        if mode in {RESET, REFUSE} and self._links:
            for task, link in self._links.items():
                link.reset()
                task.cancel()
            await asyncio.wait(list(self._links))

    def _listen(self) -> socket.socket:
        for _ in range(5):
            port = self.port or free_port()
            with suppress(OSError):
                listener = socket.create_server((self.host, port), backlog=1024)
                listener.setblocking(False)
                self.port = port
                return listener
        raise OSError(f"cannot listen on port {self.port}")

    def _accept(self, listener: socket.socket) -> None:
        # Not by a task: when that is cancelled, what it has just accepted is lost.
        with suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = listener.accept()
            client.setblocking(False)
            self.accepted += 1
            if self._mode is RESET:
                reset(client)
                client.close()
                return
            link = Link(client, self._tls, self.upstream, self)
            task = self._loop.create_task(link.run())
            self._links[task] = link
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._links.pop(task).close()

    async def hold(self, accepted: float) -> None:
        """Wait as long as the mode holds back a connection that came at a time of the loop."""
        self.struck += self._holds(accepted)
        while self._holds(accepted):
            await self._switched.wait()

    def _holds(self, accepted: float) -> bool:
        is_forgotten = self._mode in {DROP, SILENCE} and accepted <= self._switched_at
        return self._mode is BLACKHOLE or is_forgotten

    def cut(self) -> tuple[object, float]:
        """Return how many bytes of answers may pass, and since which switch they count."""
        mode = self._mode
        return mode, mode.count if isinstance(mode, CutAfter) else math.inf

    def fate_of(self, data: bytes) -> Fate:
        """Decide about a piece from the client."""
        mode = self._mode
        return mode.fate_of(data) if isinstance(mode, CutCommits) else Fate.FORWARDED

    def was_cut(self) -> None:
        """Count the interference."""
        self.struck += 1
