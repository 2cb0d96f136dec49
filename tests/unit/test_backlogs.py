"""Large reads of an HTTP server are parsed in turn, and the rest waits for its memory."""

import asyncio

import pytest
from tests.unit.test_http_limits import Buffer

from viralfx.server.connections import Connections
from viralfx.server.limits import HttpLimits


class Reading(Buffer):
    """A transport that records whether it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = True

    def pause_reading(self) -> None:
        """Record the pause."""
        self.reads = False

    def is_closing(self) -> bool:
        """Return whether it was aborted."""
        return self.aborted


class Parsing:
    """A connection whose slices take 2 ms each."""

    waits_for_application = False

    def __init__(self, name: str, order: list[str], clock: "Clock") -> None:
        self.reading = Reading()
        self.transport: asyncio.Transport = self.reading
        self.may_parse = True
        self.parsed = b""
        self.fails = self.ends = False
        self._name, self._order, self._clock = name, order, clock

    def slice_size(self, data: bytearray) -> int:
        """Return the size of a slice."""
        return min(10, len(data))

    def parse_slice(self, data: bytes) -> bool:
        """Record a slice."""
        self._clock.now += 0.002
        self._order.append(self._name)
        if self.fails:
            raise ValueError("planted")
        self.parsed += data
        return not self.ends

    def end_backlog(self) -> None:
        """Record that the connection reads on."""
        self.reading.reads = True

    def abandon(self) -> None:
        """Record that the connection ends."""
        self.reading.aborted = True


class Clock:
    """The monotonic clock of the module under test."""

    now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a clock that the slices move."""
    clock = Clock()
    monkeypatch.setattr("viralfx.server.connections.monotonic", clock)
    return clock


async def parsed(connections: Connections, *, turns: int = 20) -> None:
    """Let the event loop turn until all is parsed."""
    for _ in range(turns):
        await asyncio.sleep(0)
    assert connections.request_bytes == 0


async def test_connections_take_turns_slice_by_slice(clock: Clock) -> None:
    """In one turn of the loop three slices of 2 ms begin; nothing is lost or reordered."""
    connections, order = Connections(HttpLimits()), list[str]()
    backlogs = connections.backlogs
    one, other = Parsing("a", order, clock), Parsing("b", order, clock)
    text = bytes(range(45))
    assert backlogs.add(one, text)
    assert backlogs.add(other, text[:25])
    assert connections.request_bytes == 70
    assert not one.reading.reads
    await asyncio.sleep(0)
    assert order == ["a", "b", "a"]
    assert backlogs.add(one, b"more")
    await parsed(connections)

    assert "".join(order) == "abababaa"
    assert one.parsed == text + b"more"
    assert other.parsed == text[:25]
    assert one.reading.reads
    assert other.reading.reads
    assert one not in backlogs


async def test_a_turn_has_time_for_a_few_milliseconds(clock: Clock) -> None:
    """Of all connections together; the next turn has time again."""
    backlogs = Connections(HttpLimits()).backlogs
    assert backlogs.has_time()
    clock.now += 0.004
    assert backlogs.has_time()
    clock.now += 0.001
    assert not backlogs.has_time()
    await asyncio.sleep(0)

    assert backlogs.has_time()


async def test_a_connection_waits_while_its_application_does_not_read(clock: Clock) -> None:
    """Until it is resumed; the event loop has nothing to do meanwhile."""
    connections, order = Connections(HttpLimits()), list[str]()
    one = Parsing("a", order, clock)
    one.may_parse = False
    connections.backlogs.add(one, b"a" * 20)
    for _ in range(5):
        await asyncio.sleep(0)
    assert order == []
    one.may_parse = True
    connections.backlogs.resume(one)
    await parsed(connections)

    assert one.parsed == b"a" * 20


async def test_rests_above_the_limit_of_memory_are_refused(clock: Clock) -> None:
    """They count as unread bodies do."""
    connections, order = (
        Connections(HttpLimits(max_request_bytes=5000, max_connections=1000)),
        list[str](),
    )
    first, second = Parsing("a", order, clock), Parsing("b", order, clock)
    assert connections.backlogs.add(first, b"a" * 5001)
    assert not connections.backlogs.add(second, b"a" * 2000)
    connections.backlogs.drop(first)

    assert connections.request_bytes == 0
    assert connections.backlogs.add(second, b"a" * 2000)


@pytest.mark.parametrize("how", ["fails", "ends"])
async def test_a_connection_that_ends_does_not_stop_the_others(
    clock: Clock, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """The rest of its read is dropped."""
    connections, order = Connections(HttpLimits()), list[str]()
    one, other = Parsing("a", order, clock), Parsing("b", order, clock)
    setattr(one, how, True)
    connections.backlogs.add(one, b"a" * 50)
    connections.backlogs.add(other, b"b" * 50)
    await parsed(connections)

    assert order.count("a") == 1
    assert other.parsed == b"b" * 50
    assert one.reading.aborted == (how == "fails")
    assert len(caplog.records) == (how == "fails")


@pytest.mark.parametrize("is_low", [True, False])
async def test_rests_that_wait_for_applications_have_a_limit_of_their_own(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, *, is_low: bool
) -> None:
    """Above it the largest is aborted if memory is low; requests are not refused for them."""
    monkeypatch.setattr("viralfx.server.connections._used_bytes", lambda: 2000 if is_low else 0)
    connections = Connections(HttpLimits(max_request_bytes=5000, max_resident_bytes=1000))
    sockets = [Parsing("a", [], clock) for _ in range(3)]
    for number, each in enumerate(sockets):
        each.waits_for_application = True
        each.may_parse = False
        assert connections.backlogs.add(each, b"a" * (1700 + 10 * (number == 1)))

    assert [each.reading.aborted for each in sockets] == [False, is_low, False]
    assert connections.request_bytes == 0
    assert connections.backlogs.add(sockets[0], b"a" * 1600)
    assert not sockets[0].reading.aborted


async def test_messages_count_with_the_rests_of_reads(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection with most of both is aborted; the memory is not measured each time."""
    measured, memory = 0, 2000

    def used() -> int:
        nonlocal measured
        measured += 1
        return memory

    monkeypatch.setattr("viralfx.server.connections._used_bytes", used)
    connections = Connections(HttpLimits(max_request_bytes=8000, max_resident_bytes=1000))
    backlogs = connections.backlogs
    first, second, third = (Parsing("a", [], clock) for _ in range(3))
    for each in (first, second, third):
        each.waits_for_application = True
        each.may_parse = False
    backlogs.hold(first, 3000)
    backlogs.hold(second, 2500)
    backlogs.add(second, b"a" * 1000)
    backlogs.hold(third, 1000)
    assert measured == 0
    backlogs.hold(third, 2000)
    assert [each.reading.aborted for each in (first, second, third)] == [False, True, False]
    backlogs.hold(third, 4500)
    assert not third.reading.aborted
    backlogs.hold(first, 0)
    measured = memory = 0
    for size in range(8000, 9000, 10):
        backlogs.hold(third, size)

    assert measured <= 2
    assert not third.reading.aborted
