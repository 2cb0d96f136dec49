"""Tasks: what an application declares with ``@task``, and the registry of those in force."""

import difflib
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, get_type_hints

from viralfx.domain.errors import ViralFXError
from viralfx.domain.resilience.deadline import Deadline
from viralfx.domain.resilience.retry_policy import RetryPolicy

TaskFunction = TypeVar("TaskFunction", bound=Callable[..., Awaitable[Any]])

_MARK = "__viralfx_task__"


class UnknownTaskError(ViralFXError):
    """No task of this name is declared here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext:
    """What a task may know about its execution."""

    id: str
    """The job's id: the idempotency key for effects outside the database."""
    attempt: int
    """Counts from 1."""
    deadline: Deadline
    """When the task's timeout is over."""
    correlation_id: str
    created_at: datetime
    """When the job was accepted; UTC."""
    connection: Any = None
    """With ``transactional=True`` the ledger's connection, in the transaction that completes the
    job; None otherwise, and where the ledger is in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A declared task."""

    name: str
    function: Callable[..., Awaitable[Any]]
    queue: str
    payload_type: Any
    wants_context: bool
    transactional: bool
    timeout: float | None
    """Seconds for one attempt; None: the worker's default."""
    retry: RetryPolicy | None
    """None: the worker's default."""


def task(
    name: str,
    *,
    queue: str = "default",
    retry: RetryPolicy | None = None,
    timeout: float | None = None,
    transactional: bool = False,
) -> Callable[[TaskFunction], TaskFunction]:
    """Declare ``async def f(payload: T[, context: JobContext]) -> R`` as a task.

    ``timeout`` is in seconds, for one attempt. ``retry`` decides about further attempts. With
    ``transactional`` the task writes through ``context.connection``, and what it writes and the
    job's completion are one transaction. The function stays what it was and can be called.

    Raises ``TypeError`` for a function that cannot be a task, and ``ValueError`` for an empty
    name or a timeout that is not above zero.
    """
    if not name:
        raise ValueError("@task needs a name, as in @task('orders.ship')")
    if timeout is not None and not 0 < timeout < float("inf"):
        raise ValueError(f"@task({name!r}): timeout must be above zero seconds, got {timeout!r}")

    def declare(function: TaskFunction) -> TaskFunction:
        payload_type, wants_context = _signature(name, function)
        if transactional and not wants_context:
            raise TypeError(
                f"@task({name!r}): transactional=True needs a second parameter, context:"
                " JobContext, whose connection it writes through"
            )
        declared = Task(
            name=name,
            function=function,
            queue=queue,
            payload_type=payload_type,
            wants_context=wants_context,
            transactional=transactional,
            timeout=timeout,
            retry=retry,
        )
        setattr(function, _MARK, declared)
        return function

    return declare


def declared_task(function: object) -> Task | None:
    """Return what ``@task`` declared of a function; None for anything else."""
    found = getattr(function, _MARK, None)
    return found if isinstance(found, Task) else None


def _signature(name: str, function: Callable[..., Any]) -> tuple[Any, bool]:
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"@task({name!r}): {function!r} is not an async def function")
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in parameters if p.default is p.empty and p not in positional]
    takes_more = any(p.default is p.empty for p in positional[2:]) or any(
        p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in required
    )
    if not positional or takes_more:
        raise TypeError(
            f"@task({name!r}): {function.__qualname__} must take a payload and, if it likes, a"
            " context: async def f(payload: T, context: JobContext) -> R"
        )
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"@task({name!r}): a type of {function.__qualname__} cannot be resolved: {error};"
            " declare it at the module's top, before the task"
        ) from None
    wants_context = len(positional) > 1 and (
        positional[1].default is inspect.Parameter.empty
        or hints.get(positional[1].name) is JobContext
    )
    return hints.get(positional[0].name, Any), wants_context


class TaskRegistry:
    """The tasks in force, by name."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        """Take tasks; raises ``ValueError`` as :meth:`add` does."""
        self._tasks: dict[str, Task] = {}
        for each in tasks:
            self.add(each)

    def add(self, added: Task) -> None:
        """Add a task; the same once more is harmless. Raises ``ValueError`` for a name in use."""
        if self._tasks.setdefault(added.name, added).function is not added.function:
            raise ValueError(f"there are two tasks named {added.name!r}; rename one")

    def find(self, name: str) -> Task:
        """Return the task of a name. Raises :class:`UnknownTaskError`."""
        found = self._tasks.get(name)
        if found is None:
            close = difflib.get_close_matches(name, self._tasks, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UnknownTaskError(f"there is no task named {name!r} here{hint}")
        return found

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a task of this name."""
        return name in self._tasks

    def __iter__(self) -> Iterator[Task]:
        """Iterate over the tasks in the order of their declaration."""
        return iter(self._tasks.values())
