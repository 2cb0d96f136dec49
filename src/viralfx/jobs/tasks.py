"""Tasks: the ``@task`` decorator of applications, and the registry of declared tasks."""

import inspect
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    overload,
)

from viralfx.core.errors import ViralFXError, require_not_negative, suggest
from viralfx.jobs.codec import Progress, read_progress, takes_null
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.limits import (
    Limit,
    check_declaration,
    limit_of,
    read_signature,
    require_field,
)
from viralfx.jobs.model import Unique
from viralfx.resilience.deadline import Cancellation, Deadline
from viralfx.resilience.policy import RetryPolicy

if TYPE_CHECKING:
    from viralfx.jobs.schedule import Schedule

TaskFunction = TypeVar("TaskFunction", bound=Callable[..., Any])
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)

_MARK = "__viralfx_task__"
_OF_MODULE = "__viralfx_tasks__"
"""The name in a module of the tasks that it declares, as ``__warningregistry__`` has its warnings.
It ends with the module, and a module that is imported under two names has two."""


class UnknownTaskError(ViralFXError):
    """This process has no task of that name."""


class Snooze(ViralFXError):  # noqa: N818 - it asks for a later run, and is no error
    """Raised in a task: its job is due again in ``seconds``, and spends no attempt.

    The number of such executions has no limit.
    """

    def __init__(self, seconds: float) -> None:
        """Raise ``TypeError`` or ``ValueError`` for a value that is no number of seconds."""
        require_not_negative("seconds", seconds)
        self.seconds = seconds
        """Time until the job is due again."""
        super().__init__(f"due again in {seconds:g} s")


class Discard(ViralFXError):  # noqa: N818 - as above
    """Raised in a task: its job fails for good, with code ``discarded``.

    No retry policy is asked. ``reason`` is the message of the job's error.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class HandBackError(ViralFXError):
    """Raised by a task of a :class:`~viralfx.jobs.hooks.TaskHost` that has not run its job.

    The job is handed back: it keeps its due time, and spends no attempt.
    """


class TaskOf(Protocol[T_contra]):
    """The function of a task that takes the payload first."""

    def __call__(self, payload: T_contra, /, *_: Any, **__: Any) -> Any:
        """Run the task."""


class ContextTaskOf(Protocol[T_contra]):
    """The function of a task that takes its context before the payload."""

    def __call__(self, context: "JobContext", payload: T_contra, /, *_: Any, **__: Any) -> Any:
        """Run the task."""


PayloadOf: TypeAlias = T | Callable[[NoReturn, NoReturn], T]
"""A payload. With the second type, which no payload has, mypy infers the type from the task before
it looks at the payload, so that a dict may be a ``TypedDict``."""


class Submits(Protocol[P, R_co]):
    """A method that submits a job; a task as a function says which type the payload has."""

    @overload
    def __call__(
        self, task: TaskOf[T], payload: PayloadOf[T], *_: P.args, **options: P.kwargs
    ) -> R_co: ...
    @overload
    def __call__(
        self, task: ContextTaskOf[T], payload: PayloadOf[T], *_: P.args, **options: P.kwargs
    ) -> R_co: ...
    @overload
    def __call__(self, task: str, payload: Any, *_: P.args, **options: P.kwargs) -> R_co: ...


class SubmitsMany(Protocol[P, R_co]):
    """A method that submits a job for each payload, as :class:`Submits`."""

    @overload
    def __call__(
        self, task: TaskOf[T], payloads: Iterable[PayloadOf[T]], *_: P.args, **options: P.kwargs
    ) -> R_co: ...
    @overload
    def __call__(
        self,
        task: ContextTaskOf[T],
        payloads: Iterable[PayloadOf[T]],
        *_: P.args,
        **options: P.kwargs,
    ) -> R_co: ...
    @overload
    def __call__(
        self, task: str, payloads: Iterable[Any], *_: P.args, **options: P.kwargs
    ) -> R_co: ...


Method: TypeAlias = Callable[Concatenate[Any, Any, Any, P], R_co]


def submits(method: Method[P, R_co]) -> Submits[P, R_co]:
    """Return a method ``(self, task, payload, **options)``, typed as :class:`Submits`."""
    return cast("Submits[P, R_co]", method)


def submits_many(method: Method[P, R_co]) -> SubmitsMany[P, R_co]:
    """Return a method ``(self, task, payloads, **options)``, typed as :class:`SubmitsMany`."""
    return cast("SubmitsMany[P, R_co]", method)


Submitter = Callable[..., Awaitable[Accepted]]
"""Submits a job, as :meth:`JobService.submit` does."""


class _Reported:
    """Lets a task await a report, as it awaits the other methods of its context."""

    def __await__(self) -> Generator[Any, None, None]:
        """Return at once."""
        yield from ()


_REPORTED = _Reported()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext:
    """The execution that a task runs in."""

    id: str
    """The job's id: the idempotency key for effects outside the database."""
    attempt: int
    """Counts from 1."""
    deadline: Deadline
    """The end of the task's timeout."""
    correlation_id: str
    created_at: datetime
    """When the job was accepted; UTC."""
    fence: int = 0
    """The number of this claim, a fencing token for other systems: it grows with each claim of the
    job. A system that refuses lower numbers for the same job refuses a worker that lost it."""
    connection: Any = None
    """With ``transactional=True`` the ledger's connection, in the transaction that completes the
    job; None without it. With jobs in memory each use of it raises :class:`TransactionError`."""
    cancelled: Cancellation = field(default_factory=Cancellation)
    """Whether the task should end now. A task in a thread has no other sign of a cancellation."""
    submitter: Submitter | None = field(default=None, repr=False)
    """What :meth:`submit` calls; a worker sets it."""
    on_report: Callable[[Progress], object] = field(default=lambda _: None, repr=False)
    """Receives each report, in the thread of the task."""

    def report(
        self,
        current: float | None = None,
        total: float | None = None,
        message: str | None = None,
    ) -> Any:
        """Report how far the task is, as ``report(3, 10, "row 3")``; each argument may be missing.

        Each report replaces the one before. It costs microseconds and writes nothing itself: the
        worker stores the latest reports of all its jobs once a second. Call it from a coroutine or
        a thread; you may await the answer, which does nothing.

        Of a longer message, 500 characters are kept. Raises ``TypeError`` for an argument of
        another type, and ``ValueError`` for a number that is not finite or over 2^53.
        """
        self.on_report(read_progress(current, total, message))
        return _REPORTED

    @submits
    async def submit(
        self,
        task: str | Callable[..., Any],
        payload: Any,
        *,
        key: str | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        unique: str | None = None,
        queue: str | None = None,
        max_attempts: int | None = None,
    ) -> Accepted:
        """Submit another job, with the correlation id and the user of this one.

        With ``transactional=True`` the job exists if and only if the transaction of the task
        commits, which completes this job. Otherwise it is durable when this returns, and another
        attempt of this task submits it again unless it has a ``key``. Arguments and errors are
        those of ``plugin.jobs.submit``. A plain function calls
        ``asyncio.run(context.submit(...))``.
        """
        if self.submitter is None:
            raise RuntimeError("this context was not made by a worker, so it cannot submit jobs")
        return await self.submitter(
            task,
            payload,
            key=key,
            run_at=run_at,
            priority=priority,
            unique=unique,
            queue=queue,
            max_attempts=max_attempts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A declared task."""

    name: str
    function: Callable[..., Any]
    queue: str
    payload_type: Any
    wants_context: bool
    """True if the function takes its :class:`JobContext`; see ``context_as``."""
    transactional: bool
    timeout: float | None
    """Seconds for one attempt; None: the worker's default."""
    retry: RetryPolicy | None
    """None: the worker's default."""
    in_thread: bool = False
    """True for a plain function: it runs in a thread, and the event loop does not wait for it."""
    context_as: int | str = 1
    """The position of its context, 0 or 1, or the name by which it is passed."""
    dependencies: Mapping[str, bool] = field(default_factory=dict)
    """The parameters apart from the payload and the context, and whether each must be provided: one
    with a default value need not."""
    priority: int = 0
    """The priority of its jobs, unless a submission sets another one."""
    unique: Unique | None = None
    """How long one of its jobs keeps another one with the same payload from being accepted."""
    concurrency: int | None = None
    """How many of its jobs run at once over all workers; with ``concurrency_key``, of each key."""
    concurrency_key: str | Callable[[Any], str] | None = None
    """The field of the payload, or a function of it, by which its limits are kept apart."""
    rate_limit: str | None = None
    """How many of its jobs start in a period over all workers, such as ``100/m``."""
    cron: str | None = None
    """When it is scheduled, as a cron expression."""
    timezone: str = "UTC"
    """The time zone of ``cron``."""
    catch_up: bool = False
    """True: one run makes up for those that were due while no worker ran."""
    api: bool = True
    """True: clients of the jobs API may submit its jobs."""
    host: object = None
    """The :class:`~viralfx.jobs.hooks.TaskHost` that declared it; None for ``@task``."""
    read: Callable[[bytes, str], Any] | None = None
    """Reads the payload of a job with an id for the task, if its host stores other payloads than
    submissions have. Raises :class:`PayloadError`."""
    result_type: Any = Any
    """The type that the function declares for its result."""
    _schedule: "list[Schedule]" = field(default_factory=list, init=False, compare=False, repr=False)

    def bound(self, payload: Any, context: JobContext | None) -> Callable[..., Any]:
        """Return the function with its payload and its context; it takes the dependencies."""
        if not self.wants_context:
            return partial(self.function, payload)
        if isinstance(self.context_as, str):
            return partial(self.function, payload, **{self.context_as: context})
        if self.context_as == 0:
            return partial(self.function, context, payload)
        return partial(self.function, payload, context)

    @property
    def limit(self) -> Limit | None:
        """Its limits over all workers; None without one."""
        return limit_of(self.concurrency, self.concurrency_key, self.rate_limit)

    @property
    def schedule(self) -> "Schedule | None":
        """Its schedule; None without ``cron``."""
        if self.cron is not None and not self._schedule:
            # Imported here, since every import of viralfx loads this module. Kept, since the check
            # of an expression takes as long as a search for its next time.
            from viralfx.jobs.schedule import Schedule  # noqa: PLC0415

            zone, late = self.timezone, self.catch_up
            made = Schedule(task=self.name, cron=self.cron, timezone=zone, catch_up=late)
            self._schedule.append(made)
        return next(iter(self._schedule), None)


def task(
    name: str,
    *,
    queue: str = "default",
    retry: RetryPolicy | None = None,
    timeout: float | None = None,
    transactional: bool = False,
    priority: int = 0,
    unique: str | None = None,
    concurrency: int | None = None,
    concurrency_key: str | Callable[[Any], str] | None = None,
    rate_limit: str | None = None,
    cron: str | None = None,
    timezone: str = "UTC",
    catch_up: bool = False,
    api: bool = True,
) -> Callable[[TaskFunction], TaskFunction]:
    """Declare ``[async] def f(payload: T[, context: JobContext]) -> R`` as a task.

    A task has one payload. The parameter with the type :class:`JobContext` is the context, at any
    position; so is a second one without a type whose name is ``context``. All others are
    dependencies: the application provides them by name, as it does for its route handlers.

    A coroutine function runs on the worker's event loop, a plain function in a thread. Python
    cannot stop a thread: after the timeout the job is settled, and the function goes on until it
    returns or reads ``context.cancelled``.

    ``timeout`` is in seconds, for one attempt. ``retry``, such as
    :class:`~viralfx.resilience.policy.BackoffPolicy`, decides about further attempts. With
    ``transactional`` the task writes through ``context.connection``, in the transaction that
    completes the job. The function itself is unchanged and you can still call it.

    With ``cron`` the task is also scheduled: it runs with the payload null at each time of a cron
    expression in a time zone (:class:`~viralfx.jobs.schedule.Schedule`). With ``catch_up``
    it also runs once for the latest time that was due while no worker ran.

    With ``api=False`` the jobs API refuses new jobs of the task and does not list it; ``submit``,
    ``viralfx jobs`` and its schedule work. The built-in tasks are declared so.

    Raises ``TypeError`` for a function with another signature, a plain one with ``transactional``,
    one with ``cron`` whose payload cannot be null, or an argument of a wrong type, and
    ``ValueError`` for an empty name, a timeout that is not above zero, or a schedule that is not
    valid.
    """
    unique_while = check_declaration(name, retry, timeout, priority, unique)
    if not isinstance(api, bool):
        raise TypeError(f"@task({name!r}): api must be True or False: {api!r}")
    if cron is None and (timezone, catch_up) != ("UTC", False):
        given = "timezone" if timezone != "UTC" else "catch_up"
        raise ValueError(f"@task({name!r}): {given} has no schedule; add cron='*/5 * * * *'")
    try:
        limit_of(concurrency, concurrency_key, rate_limit)
    except (TypeError, ValueError) as error:
        raise type(error)(f"@task({name!r}): {error}") from None

    def declare(function: TaskFunction) -> TaskFunction:
        types, context_as, dependencies = read_signature(name, function, JobContext)
        payload_type, result_type = types
        wants_context = context_as is not None
        try:
            require_field(concurrency_key, payload_type)
        except TypeError as error:
            raise TypeError(f"@task({name!r}): {error}") from None
        if cron is not None and not takes_null(payload_type):
            raise TypeError(
                f"@task({name!r}): cron= runs it with the payload null, which its payload type"
                " does not allow; declare the payload as None, or as T | None"
            )
        in_thread = not inspect.iscoroutinefunction(function)
        if transactional and in_thread:
            raise TypeError(
                f"@task({name!r}): transactional=True needs an async def function, because"
                " context.connection works on the event loop only; declare"
                f" async def {function.__qualname__}, or remove transactional=True"
            )
        if transactional and not wants_context:
            raise TypeError(
                f"@task({name!r}): transactional=True needs a parameter context: JobContext,"
                " whose connection it writes through"
            )
        declared = Task(
            name=name,
            function=function,
            queue=queue,
            payload_type=payload_type,
            result_type=result_type,
            wants_context=wants_context,
            transactional=transactional,
            timeout=timeout,
            retry=retry,
            in_thread=in_thread,
            context_as=1 if context_as is None else context_as,
            dependencies=dependencies,
            priority=priority,
            unique=unique_while,
            concurrency=concurrency,
            concurrency_key=concurrency_key,
            rate_limit=rate_limit,
            cron=cron,
            timezone=timezone,
            catch_up=catch_up,
            api=api,
        )
        if (schedule := declared.schedule) is not None:  # raises if it is not valid
            schedule.require_five_fields()
        mark(function, declared)
        _add_to_module(declared)
        return function

    return declare


def mark(function: Any, declared: Task) -> None:
    """Make :func:`declared_task` return ``declared`` for a function, or an object in its place."""
    setattr(function, _MARK, declared)


def declared_task(function: object) -> Task | None:
    """Return the task that ``@task`` declared for a function; None for any other object."""
    found = getattr(function, _MARK, None)
    return found if isinstance(found, Task) else None


def _add_to_module(declared: Task) -> None:
    """Add a task to those of the module of its function, unless that is not at its top level."""
    function = declared.function
    if "." in function.__qualname__:
        return
    # A decorator below @task may be of another module: its wrapper names the function inside.
    module = getattr(inspect.unwrap(function), "__globals__", None)
    if module is not None:
        # A function that is defined again, as by a reload, replaces the one before.
        tasks = module.setdefault(_OF_MODULE, {})
        tasks[declared.name, function.__qualname__] = declared


def tasks_of_module(namespace: Mapping[str, Any]) -> Sequence[Task]:
    """Return the tasks of the functions at the top level of a module, in order of declaration.

    ``namespace`` is that of the module. Its imported functions are not among them.
    """
    return tuple(namespace.get(_OF_MODULE, {}).values())


def is_copy(one: Task, other: Task) -> bool:
    """Return whether their functions are two objects of the same code, of a module loaded twice."""
    if one.function is other.function:
        return False
    codes = [getattr(inspect.unwrap(each.function), "__code__", None) for each in (one, other)]
    files = [getattr(code, "co_filename", None) for code in codes]
    return codes[0] == codes[1] and files[0] == files[1]


def unknown_task(name: str, known: Iterable[str]) -> UnknownTaskError:
    """Return the error for a name that no task has; it suggests the closest of ``known``."""
    hint = suggest(name, known)
    problem = f"there is no task named {name!r} here"
    return UnknownTaskError(f"{problem}; {hint}" if hint else problem)


class TaskRegistry:
    """The tasks of a process, by name."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        """Add ``tasks``; raises ``ValueError`` as :meth:`add` does."""
        self._tasks: dict[str, Task] = {}
        self._limits: dict[str, Limit] = {}
        self.load: Callable[[], object] | None = None
        """What :meth:`complete` calls; None once the process has started."""
        for each in tasks:
            self.add(each)

    def add(self, added: Task) -> None:
        """Add a task; adding it twice does nothing. Raises ``ValueError`` for a name in use."""
        if self._tasks.setdefault(added.name, added).function is not added.function:
            raise ValueError(f"there are two tasks named {added.name!r}; rename one")
        if (limit := added.limit) is not None:
            self._limits[added.name] = limit

    @property
    def names(self) -> Collection[str]:
        """The names of the tasks; the collection changes with the registry."""
        return self._tasks.keys()

    @property
    def offered(self) -> Collection[str]:
        """The names of the tasks whose jobs clients of the jobs API may submit."""
        return [each.name for each in self if each.api]

    @property
    def limits(self) -> Mapping[str, Limit]:
        """The limits of the tasks that have some, by name; they change with the registry."""
        return self._limits

    def find(self, name: str) -> Task:
        """Return the task with this name. Raises :class:`UnknownTaskError`."""
        found = self._tasks.get(name)
        if found is None and self.complete():
            found = self._tasks.get(name)
        if found is None:
            raise unknown_task(name, self._tasks)
        return found

    def name_of(self, task: object) -> str:
        """Return the name of a task that is given by its name or its function.

        Raises :class:`UnknownTaskError` for a function whose task is not registered, and
        ``TypeError`` for anything else.
        """
        if isinstance(task, str):
            return task
        if (declared := declared_task(task)) is None:
            raise TypeError(f"pass the name of a task, or a function that @task declares: {task!r}")
        if declared.name not in self._tasks and not (
            self.complete() and declared.name in self._tasks
        ):
            raise UnknownTaskError(
                f"this process does not know the task {declared.name!r} of that function; add it to"
                " OperationsConfig(tasks=[...]) or its module to TASK_MODULES"
            )
        return declared.name

    def complete(self) -> bool:
        """Add the tasks that were declared meanwhile; return False if none can be added.

        Raises :class:`ConfigurationError` for tasks that cannot work.
        """
        load, self.load = self.load, None
        if load is None:
            return False
        try:
            load()
        finally:
            self.load = load
        return True

    def __contains__(self, name: object) -> bool:
        """Return True if there is a task with this name."""
        return name in self._tasks

    def __iter__(self) -> Iterator[Task]:
        """Iterate over the tasks in the order of their declaration."""
        return iter(self._tasks.values())
