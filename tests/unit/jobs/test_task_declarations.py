"""The declaration of tasks with ``@task``."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from tests.manual_clock import ManualClock

from viralfx.jobs.tasks import JobContext, declared_task, task
from viralfx.resilience.deadline import Cancellation, Deadline
from viralfx.resilience.policy import Backoff, BackoffPolicy, RetryPolicy
from viralfx.resilience.retry import retry


def test_a_plain_function_runs_in_a_thread() -> None:
    """A coroutine function does not."""

    @task("plain")
    def plain(payload: dict[str, int], context: JobContext) -> int:
        return payload["n"] + context.attempt

    @task("coroutine")
    async def coroutine(payload: dict[str, int]) -> int:
        return payload["n"]

    first, second = declared_task(plain), declared_task(coroutine)
    assert first is not None
    assert second is not None
    assert (first.in_thread, first.payload_type, first.wants_context) == (
        True,
        dict[str, int],
        True,
    )
    assert (second.in_thread, second.wants_context) == (False, False)


class _Mailer:
    """A type that is no payload and no context."""


def test_further_parameters_are_dependencies() -> None:
    """After the payload and the context, and instead of it; those with a default are optional."""

    @task("all")
    async def everything(
        payload: int, context: JobContext, mailer: _Mailer, limit: int = 3, *, log: str
    ) -> None: ...

    @task("typed")
    async def typed(payload: int, mailer: _Mailer) -> None: ...

    @task("named")
    def named(payload: Any, context: Any, mailer: Any) -> None: ...

    @task("optional")
    async def optional(payload: int, retries: int = 3, *more: int, **others: int) -> None: ...

    @task("untyped")
    def untyped(x: Any, y: Any) -> None: ...

    @task("request")
    def request(payload: int, context: _Mailer) -> None: ...

    found = [declared_task(each) for each in (everything, typed, named, optional, untyped, request)]
    assert [(each.wants_context, each.dependencies) for each in found if each is not None] == [
        (True, {"mailer": True, "limit": False, "log": True}),
        (False, {"mailer": True}),
        (True, {"mailer": True}),
        (False, {"retries": False}),
        (False, {"y": True}),
        (False, {"context": True}),
    ]


def test_a_parameter_of_the_type_of_the_context_is_the_context() -> None:
    """At any position, also by name only or as an optional one."""

    @task("first")
    async def first(context: JobContext, payload: int) -> Any: ...

    @task("third")
    def third(payload: int, mailer: _Mailer, it: JobContext) -> Any: ...

    @task("named")
    def named(payload: int, *, it: JobContext | None = None) -> Any: ...

    found = [declared_task(each) for each in (first, third, named)]
    assert [
        (each.payload_type, each.context_as, dict(each.dependencies)) for each in found if each
    ] == [(int, 0, {}), (int, "it", {"mailer": True}), (int, "it", {})]


def _context_alone(context: JobContext) -> None: ...


def _no_payload(*, mailer: _Mailer) -> None: ...


def _positional(payload: int, context: JobContext, mailer: _Mailer, /) -> None: ...


@pytest.mark.parametrize("function", [_no_payload, _positional, _context_alone])
def test_a_task_takes_a_payload_and_dependencies_by_name(function: Any) -> None:
    """Any other signature is refused with the form of one that works."""
    with pytest.raises(
        TypeError, match=r"must take a payload and, .* no payload declares _: None$"
    ):
        task("it")(function)


def test_a_plain_function_cannot_be_transactional() -> None:
    """The error names the reason and both remedies."""

    def plain(payload: Any, context: JobContext) -> None: ...

    with pytest.raises(TypeError) as raised:
        task("plain", transactional=True)(plain)
    assert "needs an async def function" in str(raised.value)
    assert "or remove transactional=True" in str(raised.value)


def _generator(payload: int) -> Iterator[int]:
    yield payload


async def _async_generator(payload: int) -> AsyncIterator[int]:
    yield payload


@pytest.mark.parametrize("function", [_generator, _async_generator])
def test_a_generator_is_no_task(function: Any) -> None:
    """Its call would run nothing."""
    with pytest.raises(TypeError, match="is a generator"):
        task("it")(function)


class _Callable:
    def __call__(self, payload: Any) -> None: ...


@pytest.mark.parametrize("function", [_Callable, _Callable(), None, "text"])
def test_only_a_function_is_a_task(function: Any) -> None:
    """A class or a callable object is refused with the remedy."""
    with pytest.raises(TypeError, match=r"is not a function; declare async def f\(payload\)"):
        task("it")(function)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"retry": 5}, TypeError, r"retry must be a policy, such as BackoffPolicy\(attempts=5\)"),
        ({"retry": Backoff()}, TypeError, "retry must be a policy"),
        ({"retry": BackoffPolicy}, TypeError, "retry must be a policy"),
        ({"timeout": "5"}, TypeError, "timeout must be a number, got '5'"),
        ({"timeout": 0}, ValueError, "timeout must be more than zero"),
        ({"priority": "5"}, ValueError, "priority must be a whole number"),
        ({"priority": 2.5}, ValueError, "priority must be a whole number"),
        ({"priority": -101}, ValueError, "priority must be .* to 100: -101"),
        ({"unique": "always"}, ValueError, "unique must be 'waiting' or 'unfinished': 'always'"),
        ({"api": "no"}, TypeError, "api must be True or False: 'no'"),
    ],
)
def test_a_wrong_option_is_an_error_of_the_declaration(
    options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """It names the task and the option."""
    with pytest.raises(kind, match=rf"@task\('it'\): {text}"):
        task("it", **options)


@pytest.mark.parametrize("policy", [None, BackoffPolicy(attempts=5), retry(attempts=5)])
def test_a_retry_policy_is_an_object_with_its_method(policy: RetryPolicy | None) -> None:
    """So is what ``retry()`` returns, which has a policy for calls."""

    @task("it", retry=policy)
    async def it(payload: int) -> None: ...

    found = declared_task(it)
    assert found is not None
    assert found.retry is policy


def test_a_task_needs_a_name() -> None:
    """The decorator without parentheses is an error, and not a task that is never declared."""
    with pytest.raises(TypeError, match=r"as in @task\('orders.ship'\)"):

        @task  # type: ignore[arg-type]
        async def ship(payload: int) -> None: ...

    with pytest.raises(ValueError, match="needs a name"):
        task("")


def test_a_cancellation_is_set_by_the_worker_or_the_deadline() -> None:
    """It reads as a condition, and remembers whether the task saw it."""
    clock = ManualClock()
    cancelled = Cancellation(Deadline(5.0, clock=clock))
    assert not cancelled
    assert not cancelled.wait(0.0)
    assert not cancelled.seen
    clock.jump(5.0)
    assert cancelled
    assert cancelled.is_set()
    assert cancelled.wait()
    assert cancelled.seen

    by_the_worker = Cancellation()
    by_the_worker.set()
    assert not by_the_worker.seen
    assert by_the_worker
