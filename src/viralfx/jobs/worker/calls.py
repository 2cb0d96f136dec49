"""Calls the functions of tasks: in middleware, with dependencies, on the loop or in threads."""

import asyncio
import inspect
import itertools
import os
import threading
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from viralfx.core.clock import Clock
from viralfx.core.errors import line_of, located
from viralfx.jobs.hooks import DependencyProvider, TaskMiddleware
from viralfx.jobs.ledger import Accepted, WatchedTransaction
from viralfx.jobs.tasks import JobContext, Submitter, Task
from viralfx.resilience.deadline import Cancellation, Deadline

T = TypeVar("T")

RunInThread = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a plain function in a thread, with the caller's context variables."""


class TaskCalls:
    """Calls the functions of tasks for all workers of a process."""

    def __init__(
        self, middleware: Sequence[TaskMiddleware] = (), *, built_in: Collection[str] = ()
    ) -> None:
        """``middleware`` wraps each call of a task; the first is the outermost.

        ``built_in``: the names of the tasks that it does not wrap, because they are not the
        application's.

        Raises ``TypeError`` for a middleware that is no coroutine function of three arguments.
        """
        for each in middleware:
            _require_middleware(each)
        self._middleware = tuple(middleware)
        self.built_in = frozenset(built_in)
        self.provider: DependencyProvider | None = None
        """Provides the dependencies of tasks; None: this process has no application."""

    def problems(self, tasks: Iterable[Task]) -> Iterator[str]:
        """Yield why tasks cannot be called in this process."""
        for task in tasks:
            for problem in self._problems(task):
                yield located(problem, line_of(task.function))

    def _problems(self, task: Task) -> Iterable[str]:
        if self.provider is not None:
            return self.provider.problems(task)
        missing = [name for name, required in task.dependencies.items() if required]
        if not missing:
            return ()
        names = ", ".join(map(repr, missing))
        fields = "a field" if len(missing) == 1 else "fields"
        problem = (
            f"@task({task.name!r}): this process has no application that provides {names}"
            f" to {task.function.__qualname__}; start it with --app MODULE:NAME. A task has"
            f" one payload: if {names} should come with the job, make it {fields} of that"
        )
        return (problem,)

    def use_context(self, task: Task) -> bool:
        """Return True if a call of the task needs its context."""
        return task.wants_context or self._wraps(task)

    def _wraps(self, task: Task) -> bool:
        return bool(self._middleware) and task.name not in self.built_in

    def call(
        self, task: Task, payload: Any, context: JobContext | None, in_thread: RunInThread | None
    ) -> Awaitable[Any]:
        """Call the task; the result is that of the awaitable.

        ``context`` may be None if :meth:`use_context` is False. ``in_thread`` runs a plain
        function; None for a coroutine function.
        """
        if in_thread is None and not task.dependencies and not self._wraps(task):
            # The usual case, without another coroutine around the task's.
            called: Awaitable[Any] = task.bound(payload, context)()
            return called
        call_next = partial(self._with_dependencies, task, payload, context, in_thread)
        if context is not None and self._wraps(task):
            for middleware in reversed(self._middleware):
                call_next = partial(middleware, call_next, context, payload)
        return call_next()

    async def _with_dependencies(
        self, task: Task, payload: Any, context: JobContext | None, in_thread: RunInThread | None
    ) -> Any:
        function = task.bound(payload, context)
        if not task.dependencies or self.provider is None:
            return await _run(function, in_thread)
        async with self.provider.provide(task) as found:
            return await _run(partial(function, **found), in_thread)


def _require_middleware(middleware: Any) -> None:
    try:
        inspect.signature(middleware).bind(None, None, None)
        fits = any(map(inspect.iscoroutinefunction, (middleware, middleware.__call__)))
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits or isinstance(middleware, type):
        raise TypeError(
            "task_middleware takes coroutine functions such as async def f(call_next, context,"
            f" payload), which return await call_next(): {middleware!r}"
        )


def _run(function: Callable[[], Any], in_thread: RunInThread | None) -> Awaitable[Any]:
    called: Awaitable[Any] = function() if in_thread is None else in_thread(function)
    return called


current_job: ContextVar["JobTask[Any] | None"] = ContextVar("viralfx_job", default=None)
"""The asyncio task of the job whose code runs; None: other code."""


class JobTask(asyncio.Task[T]):
    """The asyncio task that executes a job; it knows whether the job's own code has cancelled it.

    That is the code between :meth:`begin_own_code` and :meth:`end_own_code`, with the tasks, timers
    and threads that it starts. Those that it leaves behind cannot cancel the task any more: it
    records the outcome.
    """

    _own = 0
    _has_ended = False

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, job: str) -> None:
        """``job``: the job's id."""
        self.job = job
        super().__init__(coroutine, name=job)

    def begin_own_code(self) -> None:
        """Mark what follows in this context as code of the job."""
        self._has_ended = False
        current_job.set(self)

    def end_own_code(self) -> None:
        """Mark the end of that code; call it in the same context."""
        self._has_ended = True
        current_job.set(None)

    def cancel(self, msg: Any = None) -> bool:
        """See :meth:`asyncio.Task.cancel`."""
        if current_job.get() is self:
            if self._has_ended:
                return False
            self._own += 1
        return super().cancel(msg)

    def cancel_by_worker(self) -> None:
        """Cancel it for another reason than its own code."""
        super().cancel()

    def uncancel(self) -> int:
        """See :meth:`asyncio.Task.uncancel`."""
        if self._own and current_job.get() is self:
            self._own -= 1  # own code withdraws its own cancellation, as a deadline does
        left = super().uncancel()
        self._own = min(self._own, left)
        return left

    @property
    def cancelled_itself(self) -> bool:
        """True if all cancellations that were not withdrawn came from its own code."""
        return 0 < self.cancelling() <= self._own


class JobChildTask(asyncio.Task[T]):
    """An asyncio task that code of a job has started."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # First: an eager task may raise here, and is reported nevertheless.
        running = current_job.get()
        self.job = None if running is None else running.job
        """The id of the job."""
        super().__init__(*arguments, **options)


def make_task(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
    /,
    **options: Any,
) -> asyncio.Task[T]:
    """Return an asyncio task, as the task factory of an event loop that runs jobs."""
    kind = asyncio.Task if current_job.get() is None else JobChildTask
    return kind(coroutine, loop=loop, **options)


def is_closed(task: "asyncio.Task[Any] | None") -> bool:
    """Return True if a coroutine is closed from outside its asyncio task, as without a loop."""
    try:
        return asyncio.current_task() is not task
    except RuntimeError:
        return True


async def withdraw_cancellations(clock: Clock) -> None:
    """Withdraw the cancellations of the current asyncio task, which its own code requested.

    One may be pending still: the next ``await`` would raise it, and that records the outcome.
    """
    current = asyncio.current_task()
    while current is not None and current.uncancel():
        pass
    with suppress(asyncio.CancelledError):
        await clock.sleep(0)  # Python 3.13 has withdrawn it already


# -- threads -----------------------------------------------------------------------------------

Outcome: TypeAlias = tuple[Any, BaseException | None]
"""The result of a function, and the exception that it raised instead."""

_EARLY_SECONDS = 0.003
"""The most by which a timer may fire early: uvloop rounds times to milliseconds."""


def _as_error_of_the_task(error: BaseException) -> BaseException:
    # These two would mean that the coroutine which raises them was cancelled or closed.
    if not isinstance(error, asyncio.CancelledError | GeneratorExit):
        return error
    replaced = RuntimeError(f"the task raised {type(error).__name__}")
    replaced.__cause__ = error
    return replaced


def end_forked_child(parent: int) -> None:
    """Exit if this process is not ``parent``: a task forked, and its child returned from the task.

    The child shares all connections with its parent, so it must not run the worker's code.
    """
    if os.getpid() != parent:
        os._exit(0)


class JobThread(threading.Thread):
    """A thread of a worker.

    It is a daemon, so a function that never returns does not keep an interpreter from its exit.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()
        self.busy = False
        """True while it runs a function."""

    def run(self) -> None:
        """Run one function after the other, until None comes or the event loop is closed."""
        call: _Call | None = None
        while True:
            try:
                call = self.calls.get()
                if call is None:
                    return
                call.run()
                if call.is_lost:
                    return
            except BaseException as error:  # noqa: BLE001 - the function planted it in its thread
                if call is not None:
                    call.end(None, error)
            # The thread must not keep the payload and the result until its next call.
            call = None


class _Call:
    """One call of a function, whose outcome goes to the event loop that asked for it."""

    def __init__(
        self,
        function: Callable[[], Any],
        loop: asyncio.AbstractEventLoop,
        ended: Callable[[Outcome], None],
    ) -> None:
        self._function = function
        self._loop = loop
        self._ended: Callable[[Outcome], None] | None = ended
        self.is_lost = False
        """True if the event loop is closed, so that it cannot receive the outcome."""

    def run(self) -> None:
        """Call the function."""
        process = os.getpid()
        try:
            result = self._function()
        except BaseException as error:  # noqa: BLE001 - any becomes the job's outcome
            end_forked_child(process)
            self.end(None, error)
        else:
            end_forked_child(process)
            self.end(result, None)

    def end(self, result: Any, error: BaseException | None) -> None:
        """Deliver the outcome; a second one is dropped."""
        ended, self._ended = self._ended, None
        if ended is not None:
            try:
                self._loop.call_soon_threadsafe(ended, (result, error))
            except RuntimeError:
                self.is_lost = True


class JobThreads:
    """Runs functions in threads. An idle thread is used again, and a busy one is never waited for.

    The caller limits how many functions run at once.
    """

    def __init__(self, max_idle: int) -> None:
        """``max_idle``: how many idle threads are kept."""
        self._max_idle = max_idle
        self._idle: list[JobThread] = []
        self._numbers = itertools.count(1)
        self._closed = False

    def start(self, function: Callable[[], Any]) -> "asyncio.Future[Outcome]":
        """Call ``function`` in a thread; the future gets its outcome and never an exception."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        thread = self._thread()
        thread.busy = True

        def ended(outcome: Outcome) -> None:
            thread.busy = False
            self._keep(thread)
            if not future.done():
                future.set_result(outcome)

        thread.calls.put(_Call(function, loop, ended))
        return future

    async def run(
        self,
        function: Callable[[], Any],
        cancelled: Cancellation,
        deadline: Deadline,
        *,
        is_abandoned: Callable[[], bool],
    ) -> Any:
        """Call ``function`` in a thread, with the caller's context variables; return its result.

        A caller that is cancelled because of ``deadline``, or after ``cancelled`` was set, goes on
        waiting, because the function goes on running. The cancellation then counts, unless the
        function returned a result in time and never learned of the cancellation. Any other
        cancellation, or one while ``is_abandoned`` returns True, ends the wait at once. Raises
        ``TypeError`` if the function returns an awaitable.
        """
        calling = self.start(partial(copy_context().run, function))
        interrupted = False
        while not calling.done():
            try:
                await asyncio.shield(calling)
            except asyncio.CancelledError:
                interrupted = True
                asked = cancelled.requested or deadline.remaining() <= _EARLY_SECONDS
                if is_abandoned() or not asked:  # the event loop ends
                    cancelled.set()
                    raise
        result, error = calling.result()
        if interrupted and (error or cancelled.seen or not deadline.remaining()):
            raise asyncio.CancelledError from error
        if cancelled.seen:
            # The function saw the end of the deadline before the event loop did.
            await asyncio.get_running_loop().create_future()
        if error is not None:
            raise _as_error_of_the_task(error)
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError("the task returned an awaitable; declare it with async def")
        return result

    def close(self) -> None:
        """End the idle threads, and each busy one after its function."""
        self._closed = True
        for thread in self._idle:
            thread.calls.put(None)
        self._idle.clear()

    def _thread(self) -> JobThread:
        while self._idle:
            thread = self._idle.pop()
            if thread.is_alive():
                return thread
        thread = JobThread(f"job-{next(self._numbers)}")
        thread.start()
        return thread

    def _keep(self, thread: JobThread) -> None:
        if self._closed or len(self._idle) >= self._max_idle:
            thread.calls.put(None)
        else:
            self._idle.append(thread)


def submitter_for(
    task: Task,
    submit: Submitter | None,
    connection: object,
    after_commit: list[Callable[[], None]],
) -> Submitter | None:
    """Return the submitter for a call of a task: in its transaction, if it is transactional.

    ``after_commit`` gets the functions to call once that is committed. To be called on the worker's
    loop.
    """
    if submit is None:
        return None
    if task.in_thread:
        return partial(_submit_on, asyncio.get_running_loop(), submit)
    if not task.transactional:
        return submit
    return partial(submit, connection=WatchedTransaction(connection, after_commit))


async def _submit_on(
    loop: asyncio.AbstractEventLoop, submit: Submitter, *arguments: Any, **options: Any
) -> Accepted:
    """Submit a job on the worker's loop: a task in a thread runs the call on one of its own."""

    async def call() -> Accepted:
        return await submit(*arguments, **options)

    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), loop))
