"""Batching: order, keys, errors and cancellation."""

import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.virtual_time import run_in_virtual_time

from viralfx.core.correlation import correlated, current_correlation_id
from viralfx.core.ids import new_job_id
from viralfx.jobs.batching import AcceptBatcher, Batcher
from viralfx.jobs.ledger import Accepted, KeyHeldError
from viralfx.jobs.memory.ledger import new_job
from viralfx.jobs.model import JobDraft


class RefusedError(Exception):
    """The store refuses an item."""


class UnavailableError(Exception):
    """The store is unavailable."""


class Store:
    """Takes batches, each in a second, and records them."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.taken: list[str] = []
        self.most_at_once = 0
        self._under_way = 0
        self.unavailable = False

    async def take(self, items: Sequence[str]) -> Sequence[str]:
        """Accept all items or none."""
        self.batches.append(list(items))
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            await asyncio.sleep(1.0)
        finally:
            self._under_way -= 1
        if self.unavailable:
            raise UnavailableError
        if any(item.startswith("bad") for item in items):
            raise RefusedError(",".join(items))
        self.taken.extend(items)
        return [item.upper() for item in items]


def draft(key: str | None = None) -> JobDraft:
    """Return a new draft."""
    return JobDraft(id=new_job_id(), queue="default", task="task", payload=b"{}", key=key)


def first_letter(item: str) -> Sequence[str]:
    """Return the first letter as the key; items that begin with a dash have none."""
    return () if item.startswith("-") else (item[0],)


async def test_items_of_ready_callers_share_one_call() -> None:
    """Each caller gets its own result."""
    store = Store()
    batcher = Batcher(store.take)
    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(batcher(name)) for name in ("a", "b", "c")]

    assert [answer.result() for answer in answers] == ["A", "B", "C"]
    assert store.batches == [["a", "b", "c"]]


async def test_items_that_arrive_during_a_call_share_the_next_one() -> None:
    """One call runs at a time."""
    store = Store()
    batcher = Batcher(store.take)
    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(batcher(str(number)))
            await asyncio.sleep(0.3)

    assert store.batches == [["0"], ["1", "2", "3"], ["4", "5", "6"], ["7", "8", "9"]]
    assert store.most_at_once == 1


async def test_a_caller_waits_for_two_shared_errors_at_most() -> None:
    """Callers that did not fit into the failed call get its error too."""
    store = Store()
    store.unavailable = True
    batcher = Batcher(store.take, max_items=2, keys=first_letter, shared=UnavailableError)
    waiting = [asyncio.create_task(batcher("-1"))]
    await asyncio.sleep(0.5)
    waiting += [asyncio.create_task(batcher(item)) for item in ("a", "ab", *"bcdefg")]
    await asyncio.sleep(1.0)
    last = asyncio.create_task(batcher("h"))
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    store.unavailable = False

    assert [type(error) for error in errors] == [UnavailableError] * 9
    assert await last == "H"
    assert store.batches == [["-1"], ["a", "b"], ["h"]]


async def test_a_call_has_a_maximum_number_of_items() -> None:
    """The next call takes the others."""
    store = Store()
    batcher = Batcher(store.take, max_items=2)
    async with asyncio.TaskGroup() as group:
        for name in "abcde":
            group.create_task(batcher(name))

    assert store.batches == [["a", "b"], ["c", "d"], ["e"]]


async def test_a_call_has_a_maximum_size() -> None:
    """An item that is larger is passed on alone; the order of the items is kept."""
    store = Store()
    batcher = Batcher(store.take, max_bytes=6, size=len)
    async with asyncio.TaskGroup() as group:
        for name in ("aaa", "bbb", "c", "d" * 9, "e", "f"):
            group.create_task(batcher(name))

    assert store.batches == [["aaa", "bbb"], ["c"], ["d" * 9], ["e", "f"]]


class Stuck(Store):
    """Takes items at once, apart from those that begin with "stuck"."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = asyncio.Event()

    async def take(self, items: Sequence[str]) -> Sequence[str]:
        """Hold a stuck item until ``ends``, then refuse it."""
        self.batches.append(list(items))
        if any(item.startswith("stuck") for item in items):
            await self.ends.wait()
            raise UnavailableError
        return [item.upper() for item in items]


async def test_a_slow_call_does_not_hold_up_the_others() -> None:
    """The next one starts beside it after a second, up to the maximum of concurrent calls."""
    store = Stuck()
    loop = asyncio.get_running_loop()
    batcher = Batcher(store.take, shared=UnavailableError, max_calls=3)
    began = loop.time()
    stuck = [asyncio.create_task(batcher("stuck1"))]
    await asyncio.sleep(0.1)
    assert await batcher("a") == "A"
    first = loop.time() - began
    assert await batcher("b") == "B"
    second = loop.time() - began
    stuck.append(asyncio.create_task(batcher("stuck2")))
    await asyncio.sleep(0.1)
    assert await batcher("c") == "C"
    stuck.append(asyncio.create_task(batcher("stuck3")))
    await asyncio.sleep(5.0)
    waiting = asyncio.create_task(batcher("d"))
    await asyncio.sleep(5.0)
    assert not waiting.done()
    store.ends.set()
    errors = await asyncio.gather(*stuck, return_exceptions=True)

    assert await waiting == "D"
    assert (first, second) == (1.0, 1.0)
    assert [type(error) for error in errors] == [UnavailableError] * 3


async def test_drafts_without_keys_do_not_wait_for_those_with_keys() -> None:
    """However many open transactions hold keys."""
    ends = asyncio.Event()

    async def store(drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
        if any(each.key is not None for each in drafts):
            await ends.wait()
        return [Accepted(new_job(each, datetime.now(UTC)), created=True) for each in drafts]

    accept, loop = AcceptBatcher(store), asyncio.get_running_loop()
    keyed = []
    for number in range(5):
        keyed.append(asyncio.create_task(accept(draft(key=str(number)))))
        await asyncio.sleep(2.0)
    began = loop.time()
    plain = [await accept(draft()) for _ in range(3)]

    assert (len(plain), loop.time() - began) == (3, 0.0)
    assert not any(task.done() for task in keyed)
    ends.set()
    assert [each.job.key for each in await asyncio.gather(*keyed)] == list("01234")


async def test_a_held_key_fails_one_draft_and_no_other() -> None:
    """Although its error says, as one that is shared, that the ledger gave no answer in time."""
    calls: list[int] = []

    async def store(drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
        calls.append(len(drafts))
        if any(each.key == "3" for each in drafts):
            raise KeyHeldError(drafts)
        return [Accepted(new_job(each, datetime.now(UTC)), created=True) for each in drafts]

    accept = AcceptBatcher(store)
    results = await asyncio.gather(
        *(accept(draft(key=str(number))) for number in range(8)), return_exceptions=True
    )

    assert [type(each) for each in results] == [*[Accepted] * 3, KeyHeldError, *[Accepted] * 4]
    # A single draft waits for its key, so it comes after all larger parts.
    assert calls == [8, 4, 4, 2, 2, 1, 1]


async def test_a_shared_error_is_that_of_one_item_while_other_calls_succeed() -> None:
    """There is no outage: the callers that shared its call succeed."""
    store = Stuck()
    batcher = Batcher(store.take, shared=UnavailableError, max_calls=2)
    tasks = [asyncio.create_task(batcher(name)) for name in ("a", "stuck", "b")]
    await asyncio.sleep(0.1)
    beside = asyncio.create_task(batcher("c"))
    await asyncio.sleep(3.0)
    store.ends.set()
    answers = await asyncio.gather(*tasks, beside, return_exceptions=True)

    assert [answers[0], answers[2], answers[3]] == ["A", "B", "C"]
    assert isinstance(answers[1], UnavailableError)


async def test_items_of_one_key_are_never_in_concurrent_calls() -> None:
    """They wait for the slow call; others do not."""
    store = Stuck()
    batcher = Batcher(store.take, keys=first_letter, shared=UnavailableError, max_calls=3)
    stuck = asyncio.create_task(batcher("stuck"))
    await asyncio.sleep(2.0)
    same = asyncio.create_task(batcher("same"))
    assert await batcher("other") == "OTHER"
    assert not same.done()
    store.ends.set()

    assert await same == "SAME"
    assert isinstance((await asyncio.gather(stuck, return_exceptions=True))[0], UnavailableError)


async def test_items_of_one_key_never_share_a_call() -> None:
    """They keep their order; items without a key share calls."""
    store = Store()
    batcher = Batcher(store.take, keys=first_letter)
    async with asyncio.TaskGroup() as group:
        for name in ("a1", "b1", "a2", "-1", "-2", "a3"):
            group.create_task(batcher(name))

    assert store.batches == [["a1", "b1", "-1", "-2"], ["a2"], ["a3"]]


async def test_an_error_fails_only_the_items_that_cause_it() -> None:
    """The others are accepted once."""
    store = Store()
    batcher = Batcher(store.take)
    names = ["a", "b", "bad", "c", "d", "e"]
    tasks = [asyncio.create_task(batcher(name)) for name in names]
    await asyncio.wait(tasks)

    assert [str(task.exception() or task.result()) for task in tasks] == [
        *("A", "B", "bad", "C", "D", "E")
    ]
    assert sorted(store.taken) == ["a", "b", "c", "d", "e"]


async def test_a_shared_error_fails_all_items_without_retry() -> None:
    """The next call is made as usual."""
    store = Store()
    batcher = Batcher(store.take, shared=UnavailableError)
    store.unavailable = True
    tasks = [asyncio.create_task(batcher(name)) for name in "abc"]
    await asyncio.wait(tasks)
    store.unavailable = False

    assert [type(task.exception()) for task in tasks] == [UnavailableError] * 3
    assert store.batches == [["a", "b", "c"]]
    assert await batcher("d") == "D"


async def test_a_cancelled_caller_does_not_affect_the_others() -> None:
    """Before the call its item is left out; during the call the others get their results."""
    store = Store()
    batcher = Batcher(store.take)
    first = [asyncio.create_task(batcher(name)) for name in ("a", "b")]
    await asyncio.sleep(0.5)
    second = [asyncio.create_task(batcher(name)) for name in ("c", "d")]
    await asyncio.sleep(0.1)
    first[0].cancel()
    second[0].cancel()

    assert [await first[1], await second[1]] == ["B", "D"]
    assert store.batches == [["a", "b"], ["d"]]
    assert first[0].cancelled()
    assert second[0].cancelled()


async def test_a_call_does_not_inherit_a_callers_deadline() -> None:
    """Or any other context variable."""
    store = Store()
    batcher = Batcher(store.take)

    async def hurried() -> None:
        async with asyncio.timeout(0.1):
            await batcher("a")

    hurrying = asyncio.create_task(hurried())
    other = asyncio.create_task(batcher("b"))

    assert await other == "B"
    with pytest.raises(TimeoutError):
        await hurrying


async def test_a_call_has_no_correlation_id() -> None:
    """Its log lines do not belong to the first caller."""
    seen: list[str | None] = []

    async def record(items: Sequence[str]) -> Sequence[str]:
        seen.append(current_correlation_id())
        return items

    with correlated("mine"):
        await Batcher(record)("a")

    assert seen == [None]


async def test_cancel_cancels_current_callers_but_not_later_ones() -> None:
    """Callers of the running call and waiting callers are cancelled."""
    store = Store()
    batcher = Batcher(store.take)
    first = asyncio.create_task(batcher("a"))
    await asyncio.sleep(0.5)
    second = asyncio.create_task(batcher("b"))
    await asyncio.sleep(0.1)
    batcher.cancel()
    third = asyncio.create_task(batcher("c"))
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
    max_calls=st.integers(1, 3),
)
def test_each_caller_gets_its_own_result(
    arrivals: list[tuple[float, str, float | None]], most: int, max_calls: int
) -> None:
    """With random arrivals and cancellations, each item is accepted once."""

    async def main() -> None:
        store = Store()
        batcher = Batcher(
            store.take, max_items=most, keys=first_letter, max_calls=max_calls, slow_after=0.4
        )

        async def caller(number: int, after: float, name: str, patience: float | None) -> None:
            await asyncio.sleep(after)
            item = f"{name}{number}"
            try:
                async with asyncio.timeout(patience):
                    assert await batcher(item) == item.upper()
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
        assert store.most_at_once <= max_calls
        for batch in store.batches:
            keys = [key for item in batch for key in first_letter(item)]
            assert len(set(keys)) == len(keys)
            assert len(batch) <= most

    run_in_virtual_time(main())


@pytest.mark.each_python
@pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks")
async def test_a_loop_that_starts_its_tasks_at_once_changes_nothing() -> None:
    """As ``asyncio.eager_task_factory`` does: the items of one moment still share a call."""
    batches = []

    async def take(items: Sequence[str]) -> Sequence[str]:
        batches.append(list(items))
        return [item.upper() for item in items]

    batcher = Batcher(take)
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    try:
        callers = [asyncio.ensure_future(batcher(item)) for item in "abc"]
        for _ in range(100):  # turns of the loop, which would never be idle
            await asyncio.sleep(0)
        results = [caller.result() for caller in callers if caller.done()]
    finally:
        loop.set_task_factory(None)
        batcher.cancel()

    assert (results, batches) == (["A", "B", "C"], [["a", "b", "c"]])
