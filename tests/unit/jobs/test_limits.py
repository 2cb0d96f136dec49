"""Limits of tasks: their declaration, keys, and queues that are paused at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.core.errors import WorkLostError
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.limits import Limit, Rate, concurrency_key_of, parse_rate
from viralfx.jobs.tasks import TaskRegistry, declared_task, task


class Struct(msgspec.Struct):
    """A payload."""

    customer: str


@dataclass
class Data:
    """A payload."""

    customer: int


class Typed(TypedDict):
    """A payload."""

    customer: str


def test_the_registry_has_the_limits_of_its_tasks() -> None:
    """Only of those that have some."""

    @task("a", concurrency=2, rate_limit="100/m", concurrency_key="customer")
    async def first(payload: Struct) -> None: ...

    @task("b")
    async def second(payload: int) -> None: ...

    declared = [declared_task(first), declared_task(second)]
    registry = TaskRegistry(each for each in declared if each is not None)

    assert registry.limits == {"a": Limit(concurrency=2, rate=Rate(100, 60.0), keyed=True)}


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10/s", Rate(10, 1.0)),
        (" 100 / m ", Rate(100, 60.0)),
        ("5/h", Rate(5, 3600.0)),
        ("1/d", Rate(1, 86_400.0)),
    ],
)
def test_rates(text: str, rate: Rate) -> None:
    """Starts and a unit."""
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("options", "kind", "problem"),
    [
        ({"concurrency": 0}, ValueError, "concurrency must be from 1 to 100000: 0"),
        ({"concurrency": "3"}, TypeError, "concurrency must be a whole number: '3'"),
        ({"concurrency": True}, TypeError, "concurrency must be a whole number: True"),
        ({"rate_limit": "fast"}, ValueError, "rate_limit: 'fast' is not a rate; write starts and"),
        ({"rate_limit": "10/w"}, ValueError, "as in '10/s', '100/m', '5/h' or '1/d'"),
        ({"rate_limit": "0/s"}, ValueError, "'0/s': the number of starts must be from 1 to"),
        ({"rate_limit": 10}, TypeError, "rate_limit must be a text such as '100/m': 10"),
        ({"concurrency_key": "customer"}, ValueError, "add concurrency=1 or rate_limit='10/s'"),
        ({"concurrency_key": "", "concurrency": 1}, ValueError, "name a field of the payload"),
        ({"concurrency_key": 3, "concurrency": 1}, TypeError, "or a function of the payload: 3"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(
    options: dict[str, Any], kind: type[Exception], problem: str
) -> None:
    """At its declaration, with the task and what to do."""
    with pytest.raises(kind) as raised:
        task("a", **options)

    assert str(raised.value).startswith("@task('a'): ")
    assert problem in str(raised.value)


@pytest.mark.parametrize("payload_type", [Struct, Data, Typed])
def test_a_key_that_no_payload_has_is_refused(payload_type: type) -> None:
    """If the type of the payload tells."""

    async def run(payload: Any) -> None: ...

    run.__annotations__["payload"] = payload_type
    with pytest.raises(TypeError, match="has no field 'client'; it has customer"):
        task("a", concurrency=1, concurrency_key="client")(run)


@pytest.mark.parametrize(
    ("key", "payload", "expected"),
    [
        ("customer", Struct("c"), "c"),
        ("customer", Data(7), "7"),
        ("customer", {"customer": "c"}, "c"),
        ("customer", {"customer": None}, ""),
        ("customer", {"customer": ""}, ""),
        (lambda payload: f"c-{payload}", 7, "c-7"),
        (None, 7, None),
    ],
)
def test_the_key_of_a_payload(
    key: str | Callable[[Any], str] | None, payload: Any, expected: str | None
) -> None:
    """A field or the result of a function, as a text."""
    assert concurrency_key_of(key, payload) == expected


@pytest.mark.parametrize(
    ("key", "payload", "problem"),
    [
        ("customer", {}, "the payload has no field 'customer', which is the concurrency key"),
        ("customer", 7, "the payload has no field 'customer', which is the concurrency key"),
        ("customer", {"customer": "x" * 256}, "has 256 characters; at most 255 are allowed"),
        (lambda payload: payload["a"], {}, "the function for the concurrency key failed with KeyE"),
    ],
)
def test_a_payload_without_a_key_is_refused(
    key: str | Callable[[Any], str], payload: Any, problem: str
) -> None:
    """When it is submitted."""
    with pytest.raises(PayloadError, match=problem):
        concurrency_key_of(key, payload)


async def test_the_due_jobs_of_a_paused_queue_in_memory_end_with_the_process(fleet: Fleet) -> None:
    """The drain does not wait for them."""
    worker = fleet.start(durable=False)
    await fleet.ledger.pause("default")
    await fleet.accept()
    began = fleet.clock.monotonic()
    with pytest.raises(WorkLostError, match="1 in-memory jobs were due and did not finish"):
        await worker.drain(30.0)

    assert fleet.clock.monotonic() - began < 5.0


async def test_due_jobs_that_a_rate_keeps_back_in_memory_end_with_the_process(fleet: Fleet) -> None:
    """The drain does not wait for them, but it does for those that may start before its end."""
    fleet.declare("daily", fleet.note, rate_limit="1/d")
    fleet.declare("often", fleet.note, rate_limit="1/s")
    worker = fleet.start(durable=False)
    for task_name in ("daily", "daily", "often", "often", "often"):
        await fleet.accept(task_name, '"a"')
    began = fleet.clock.monotonic()
    with pytest.raises(WorkLostError, match="1 in-memory jobs were due and did not finish"):
        await worker.drain(30.0)

    assert len(fleet.done) == 4
    assert fleet.clock.monotonic() - began < 10.0
