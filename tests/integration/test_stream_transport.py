"""Bells over a real Redis: heard once, by who has time, and again after whatever happens to it."""

import asyncio
import logging
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import pytest
from tests.again import AGAIN_IF_SLOW
from tests.integration.bells import (
    QUEUE,
    STREAM,
    Heard,
    listening,
    ring,
    ring_until_sent,
    told,
    transport_to,
    transport_with,
)
from tests.integration.redis_clients import Possessions, until
from tests.servers.certificates import Certificates
from tests.servers.fault_proxy import BLACKHOLE
from tests.servers.fixtures import FaultProxies
from tests.servers.redis import RedisServer, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.system.load import require_quick

from viralfx.adapters.redis import RedisClient, RedisConfig, RedisTls
from viralfx.adapters.taskiq import BellNotRungError, StreamTransport
from viralfx.domain.jobs.transport import Bell

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
LOST = "Bells are not heard, workers look for jobs by themselves"
FOUND = "Bells are heard again"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Keep what is logged as it is in production."""
    caplog.set_level(logging.WARNING, "taskiq")
    caplog.set_level(logging.INFO, "viralfx.queues")
    return caplog


def groups(server: RedisServer) -> dict[str, Any]:
    """Return what Redis says of the one group of the stream."""
    (flat,) = server.command("XINFO", "GROUPS", STREAM)
    return dict(zip(flat[::2], flat[1::2], strict=True)) if isinstance(flat, list) else dict(flat)


# -- ringing and hearing -------------------------------------------------------------------------


async def test_one_message_carries_the_ids(redis: RedisServer) -> None:
    """And nothing else: what the job is, only the ledger knows."""
    heard: list[Bell] = []

    async def hear(bell: Bell) -> None:
        heard.append(bell)

    async with transport_to(redis) as transport:
        await transport.ring(Bell(QUEUE, ["a", "b"]))

        assert redis.command("XLEN", STREAM) == 1
        async with listening(transport, hear):
            await until(lambda: heard)

    assert heard == [Bell(QUEUE, ("a", "b"))]


async def test_what_was_rung_before_anybody_listened_is_heard(redis: RedisServer) -> None:
    """The group begins at the beginning, not at its own birth."""
    heard = Heard()
    async with transport_to(redis) as transport:
        await ring(transport, "1", "2", "3")
        async with listening(transport, heard):
            await until(lambda: len(heard) == 3)

    assert heard == ["1", "2", "3"]


async def test_two_workers_share(redis: RedisServer) -> None:
    """Each bell is heard once, and each worker hears some."""
    one, other = Heard(), Heard()
    jobs = [str(number) for number in range(200)]
    async with (
        transport_to(redis) as first,
        transport_to(redis) as second,
        listening(first, one, slots=2),
        listening(second, other, slots=2),
    ):
        await ring(first, *jobs)
        await until(lambda: len(one) + len(other) >= 200)

    assert sorted(one + other) == sorted(jobs)
    assert one
    assert other


async def test_a_bell_waits_for_who_has_time(redis: RedisServer) -> None:
    """Two slots hold two calls, and what is rung then stays for others to take."""
    busy, done, heard = 0, asyncio.Event(), Heard()
    most = 0

    async def hear(bell: Bell) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await done.wait()
        busy -= 1
        await heard(bell)

    other = Heard()
    async with (
        transport_to(redis) as first,
        transport_to(redis) as second,
        listening(first, hear, slots=2),
    ):
        await ring(first, *"abcde")
        await until(lambda: busy == 2)
        await until(lambda: redis.command("XLEN", STREAM) == 3)
        async with listening(second, other):
            await until(lambda: len(other) == 3)
        assert (busy, len(heard)) == (2, 0)
        done.set()
        await ring(first, *"fghij")
        await until(lambda: len(heard) == 7)

    assert sorted(other) == ["c", "d", "e"]
    assert most == 2


async def test_what_hearing_raises_is_logged(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """And costs the slot nothing: with one slot, the next bell is heard."""
    heard = Heard()

    async def hear(bell: Bell) -> None:
        if bell.ids == ("bad",):
            raise RuntimeError("no")
        await heard(bell)

    async with transport_to(redis) as transport, listening(transport, hear, slots=1):
        await ring(transport, "bad", "good")
        await until(lambda: heard)

    assert told(caplog) == ["A bell was heard in vain"]


async def test_what_is_no_bell_is_dropped(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With one line for each, once; what a later release adds is passed over."""
    heard = Heard()
    junk = [b"", b"\xff\xfe", b"{", b"[]", b'{"ids": 5}', b'{"ids": [1]}', b"[" * 100_000]
    async with transport_to(redis) as transport:
        async with listening(transport, heard, slots=2):
            redis.command("XADD", STREAM, "*", "other", "field")
            for data in junk:
                redis.command("XADD", STREAM, "*", "data", data)
            redis.command("XADD", STREAM, "*", "data", '{"ids": ["new"], "more": {"a": [1]}}')
            await ring(transport, "mine")
            await until(lambda: len(heard) == 2)

        assert redis.command("XLEN", STREAM) == 0
    assert heard == ["new", "mine"]
    assert told(caplog) == ["What is no bell was dropped"] * (1 + len(junk))


# -- leaving -------------------------------------------------------------------------------------


async def test_cancelling_ends_the_calls_and_leaves_nothing(redis: RedisServer) -> None:
    """It ends when they ended, and twenty times over nothing is left in this process."""
    begun = ended = 0

    async def hear(_: Bell) -> None:
        nonlocal begun, ended
        begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended += 1

    held = Possessions()
    async with transport_to(redis) as transport:
        for turn in range(1, 21):
            await ring(transport, "a", "b", "c")
            tasks = asyncio.all_tasks()
            async with listening(transport, hear, slots=3):
                await until(lambda turn=turn: begun == 3 * turn)  # type: ignore[misc]
            assert asyncio.all_tasks() == tasks
            assert not transport.hears(QUEUE)
            assert ended == begun
    await held.as_before()

    connected = str(redis.command("CLIENT", "LIST"))
    assert "name=viralfx" not in connected
    assert len(redis.command("XINFO", "CONSUMERS", STREAM, "workers")) == 1


async def test_a_closed_transport_neither_rings_nor_hears(redis: RedisServer) -> None:
    """Closing twice is harmless; a listener waits to be cancelled, and its calls go on."""
    heard, held = Heard(), Possessions()
    async with transport_to(redis) as transport, listening(transport, heard) as task:
        await transport.close()
        await transport.close()
        with pytest.raises(BellNotRungError):
            await ring(transport, "a")

        assert not transport.hears(QUEUE)
        await until(lambda: "name=viralfx" not in str(redis.command("CLIENT", "LIST")))
        assert not task.done()
    await held.as_before()


async def test_a_listener_of_a_closed_transport_waits(redis: RedisServer) -> None:
    """It opens nothing."""
    async with transport_to(redis) as transport:
        await transport.close()
        async with listening(transport, Heard(), at_once=False) as task:
            await asyncio.sleep(0)
            assert not task.done()
        assert "name=viralfx" not in str(redis.command("CLIENT", "LIST"))


# -- a stream holds what waits -------------------------------------------------------------------


async def test_a_stream_is_empty_at_rest(redis: RedisServer) -> None:
    """After 5000 bells nothing is left of them, pending entries included."""
    heard = Heard()

    async def wave(transport: StreamTransport, count: int) -> None:
        heard.clear()
        async with asyncio.TaskGroup() as senders:
            for sender in range(10):
                senders.create_task(ring(transport, *[str(sender)] * (count // 10)))
        await until(lambda: len(heard) == count, seconds=30)

    async with transport_to(redis) as transport, listening(transport, heard, slots=100):
        await wave(transport, 1000)
        before = redis.command("MEMORY", "USAGE", STREAM)
        await wave(transport, 5000)

        assert redis.command("XLEN", STREAM) == 0
        assert groups(redis)["pending"] == 0
        assert redis.command("MEMORY", "USAGE", STREAM) <= before + 1024


async def test_what_nobody_hears_is_bounded(redis: RedisServer) -> None:
    """The oldest make room, by whole nodes of the stream."""
    heard = Heard()
    async with transport_to(redis, backlog=200) as transport:
        await ring(transport, *map(str, range(1000)))
        kept = redis.command("XLEN", STREAM)
        async with listening(transport, heard):
            await until(lambda: "999" in heard)

    assert 200 <= kept <= 300
    assert heard == [str(number) for number in range(1000 - kept, 1000)]


async def test_what_a_killed_worker_left_is_removed(redis: RedisServer) -> None:
    """It read, and did not live to remove: the next listener does, or one that hears nothing."""
    read = ["XREADGROUP", "GROUP", "workers", "workers", "COUNT", "2", "NOACK", "STREAMS"]
    heard = Heard()
    async with transport_to(redis, tidy_every=0.05) as transport:
        async with listening(transport, heard):
            pass
        await ring(transport, "a", "b", "c")
        redis.command(*read, STREAM, ">")
        async with listening(transport, heard):
            await until(lambda: heard == ["c"])
            await until(lambda: redis.command("XLEN", STREAM) == 0)
            async with transport_to(redis) as other:
                await other.ring(Bell(QUEUE, ("d",)))
            await until(lambda: heard == ["c", "d"])
            # Between two reads of the listener, somebody else's takes the next one.
            while groups(redis)["entries-read"] == 4:
                redis.command("XADD", STREAM, "*", "data", '{"ids": []}')
                redis.command(*read, STREAM, ">")
            await until(lambda: redis.command("XLEN", STREAM) == 0)
        assert groups(redis)["consumers"] == 1
        assert groups(redis)["pending"] == 0


async def test_a_killed_worker_leaves_nothing(redis: RedisServer) -> None:
    """Killed with bells in its hands: they are gone from the stream, and so is its name."""
    heard = Heard()
    async with transport_to(redis) as transport:
        await ring(transport, "a", "b", "c")
        arguments = (
            sys.executable,
            "-m",
            "tests.integration.listener",
            redis.host,
            str(redis.port),
        )
        worker = await asyncio.create_subprocess_exec(*arguments, stdout=PIPE, cwd=ROOT)
        try:
            assert worker.stdout is not None
            async with asyncio.timeout(20):
                held = [(await worker.stdout.readline()).strip() for _ in range(2)]
        finally:
            worker.kill()
            await worker.wait()
        assert redis.command("XLEN", STREAM) == 1
        async with listening(transport, heard):
            await ring(transport, "d")
            await until(lambda: len(heard) == 2)

        assert held == [b"a", b"b"]
        assert heard == ["c", "d"]
        assert redis.command("XLEN", STREAM) == 0
        assert (groups(redis)["consumers"], groups(redis)["pending"]) == (1, 0)


# -- faults --------------------------------------------------------------------------------------


async def test_data_loss_is_made_good_within_a_second(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """FLUSHALL takes the stream and its group; what is rung then is heard, and little said."""
    heard, slowest = Heard(), 0.0
    async with transport_to(redis) as transport, listening(transport, heard):
        for turn in map(str, range(5)):
            redis.flush()
            started = time.monotonic()
            await ring(transport, turn)
            await until(lambda turn=turn: turn in heard)  # type: ignore[misc]
            slowest = max(slowest, time.monotonic() - started)

    assert slowest < 3
    assert told(caplog) in [[LOST, FOUND] * count for count in range(1, 6)]


@AGAIN_IF_SLOW
async def test_a_restart_is_two_lines(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed, away for many attempts and back empty: lost once, found once, and no bell unheard."""
    heard = Heard()
    async with transport_to(own_redis) as transport, listening(transport, heard):
        await ring(transport, "before")
        await until(lambda: heard)
        own_redis.kill()
        await until(lambda: not transport.hears(QUEUE))
        started = time.monotonic()
        with pytest.raises(BellNotRungError):
            await ring(transport, "into nothing")
        refused = time.monotonic() - started
        await until(lambda: time.monotonic() - started > 2)
        own_redis.start()
        await until(lambda: transport.hears(QUEUE), seconds=10)
        await ring_until_sent(transport, "after")
        await until(lambda: heard == ["before", "after"])

    assert told(caplog) == [LOST, FOUND]
    require_quick(refused, 0.5, "a bell while Redis is away")


async def test_slots_hold_through_an_outage(own_redis: RedisServer) -> None:
    """The calls under way notice nothing, and keep their slots."""
    running = most = 0
    heard, done = Heard(), asyncio.Event()

    async def hear(bell: Bell) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await done.wait()
        running -= 1
        await heard(bell)

    async with transport_to(own_redis) as transport, listening(transport, hear, slots=3):
        await ring(transport, "a", "b")
        await until(lambda: running == 2)
        own_redis.kill()
        await until(lambda: not transport.hears(QUEUE))
        own_redis.start()
        await until(lambda: transport.hears(QUEUE), seconds=10)
        await ring_until_sent(transport, "c")
        await ring(transport, "d", "e")
        await until(lambda: running == 3)
        await until(lambda: own_redis.command("XLEN", STREAM) == 2)
        done.set()
        await until(lambda: len(heard) == 5)

    assert most == 3
    assert sorted(heard) == ["a", "b", "c", "d", "e"]


async def test_redis_down_at_the_start(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Listening begins when Redis does."""
    heard = Heard()
    own_redis.kill()
    async with transport_to(own_redis) as transport, listening(transport, heard, at_once=False):
        await until(lambda: told(caplog) == [LOST])
        assert not transport.hears(QUEUE)
        own_redis.start()
        await until(lambda: transport.hears(QUEUE), seconds=10)
        await ring_until_sent(transport, "a")
        await until(lambda: heard)

    assert told(caplog) == [LOST, FOUND]


@AGAIN_IF_SLOW
async def test_a_frozen_redis_holds_nobody(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The first bell is given up within 2 s, later ones at once; listeners know and come back."""
    heard = Heard()
    async with transport_to(own_redis) as transport, listening(transport, heard):
        await ring(transport, "before")
        await until(lambda: heard)
        own_redis.freeze()
        started = time.monotonic()
        with pytest.raises((BellNotRungError, OSError)):
            await ring(transport, "first")
        first = time.monotonic() - started
        started = time.monotonic()
        for _ in range(100):
            with pytest.raises(BellNotRungError):
                await ring(transport, "later")
        later = time.monotonic() - started
        await until(lambda: not transport.hears(QUEUE))
        own_redis.thaw()
        await until(lambda: transport.hears(QUEUE), seconds=10)
        await ring_until_sent(transport, "after")
        await until(lambda: "after" in heard)

    assert told(caplog) == [LOST, FOUND]
    require_quick(first, 2.2, "the first bell")
    require_quick(later, 0.5, "a hundred later ones")


@AGAIN_IF_SLOW
async def test_cancelling_while_redis_is_frozen(own_redis: RedisServer) -> None:
    """Neither listening nor closing waits for it."""
    held = Possessions()
    async with transport_to(own_redis) as transport:
        async with listening(transport, Heard()):
            own_redis.freeze()
            started = time.monotonic()
        await transport.close()
        took = time.monotonic() - started
    own_redis.thaw()
    await held.as_before()

    require_quick(took, 0.5, "cancelling and closing")


@AGAIN_IF_SLOW
async def test_a_black_hole_is_given_up(redis: RedisServer, fault_proxy: FaultProxies) -> None:
    """Connections open and nothing answers: each bell has its limit all the same."""
    proxy = fault_proxy(redis.port, host=redis.host)
    proxy.mode = BLACKHOLE
    async with transport_to(proxy) as transport:
        started = time.monotonic()
        with pytest.raises((BellNotRungError, OSError)):
            await ring(transport, "a")

    require_quick(time.monotonic() - started, 2.2, "a bell")


async def test_a_key_of_another_kind_is_said_once(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody's text where the stream should be: bells cannot be rung, until it is gone."""
    heard = Heard()
    redis.command("SET", STREAM, "text")
    async with transport_to(redis) as transport, listening(transport, heard, at_once=False):
        await until(lambda: told(caplog) == [LOST])
        with pytest.raises(BellNotRungError, match="WRONGTYPE"):
            await ring(transport, "a")
        redis.command("DEL", STREAM)
        await until(lambda: transport.hears(QUEUE), seconds=10)
        await ring(transport, "b")
        await until(lambda: heard == ["b"])

    assert told(caplog) == [LOST, FOUND]


async def test_the_bell_survives_a_failover(
    sentinel_setup: SentinelSetup, caplog: pytest.LogCaptureFixture
) -> None:
    """Listeners and senders find the new primary."""
    heard = Heard()
    config = RedisConfig(
        sentinels=tuple(sentinel_setup.sentinels),
        sentinel_name=sentinel_setup.name,
        password=sentinel_setup.password,
        sentinel_password=sentinel_setup.sentinel_password,
    )
    async with transport_with(config) as transport, listening(transport, heard):
        await ring(transport, "before")
        await until(lambda: heard)
        old = sentinel_setup.kill_primary()
        await asyncio.to_thread(sentinel_setup.wait_failover, old)
        await until(lambda: transport.hears(QUEUE), seconds=15)
        await ring_until_sent(transport, "after")
        await until(lambda: "after" in heard)

    assert told(caplog) == [LOST, FOUND]


# -- TLS and access ------------------------------------------------------------------------------


async def test_bells_over_tls(tls_redis: RedisServer, certificates: Certificates) -> None:
    """With a password, and the authority's certificate."""
    heard = Heard()
    config = RedisConfig(
        host=tls_redis.host,
        port=tls_redis.port,
        password=tls_redis.password,
        tls=RedisTls(ca_file=str(certificates.ca)),
    )
    async with transport_with(config) as transport, listening(transport, heard):
        await ring(transport, "a")
        await until(lambda: heard)


async def test_the_commands_that_a_user_needs() -> None:
    """Five commands on the keys of the streams, beside what every connection needs."""
    heard = Heard()
    rights = "~viralfx:bells:* -@all +@connection +xadd +xreadgroup +xgroup +xinfo +xtrim"
    with redis_server(users=[f"bells on >secret {rights}"]) as server:
        config = RedisConfig(
            host=server.host, port=server.port, username="bells", password="secret"
        )
        async with transport_with(config) as transport, listening(transport, heard):
            await ring(transport, "a")
            await until(lambda: heard)


async def test_further_connections_go_with_their_client(redis: RedisServer) -> None:
    """Whoever closes the client cuts them, whether or not the transport was closed."""
    held = Possessions()
    client = RedisClient(RedisConfig(host=redis.host, port=redis.port))
    transport = StreamTransport(client)
    await ring(transport, "a")
    async with listening(transport, Heard()):
        await client.close()
        with pytest.raises(BellNotRungError):
            await ring(transport, "b")
    await held.as_before()
