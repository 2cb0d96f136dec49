"""Many callers, few calls: order, keys, errors and cancellation."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.virtual_time import run_in_virtual_time

from viralfx.domain.correlation import correlated, current_correlation_id
from viralfx.domain.jobs.coalescing import Coalescer


class RefusedError(Exception):
    """An item is not taken."""


class AwayError(Exception):
    """Nothing is taken."""


class Store:
    """Takes batches, a second each, and notes them."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.taken: list[str] = []
        self.most_at_once = 0
        self._under_way = 0
        self.away = False

    async def take(self, items: Sequence[str]) -> Sequence[str]:
        """Take all items or none."""
        self.batches.append(list(items))
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            await asyncio.sleep(1.0)
        finally:
            self._under_way -= 1
        if self.away:
            raise AwayError
        if any(item.startswith("bad") for item in items):
            raise RefusedError(",".join(items))
        self.taken.extend(items)
        return [item.upper() for item in items]


def first_letter(item: str) -> str | None:
    """Return a key, None for items that begin with a dash."""
    return None if item.startswith("-") else item[0]


async def test_what_is_ready_at_the_same_time_is_one_call() -> None:
    """And each caller gets its own answer."""
    store = Store()
    coalescer = Coalescer(store.take)
    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(coalescer(name)) for name in ("a", "b", "c")]

    assert [answer.result() for answer in answers] == ["A", "B", "C"]
    assert store.batches == [["a", "b", "c"]]


async def test_what_comes_meanwhile_is_the_next_call() -> None:
    """One is under way at a time."""
    store = Store()
    coalescer = Coalescer(store.take)
    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(coalescer(str(number)))
            await asyncio.sleep(0.3)

    assert store.batches == [["0"], ["1", "2", "3"], ["4", "5", "6"], ["7", "8", "9"]]
    assert store.most_at_once == 1


async def test_nobody_waits_for_more_than_two_calls_that_fail_for_all() -> None:
    """However many callers there are: those who found no place in a call share its error."""
    store = Store()
    store.away = True
    coalescer = Coalescer(store.take, most=2, apart=first_letter, shared=AwayError)
    waiting = [asyncio.create_task(coalescer("-1"))]
    await asyncio.sleep(0.5)
    waiting += [asyncio.create_task(coalescer(item)) for item in ("a", "ab", *"bcdefg")]
    await asyncio.sleep(1.0)
    last = asyncio.create_task(coalescer("h"))
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    store.away = False

    assert [type(error) for error in errors] == [AwayError] * 9
    assert await last == "H"
    assert store.batches == [["-1"], ["a", "b"], ["h"]]


async def test_a_call_has_no_more_than_so_many_items() -> None:
    """The others are next."""
    store = Store()
    coalescer = Coalescer(store.take, most=2)
    async with asyncio.TaskGroup() as group:
        for name in "abcde":
            group.create_task(coalescer(name))

    assert store.batches == [["a", "b"], ["c", "d"], ["e"]]


async def test_items_of_one_key_never_share_a_call() -> None:
    """They keep their order; None is no key."""
    store = Store()
    coalescer = Coalescer(store.take, apart=first_letter)
    async with asyncio.TaskGroup() as group:
        for name in ("a1", "b1", "a2", "-1", "-2", "a3"):
            group.create_task(coalescer(name))

    assert store.batches == [["a1", "b1", "-1", "-2"], ["a2"], ["a3"]]


async def test_an_error_reaches_only_who_caused_it() -> None:
    """The others are taken, and none twice."""
    store = Store()
    coalescer = Coalescer(store.take)
    names = ["a", "b", "bad", "c", "d", "e"]
    tasks = [asyncio.create_task(coalescer(name)) for name in names]
    await asyncio.wait(tasks)

    assert [str(task.exception() or task.result()) for task in tasks] == [
        *("A", "B", "bad", "C", "D", "E")
    ]
    assert sorted(store.taken) == ["a", "b", "c", "d", "e"]


async def test_a_shared_error_reaches_all_at_once() -> None:
    """Nothing is tried again, and the next call is made."""
    store = Store()
    coalescer = Coalescer(store.take, shared=AwayError)
    store.away = True
    tasks = [asyncio.create_task(coalescer(name)) for name in "abc"]
    await asyncio.wait(tasks)
    store.away = False

    assert [type(task.exception()) for task in tasks] == [AwayError] * 3
    assert store.batches == [["a", "b", "c"]]
    assert await coalescer("d") == "D"


async def test_a_cancelled_caller_harms_nobody() -> None:
    """Before its call it is left out; in it, the others have their answers."""
    store = Store()
    coalescer = Coalescer(store.take)
    first = [asyncio.create_task(coalescer(name)) for name in ("a", "b")]
    await asyncio.sleep(0.5)
    second = [asyncio.create_task(coalescer(name)) for name in ("c", "d")]
    await asyncio.sleep(0.1)
    first[0].cancel()
    second[0].cancel()

    assert [await first[1], await second[1]] == ["B", "D"]
    assert store.batches == [["a", "b"], ["d"]]
    assert first[0].cancelled()
    assert second[0].cancelled()


async def test_a_call_does_not_inherit_the_deadline_of_one_caller() -> None:
    """Nor anything else that is bound to it."""
    store = Store()
    coalescer = Coalescer(store.take)

    async def hurried() -> None:
        async with asyncio.timeout(0.1):
            await coalescer("a")

    hurrying = asyncio.create_task(hurried())
    other = asyncio.create_task(coalescer("b"))

    assert await other == "B"
    with pytest.raises(TimeoutError):
        await hurrying


async def test_a_call_is_nobody_s_conversation() -> None:
    """Its log lines would else be taken for those of who came first."""
    seen: list[str | None] = []

    async def look(items: Sequence[str]) -> Sequence[str]:
        seen.append(current_correlation_id())
        return items

    with correlated("mine"):
        await Coalescer(look)("a")

    assert seen == [None]


async def test_cancelling_it_cancels_all_callers_and_nobody_who_comes_later() -> None:
    """Those of the call under way and those who wait."""
    store = Store()
    coalescer = Coalescer(store.take)
    first = asyncio.create_task(coalescer("a"))
    await asyncio.sleep(0.5)
    second = asyncio.create_task(coalescer("b"))
    await asyncio.sleep(0.1)
    coalescer.cancel()
    third = asyncio.create_task(coalescer("c"))
    await asyncio.wait([first, second, third])

    assert (first.cancelled(), second.cancelled(), third.result()) == (True, True, "C")
    assert store.taken == ["c"]


@given(
    arrivals=st.lists(
        st.tuples(
            st.floats(0, 3),
            st.sampled_from(["a", "b", "-x", "-y", "bad"]),
            st.none() | st.floats(0.01, 4),
        ),
        max_size=30,
    ),
    most=st.integers(1, 5),
)
def test_everybody_gets_an_answer_of_their_own(
    arrivals: list[tuple[float, str, float | None]], most: int
) -> None:
    """Whoever comes when, and whoever leaves: nothing is taken twice, and no answer is missing."""

    async def main() -> None:
        store = Store()
        coalescer = Coalescer(store.take, most=most, apart=first_letter)

        async def caller(number: int, after: float, name: str, patience: float | None) -> None:
            await asyncio.sleep(after)
            item = f"{name}{number}"
            try:
                async with asyncio.timeout(patience):
                    assert await coalescer(item) == item.upper()
            except TimeoutError:
                assert patience is not None
            except RefusedError:
                assert name == "bad"
            else:
                assert name != "bad"
                assert item in store.taken

        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(arrivals):
                group.create_task(caller(number, *arrival))
        assert len(set(store.taken)) == len(store.taken)
        assert store.most_at_once <= 1
        for batch in store.batches:
            keys = [key for item in batch if (key := first_letter(item)) is not None]
            assert len(set(keys)) == len(keys)
            assert len(batch) <= most

    run_in_virtual_time(main())
