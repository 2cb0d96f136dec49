"""The jobs of a process that runs no application: through connections of a thread of its own."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from viralfx.core.clock import Clock
from viralfx.core.errors import LedgerUnavailableError, StartupError
from viralfx.core.loops import HomeLoop, LoopThread, renew_in_forks
from viralfx.domain.cache import SingleFlight
from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.notifier import BackgroundNotifier, JobNotifier
from viralfx.jobs.service import JobService

if TYPE_CHECKING:
    from viralfx.adapters.redis import RedisClient
    from viralfx.postgres import PostgresDatabase

T = TypeVar("T")

MakeService = Callable[[JobLedger, BackgroundNotifier, HomeLoop], JobService]
Connect = Callable[["PostgresDatabase", "RedisClient | None"], tuple[JobLedger, JobNotifier]]


class ThreadedJobs:
    """Implements ``JobsApart``: a WSGI server, for example, has threads and no event loop.

    The first call starts the thread and connects, in one attempt that concurrent calls share; after
    a failure the next call tries again. A forked process has a thread of its own.
    """

    def __init__(
        self,
        database: "PostgresDatabase",
        redis: "RedisClient | None",
        *,
        clock: Clock,
        connect: Connect,
        make_service: MakeService,
    ) -> None:
        """Connect to the servers of ``database`` and ``redis``, and use neither of the two.

        ``connect`` returns ledger and notifier, and ``make_service`` the service over them.
        """
        self._database = database
        self._redis = redis
        self._clock = clock
        self._connect = connect
        self._make_service = make_service
        self._opened: dict[int, _Opened] = {}
        """That of this process, by its id."""
        self._of_parents: list[dict[int, _Opened]] = []
        """Kept, and never closed here: the server would close them for the parent, too."""
        renew_in_forks(self)

    def renew(self) -> None:
        """Leave the connections to the parent; a process may get the id of an earlier one."""
        self._of_parents.append(self._opened)
        self._opened = {}

    def call(self, call: Callable[[JobService], Awaitable[T]]) -> T:
        """Return the result of a call of the service; block this thread.

        Raises :class:`LedgerUnavailableError` if the database cannot be reached.
        """
        opened = self._of_this_process()

        async def run() -> T:
            return await call(await opened.service())

        return opened.thread.call(run)

    def call_soon(self, call: Callable[[JobService], object]) -> None:
        """Call a function with the service, without waiting; nothing happens without a database."""
        opened = self._of_this_process()
        opened.thread.call_soon(partial(opened.begin, call))

    def _of_this_process(self) -> "_Opened":
        # Atomic, and without a lock: another thread may hold it at the time of a fork.
        found = self._opened.get(os.getpid())
        return found or self._opened.setdefault(os.getpid(), self._new())

    def _new(self) -> "_Opened":
        redis = None if self._redis is None else self._redis.twin()
        return _Opened(self._database.twin(), redis, self)

    def open(
        self, database: "PostgresDatabase", redis: "RedisClient | None"
    ) -> tuple[JobService, BackgroundNotifier, JobNotifier]:
        """Return the service over open connections, and its notifiers."""
        ledger, notifier = self._connect(database, redis)
        background = BackgroundNotifier(notifier, clock=self._clock)
        return self._make_service(ledger, background, database.home), background, notifier


class _Opened:
    """The connections of one process."""

    def __init__(
        self, database: "PostgresDatabase", redis: "RedisClient | None", owner: ThreadedJobs
    ) -> None:
        self.thread = LoopThread("viralfx-jobs", close=self._close)
        self._database = database
        self._redis = redis
        self._owner = owner
        self._opening: SingleFlight[JobService] = SingleFlight()
        self._service: JobService | None = None
        self._notifiers: list[BackgroundNotifier | JobNotifier] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def service(self) -> JobService:
        """Return the service; concurrent first callers share one attempt to connect."""
        return self._service or await self._opening.run("service", self._open)

    async def _open(self) -> JobService:
        try:
            await self._database.open()
        except StartupError as error:
            raise LedgerUnavailableError(str(error)) from error
        self._service, *self._notifiers = self._owner.open(self._database, self._redis)
        return self._service

    def begin(self, call: Callable[[JobService], object]) -> None:
        task = asyncio.create_task(self._call(call), name="jobs-call")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, call: Callable[[JobService], object]) -> None:
        try:
            call(await self.service())
        except LedgerUnavailableError:
            return  # workers find the jobs by polling

    async def _close(self) -> None:
        for each in self._notifiers:
            await each.close()
        if self._redis is not None:
            await self._redis.close()
        self._database.terminate()
