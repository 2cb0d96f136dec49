"""Ports around jobs: hooks, middleware, dependencies and hosts; and the log fields of a claim."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

from viralfx.core.errors import UnstorableError
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import Claim, JobDraft, Settlement
from viralfx.jobs.tasks import JobContext, Task, TaskRegistry, declared_task

_logger = logging.getLogger("viralfx.jobs")

Ended = Callable[[Settlement | None], object]
"""Called with the settlement of a job; None if the ledger recorded it in the task's transaction."""


class JobHooks(Protocol):
    """Port: wraps the steps of a job, in the task that runs them, for metrics and traces.

    A hook must neither block nor raise.
    """

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Wrap an acceptance; yields the draft to accept, which may have a new trace context."""
        ...

    def storing(self, drafts: Sequence[JobDraft]) -> AbstractContextManager[None]:
        """Wrap the ledger call that accepts several jobs at once, in a task of its own."""
        ...

    def accepted(self, accepted: Accepted) -> None:
        """Receive the accepted job, or the earlier job with the same idempotency key."""
        ...

    def executing(self, claim: Claim) -> AbstractContextManager[Ended]:
        """Wrap an execution, from before its payload is decoded until its outcome is known."""
        ...


class TaskMiddleware(Protocol):
    """Port: an application's code around each call of a task.

    ``await call_next()`` calls the next middleware or the task, and returns its result or raises
    its error. The middleware's own result or error takes the place of that, and its time counts
    towards the task's timeout. Context variables that it sets are visible in the task, also
    in a thread. The middleware itself runs on the event loop.
    """

    async def __call__(
        self,
        call_next: Callable[[], Awaitable[Any]],
        context: JobContext,
        payload: Any,
        /,
    ) -> Any:
        """Return the result of the call. ``payload`` is decoded."""
        ...


class DependencyProvider(Protocol):
    """Port: provides the dependencies of tasks, by the names of their parameters."""

    def problems(self, task: Task) -> Iterable[str]:
        """Return why the dependencies of a task cannot be provided; nothing if they can."""
        ...

    def provide(self, task: Task) -> AbstractAsyncContextManager[Mapping[str, Any]]:
        """Provide the dependencies of a task for one call, and clean up after it.

        An error of the call is raised in the block, so that the clean-up sees it.
        """
        ...


class TaskHost(ABC):
    """Port: declares tasks in place of ``@task``, such as a broker of another library.

    A process that loads its tasks calls :meth:`attach`, and if it also runs jobs,
    :meth:`start_worker` before them and :meth:`stop_worker` after them.
    """

    @abstractmethod
    def declared_tasks(self) -> Iterable[Task]:
        """Return the tasks declared so far; the same objects each time."""

    @abstractmethod
    def attach(self, jobs: Any, tasks: TaskRegistry) -> None:
        """Use ``jobs``, the ``JobService`` of this process.

        Tasks that are declared later have to be added to ``tasks``.
        """

    @abstractmethod
    async def start_worker(self) -> None:
        """Prepare to run jobs; a second call does nothing. Never raises: it logs a failure."""

    @abstractmethod
    async def stop_worker(self) -> None:
        """End after the last job; a second call does nothing. Never raises: it logs a failure."""


def tasks_of(value: object) -> Sequence[Task]:
    """Return the tasks that a function or a :class:`TaskHost` declares; none for other objects."""
    if isinstance(value, TaskHost):
        return tuple(value.declared_tasks())
    declared = declared_task(value)
    return () if declared is None else (declared,)


class CombinedHooks:
    """Runs several hooks, the first one outermost. Without any it does nothing."""

    def __init__(self, *hooks: JobHooks) -> None:
        self._hooks = hooks

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Pass each hook the draft of the hook around it."""
        return _Accepting(self._hooks, draft)

    def storing(self, drafts: Sequence[JobDraft]) -> AbstractContextManager[None]:
        """Wrap a ledger call in each hook."""
        return _Storing([hook.storing(drafts) for hook in self._hooks])

    def accepted(self, accepted: Accepted) -> None:
        """Pass the accepted job to each hook."""
        for hook in self._hooks:
            hook.accepted(accepted)

    def executing(self, claim: Claim) -> AbstractContextManager[Ended]:
        """Wrap an execution in each hook, and pass its settlement to each."""
        return _Executing([hook.executing(claim) for hook in self._hooks])


class _Nested:
    """Contexts within each other. Hooks do not raise, so this needs no slow ``ExitStack``."""

    __slots__ = ("_contexts",)

    def __init__(self, contexts: "list[AbstractContextManager[Any]]") -> None:
        self._contexts = contexts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for context in reversed(self._contexts):
            context.__exit__(kind, error, traceback)


class _Accepting(_Nested):
    __slots__ = ("_draft", "_hooks")

    def __init__(self, hooks: Sequence[JobHooks], draft: JobDraft) -> None:
        super().__init__([])
        self._hooks = hooks
        self._draft = draft

    def __enter__(self) -> JobDraft:
        draft = self._draft
        for hook in self._hooks:
            context = hook.accepting(draft)
            draft = context.__enter__()
            self._contexts.append(context)
        return draft


class _Storing(_Nested):
    __slots__ = ()

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()


class _Executing(_Nested):
    __slots__ = ("_callbacks",)

    def __enter__(self) -> Ended:
        self._callbacks: list[Ended] = [context.__enter__() for context in self._contexts]
        return self._ended

    def _ended(self, settlement: Settlement | None) -> None:
        for callback in self._callbacks:
            callback(settlement)


def names_of(claim: Claim) -> dict[str, object]:
    """Return the log fields that identify an execution."""
    return {
        "job": claim.id,
        "task": claim.task,
        "queue": claim.queue,
        "attempt": claim.attempt,
    }


def log_refusal(drafts: Sequence[JobDraft], error: UnstorableError) -> None:
    """Log that a ledger refused the content of a call that accepts jobs."""
    draft = drafts[0]
    which = {"job": draft.id} if len(drafts) == 1 else {"jobs": len(drafts)}
    extra = {**which, "task": draft.task, "code": error.code}
    _logger.error("Job refused by the ledger", exc_info=error, extra=extra)
