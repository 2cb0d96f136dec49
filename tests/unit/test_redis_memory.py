"""When Redis is asked for its memory, and what is understood of the answer."""

from tests.manual_clock import ManualClock

from viralfx.adapters.redis.memory import MemoryQuestion, MemoryUse

REPLY = b"# Memory\r\nused_memory:1048576\r\nused_memory_human:1.00M\r\nmaxmemory:%d\r\n"


async def test_a_ping_comes_first_and_between(clock: ManualClock) -> None:
    """A server that cannot save or still loads tells its memory all the same."""
    question = MemoryQuestion(clock)
    first = question.due
    question.pinged()
    second = question.due
    question.answered(REPLY % 0)
    third = question.due
    question.pinged()
    soon = question.due
    await clock.advance(30.0)
    later = question.due
    question.failed()

    assert (first, second, third, soon, later) == (False, True, False, False, True)
    assert not question.due


async def test_who_may_not_ask_asks_again_an_hour_later(clock: ManualClock) -> None:
    """Rights change."""
    question = MemoryQuestion(clock)
    question.forbidden()
    question.pinged()
    await clock.advance(3599.0)
    before = question.due
    await clock.advance(1.0)

    assert not before
    assert question.due


def test_what_is_understood(clock: ManualClock) -> None:
    """Bytes, and no limit where it is 0; what is not understood changes nothing."""
    question, seen = MemoryQuestion(clock), []
    for reply in (REPLY % 0, (REPLY % 2097152).decode(), b"", None):
        question.answered(reply)
        seen.append(question.answer)

    limited = MemoryUse(used=1048576, limit=2097152)
    assert seen == [MemoryUse(used=1048576, limit=None), limited, limited, limited]
