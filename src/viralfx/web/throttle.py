"""The brake on guesses of tokens: responses to wrong tokens wait, and those to right ones never do.

A wrong token adds to a level of its address and to one of all addresses. Both fall with time. A
response waits for the part of a level that exceeds the free part. A flood from one address thus
slows down itself, and cannot keep the holder of a token out.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from viralfx.core.clock import Clock

MAX_WAIT_SECONDS = 5.0
"""The longest wait of a response."""
MAX_WAITING = 500
"""Responses that wait at once, since each holds a connection. Further ones do not wait, and end
their connection instead."""
MAX_WAITING_OF_ADDRESS = 100
MAX_ADDRESSES = 4096
"""Addresses that are known; of more, the one without a guess for the longest time is forgotten."""

Address = bytes | str | None


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many guesses are free, and how many a second are, when these are used up."""

    free: float
    per_second: float


OF_ADDRESS = Allowance(free=10, per_second=1)
OF_ALL = Allowance(free=100, per_second=20)


class _Level:
    """A number that each guess raises by one, and time lowers."""

    __slots__ = ("_allowance", "_at", "_value", "waiting")

    def __init__(self, allowance: Allowance, now: float) -> None:
        self._allowance = allowance
        self._value = 0.0
        self._at = now
        self.waiting = 0

    def add(self, now: float) -> float:
        """Count a guess, and return the seconds that its response has to wait."""
        rate, free = self._allowance.per_second, self._allowance.free
        value = max(0.0, self._value - (now - self._at) * rate) + 1
        # Bounded, so that a flood is forgotten soon after its end.
        self._value = min(value, free + MAX_WAIT_SECONDS * rate)
        self._at = now
        return max(0.0, self._value - free) / rate


class GuessBrake:
    """Delays the responses to wrong tokens of one process, on all its ports."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._all = _Level(OF_ALL, clock.monotonic())
        self._addresses: OrderedDict[Address, _Level] = OrderedDict()
        self._waiting: set[asyncio.Future[None]] = set()
        self._released = False
        self._listeners: tuple[Callable[[str], None], ...] = ()

    @property
    def addresses(self) -> int:
        """How many addresses are known."""
        return len(self._addresses)

    @property
    def waiting(self) -> int:
        """How many responses wait."""
        return len(self._waiting)

    def subscribe(self, listener: Callable[[str], None]) -> None:
        """Call ``listener`` for each wrong token with the place: operations, console or jobs."""
        self._listeners = (*self._listeners, listener)

    def release(self) -> None:
        """End all waits, and begin no more: the process stops."""
        self._released = True
        for each in self._waiting:
            if not each.done():
                each.set_result(None)

    async def hold(self, address: str | None, place: str) -> bool:
        """Count a wrong token, and wait before its response.

        ``address`` is that of the client; None: a Unix socket. Returns False if so many responses
        wait that this one did not: then the connection should end, so that a guess costs one.
        """
        for listener in self._listeners:
            listener(place)
        now = self._clock.monotonic()
        level = self._level(network_of(address), now)
        seconds = max(level.add(now), self._all.add(now))
        if not seconds or self._released:
            return True
        if len(self._waiting) >= MAX_WAITING or level.waiting >= MAX_WAITING_OF_ADDRESS:
            return False
        loop = asyncio.get_running_loop()
        released: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _finish, released)
        self._waiting.add(released)
        level.waiting += 1
        try:
            await released
        finally:
            timer.cancel()
            level.waiting -= 1
            self._waiting.discard(released)
        return True

    def _level(self, address: Address, now: float) -> _Level:
        level = self._addresses.get(address)
        if level is None:
            if len(self._addresses) >= MAX_ADDRESSES:
                self._addresses.popitem(last=False)
            level = self._addresses[address] = _Level(OF_ADDRESS, now)
        self._addresses.move_to_end(address)
        return level


def _finish(released: asyncio.Future[None]) -> None:
    if not released.done():
        released.set_result(None)


def network_of(address: str | None) -> Address:
    """Return the part of an address that one client has: of IPv6 the first 64 bits."""
    if address is None:
        return None
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:  # a name, as test clients have
        return address[:64]
    if isinstance(parsed, IPv6Address):
        return parsed.packed[:8] if parsed.ipv4_mapped is None else parsed.ipv4_mapped.packed
    return parsed.packed
