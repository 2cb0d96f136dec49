"""Schedule of the memory query, and parsing of its reply."""

from tests.manual_clock import ManualClock

from viralfx.adapters.redis.client import MemoryQuery, MemoryUse

REPLY = b"# Memory\r\nused_memory:1048576\r\nused_memory_human:1.00M\r\nmaxmemory:%d\r\n"


async def test_memory_query_needs_a_ping_before(clock: ManualClock) -> None:
    """A server that cannot save or is loading still reports its memory."""
    question = MemoryQuery(clock)
    first = question.due
    question.pinged()
    second = question.due
    question.replied(REPLY % 0)
    third = question.due
    question.pinged()
    soon = question.due
    await clock.advance(30.0)
    later = question.due
    question.failed()

    assert (first, second, third, soon, later) == (False, True, False, False, True)
    assert not question.due


async def test_forbidden_query_is_repeated_after_an_hour(clock: ManualClock) -> None:
    """Permissions may change."""
    question = MemoryQuery(clock)
    question.forbidden()
    question.pinged()
    await clock.advance(3599.0)
    before = question.due
    await clock.advance(1.0)

    assert not before
    assert question.due


def test_reply_is_parsed(clock: ManualClock) -> None:
    """Bytes, and no limit if it is 0; an unknown reply changes nothing."""
    question, seen = MemoryQuery(clock), []
    for reply in (REPLY % 0, (REPLY % 2097152).decode(), b"", None):
        question.replied(reply)
        seen.append(question.usage)

    limited = MemoryUse(used=1048576, limit=2097152)
    assert seen == [MemoryUse(used=1048576, limit=None), limited, limited, limited]


def test_memory_is_full_only_without_eviction(clock: ManualClock) -> None:
    """At the limit, a policy that evicts makes room."""
    question, full = MemoryQuery(clock), []
    for policy in (b"noeviction", b"allkeys-lru"):
        question.replied(REPLY % 1048576 + b"maxmemory_policy:" + policy + b"\r\n")
        full.append(question.usage is not None and question.usage.is_full)

    assert full == [True, False]
