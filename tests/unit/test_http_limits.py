"""The limits of an HTTP server: defaults from the machine, deadlines, memory, rejections."""

import asyncio
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from viralfx.server.connections import Connections
from viralfx.server.limits import (
    TICK_SECONDS,
    HttpLimits,
    Rejection,
)
from viralfx.settings.groups import HttpSettings


class Buffer(asyncio.Transport):
    """A transport whose client reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent = 0
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        """Return the unsent bytes."""
        return self.unsent

    def abort(self) -> None:
        """Record the end."""
        self.aborted = True


class Client:
    """A connection that records its checks."""

    client: tuple[str, int] | None = ("192.0.2.1", 5000)
    sent_bytes = -1
    sent_at = 0.0

    def __init__(self, *deadlines: float) -> None:
        self.tick = -1
        self.checked: list[float] = []
        self.buffer = Buffer()
        self.transport: asyncio.Transport = self.buffer
        self.idle: float | None = None
        self._deadlines = list(deadlines)

    def check_deadline(self, now: float) -> float:
        """Record the check; return the next deadline, or a time far in the future."""
        self.checked.append(now)
        return self._deadlines.pop(0) if self._deadlines else now + 1e6

    def idle_since(self) -> float | None:
        """Return the time that a test set."""
        return self.idle


class Time:
    """The monotonic clock of the module under test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("viralfx.server.connections.monotonic", lambda: self.now)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Return a clock that the test moves."""
    return Time(monkeypatch)


def run(connections: Connections, time: Time, until: float) -> None:
    """Tick like a server until a time."""
    while time.now < until:
        time.now += TICK_SECONDS
        connections.advance()


def test_a_connection_is_checked_once_its_deadline_is_over(time: Time) -> None:
    """The check is at most one tick late; the next one is at the time that it returns."""
    connections = Connections(HttpLimits())
    client = Client(1012.2)
    connections.add(client, 1010.0)
    run(connections, time, 1020)

    assert len(client.checked) == 2
    assert 1010.0 <= client.checked[0] <= 1010.0 + TICK_SECONDS
    assert 1012.2 <= client.checked[1] <= 1012.2 + TICK_SECONDS


def test_the_earliest_deadline_counts(time: Time) -> None:
    """A later deadline is ignored, an earlier one replaces the scheduled check."""
    connections = Connections(HttpLimits())
    client = Client()
    connections.add(client, 1060.0)
    connections.check_at(client, 1070.0)
    connections.check_at(client, 1005.0)
    run(connections, time, 1100)

    assert len(client.checked) == 1
    assert client.checked[0] < 1006


def test_a_removed_connection_is_not_checked(time: Time) -> None:
    """The wheel keeps no reference to it."""
    connections = Connections(HttpLimits())
    client = Client()
    connections.add(client, 1060.0)
    connections.remove(client)
    run(connections, time, 1100)

    assert client.checked == []
    assert list(connections) == []
    assert client.tick == -1


def test_deadlines_hold_after_a_pause_of_the_process(time: Time) -> None:
    """After a suspension of an hour, all due connections are checked."""
    connections = Connections(HttpLimits())
    early, late, later = Client(), Client(), Client()
    connections.add(late, 1100.0)
    connections.add(early, 1010.0)
    connections.add(later, 9000.0)
    time.now += 3600
    connections.advance()

    assert (len(early.checked), len(late.checked), len(later.checked)) == (1, 1, 0)


def test_a_connection_removed_during_a_tick_is_not_checked(time: Time) -> None:
    """A check may remove other connections."""
    connections = Connections(HttpLimits())

    class Ending(Client):
        def check_deadline(self, now: float) -> float:
            for other in connections:
                connections.remove(other)
            return super().check_deadline(now)

    clients = [Ending(), Ending()]
    for client in clients:
        connections.add(client, 1001.0)
    run(connections, time, 1005)

    assert sorted(len(client.checked) for client in clients) == [0, 1]


def test_small_heads_are_accepted_above_the_memory_limit() -> None:
    """A head above the share of one connection is rejected once the total is above the limit."""
    limits = HttpLimits(max_connections=1000, max_unfinished_head_bytes=1_000_000)
    connections = Connections(limits)
    assert connections.may_buffer_heads(60_000)
    connections.head_bytes = 1_000_001

    assert not connections.may_buffer_heads(1025)
    assert connections.may_buffer_heads(1024)


def test_small_requests_are_accepted_above_the_memory_limit() -> None:
    """As with heads."""
    connections = Connections(HttpLimits(max_request_bytes=2000, max_connections=1))
    assert connections.may_buffer_requests(100_000)
    connections.request_bytes = 2001

    assert not connections.may_buffer_requests(2001)
    assert connections.may_buffer_requests(2000)


def test_a_process_short_of_memory_takes_no_large_requests(
    time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is measured once for a MiB of bodies, and at each tick until there is enough again."""
    resident = 900
    monkeypatch.setattr("viralfx.server.connections._used_bytes", lambda: resident)
    connections = Connections(HttpLimits(max_resident_bytes=899, max_connections=1000))
    connections.receive(2**20 - 1)
    assert connections.may_buffer_requests(40_000)
    connections.receive(1)
    assert not connections.may_buffer_requests(40_000)
    assert connections.may_buffer_requests(1000)
    resident = 899
    run(connections, time, time.now + 1)

    assert connections.may_buffer_requests(40_000)


def test_collections_take_little_of_the_time(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection blocks the process for as long as its heap is large."""
    collections: list[float] = []

    def collect() -> None:
        collections.append(time.now)
        time.now += 2.0

    monkeypatch.setattr("viralfx.server.connections.gc.collect", collect)
    monkeypatch.setattr("viralfx.server.connections._used_bytes", lambda: 900)
    connections = Connections(HttpLimits(max_resident_bytes=899))
    connections.receive(2**20)
    began = time.now
    run(connections, time, began + 399)
    assert len(collections) == 1
    run(connections, time, began + 401)

    assert len(collections) == 2


@pytest.mark.parametrize("is_low", [True, False])
async def test_unsent_responses_are_dropped_above_the_limit(
    monkeypatch: pytest.MonkeyPatch, *, is_low: bool
) -> None:
    """The largest first, down to seven eighths; while there is memory, without taken bytes only."""
    used = 2000 if is_low else 0
    monkeypatch.setattr("viralfx.server.connections._used_bytes", lambda: used)
    connections = Connections(HttpLimits(max_unsent_bytes=1000, max_resident_bytes=1000))
    reasons: list[str] = []
    connections.on_rejected = reasons.append
    clients = [Client() for _ in range(12)]
    for number, client in enumerate(clients):
        client.buffer.unsent = 100 - number
        if number >= 4:
            client.sent_bytes = 100 - number  # as at the last check
        connections.pause_writing(client)
    await asyncio.sleep(0)
    aborted = [number for number, client in enumerate(clients) if client.buffer.aborted]

    assert aborted == ([0, 1, 2] if is_low else [4, 5, 6])
    assert reasons == ["unsent"] * 3
    assert connections.unsent_bytes == sum(100 - n for n in range(12) if n not in aborted)
    for client in clients:
        connections.remove(client)
    assert connections.unsent_bytes == 0


async def test_unsent_responses_are_counted_anew_at_each_tick(time: Time) -> None:
    """A client that takes no byte for five seconds is aborted."""
    connections = Connections(HttpLimits(max_unsent_bytes=1000))
    client = Client()
    client.buffer.unsent = 1001
    connections.pause_writing(client)
    run(connections, time, time.now + 1)
    assert not client.buffer.aborted
    client.sent_bytes, client.sent_at = 1001, time.now
    run(connections, time, time.now + 4)
    assert not client.buffer.aborted
    run(connections, time, time.now + 2)

    assert client.buffer.aborted


async def test_responses_that_were_read_meanwhile_no_longer_count() -> None:
    """They are counted anew before a connection is aborted."""
    connections = Connections(HttpLimits(max_unsent_bytes=1000))
    reader, other = Client(), Client()
    reader.buffer.unsent = other.buffer.unsent = 900
    connections.pause_writing(reader)
    reader.buffer.unsent = 50
    connections.pause_writing(other)
    await asyncio.sleep(0)

    assert not reader.buffer.aborted
    assert not other.buffer.aborted
    assert connections.unsent_bytes == 950


def test_a_client_that_reads_nothing_is_aborted(time: Time) -> None:
    """Its time begins anew with each byte that it acknowledges."""
    connections = Connections(HttpLimits())
    client = Client()
    client.buffer.unsent = 100
    check = partial(connections.check_sending, client, rejection=Rejection.SEND_TIMEOUT)
    assert check(time.now, 5.0) == time.now + 5.0
    client.buffer.unsent = 99
    check(time.now + 4.0, 5.0)
    check(time.now + 8.9, 5.0)
    assert not client.buffer.aborted
    check(time.now + 9.0, 5.0)

    assert client.buffer.aborted


def test_a_new_connection_may_replace_the_oldest_idle_one() -> None:
    """Where the limits say so; one with a request is not replaced."""
    connections = Connections(HttpLimits(replaces_idle=True))
    busy, old, new = Client(), Client(), Client()
    old.idle, new.idle = 1.0, 2.0
    for client in (busy, old, new):
        connections.add(client, 1e9)

    assert connections.make_room()
    assert [each.buffer.aborted for each in (busy, old, new)] == [False, True, False]
    assert connections.make_room()
    assert not connections.make_room()
    assert not busy.buffer.aborted


def test_an_api_port_replaces_no_connection() -> None:
    """Its clients are answered by a 503."""
    connections = Connections(HttpLimits())
    idle = Client()
    idle.idle = 1.0
    connections.add(idle, 1e9)

    assert not connections.make_room()


def test_a_failing_check_does_not_stop_the_others(
    time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged, and the check is repeated."""
    connections = Connections(HttpLimits())

    class Failing(Client):
        def check_deadline(self, now: float) -> float:
            super().check_deadline(now)
            raise RuntimeError("planted")

    failing, client = Failing(), Client()
    connections.add(failing, 1001.0)
    connections.add(client, 1002.0)
    run(connections, time, 1003)

    assert len(client.checked) == 1
    assert len(failing.checked) > 1
    messages = {record.getMessage() for record in caplog.records}
    assert messages == {"Deadline check of a connection failed"}


def test_each_rejection_is_counted_by_its_reason() -> None:
    """The counter includes rejections that the log suppresses."""
    connections = Connections(HttpLimits())
    reasons: list[str] = []
    connections.on_rejected = reasons.append
    for rejection in [*Rejection, *Rejection]:
        connections.reject(rejection, None)
    connections.close()

    assert len(reasons) == 2 * len(Rejection)


@pytest.mark.parametrize("rejection", [one for one in Rejection if one.status])
def test_a_rejection_is_problem_details_and_closes(rejection: Rejection) -> None:
    """The response has a ``Content-Length``; a 503 has ``Retry-After``."""
    head = rejection.head.decode()

    assert head.startswith(f"HTTP/1.1 {rejection.status} ")
    assert f"content-length: {len(rejection.body)}\r\n" in head
    assert head.endswith("connection: close\r\n")
    assert ("retry-after: 1\r\n" in head) == (rejection.status == 503)


@contextmanager
def descriptors(soft: int) -> Iterator[None]:
    """Set the soft limit of descriptors within the block."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_connections_leave_a_reserve_of_descriptors() -> None:
    """The reserve is for checks, files, the pool and the management port."""
    http = HttpSettings()
    with descriptors(256):
        api, management = HttpLimits.for_api(http), HttpLimits.for_management(http)
        with_pool = HttpLimits.for_api(http, other_descriptors=14)

    assert api.max_connections + management.max_connections <= 256 - 64
    assert with_pool.max_connections == api.max_connections - 14
    assert management.max_connections >= 8


@pytest.mark.parametrize("limit", [96, 128, 256, 1024])
@pytest.mark.parametrize("others", [14, 154])
def test_a_quarter_of_the_descriptors_serves_the_api(limit: int, others: int) -> None:
    """A large pool on a small limit leaves no less."""
    with descriptors(limit):
        limits = HttpLimits.for_api(HttpSettings(), other_descriptors=others)

    assert limits.max_connections >= limit // 4


def test_a_setting_above_the_descriptor_limit_is_reduced(caplog: pytest.LogCaptureFixture) -> None:
    """The server uses the available descriptors, and a warning names the variable."""
    with descriptors(256):
        limits = HttpLimits.for_api(HttpSettings(max_connections=1000))

    assert limits.max_connections < 256
    (record,) = caplog.records
    assert record.getMessage().startswith("HTTP_MAX_CONNECTIONS is more than")
    assert vars(record)["wanted"] == 1000


def test_a_setting_below_the_descriptor_limit_is_used() -> None:
    """HTTP_MAX_CONNECTIONS is the limit."""
    limits = HttpLimits.for_api(HttpSettings(max_connections=5))

    assert limits.max_connections == 5
