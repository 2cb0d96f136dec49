"""The lease of a worker: registers the worker, and renews its lease.

With Postgres a thread renews it, also while the event loop of the worker is blocked.
"""

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Protocol, TypeVar

from viralfx.core.clock import Clock, default_rng, finished_within, ignore_error
from viralfx.core.errors import LedgerUnavailableError
from viralfx.core.ids import is_job_id
from viralfx.jobs.ledger import LeaseStore, Registration
from viralfx.jobs.worker.availability import MAX_RETRY_SECONDS, RETRY_BACKOFF
from viralfx.jobs.worker.context import WorkerContext
from viralfx.jobs.worker.role import Role
from viralfx.jobs.worker.running import Execution

_logger = logging.getLogger("viralfx.jobs")

T = TypeVar("T")

_STOP_SECONDS = 0.25
"""Time that a renewal under way has to end when the thread stops; then it is cancelled."""

_MAX_ANSWER_SECONDS = 1.0
"""The longest time that the event loop has for an answer; after it the loop counts as blocked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """The jobs of a worker at one moment, as its event loop sees them."""

    holding: Sequence[str] | None
    """Ids of the jobs that it has; None: unknown, because the answer to a claim is late."""
    busy_until: float = -math.inf
    """Monotonic time of the latest deadline of the running jobs; minus infinity without one."""


class LeaseOwner(Protocol[T]):
    """The part of a worker whose lease a thread renews. All but ``register`` run on its loop."""

    def view(self) -> WorkerView:
        """Return the jobs of the worker."""
        ...

    async def register(self, store: LeaseStore, view: WorkerView | None) -> T:
        """Renew the lease in the thread; without a view the event loop is blocked."""
        ...

    def on_renewed(self, began: float, answer: T) -> None:
        """Receive the answer to a renewal that began at a monotonic time."""
        ...

    def on_failed(self, error: Exception) -> object:
        """Receive the error of a renewal."""
        ...


class LeaseThread(Generic[T]):
    """A thread with an event loop and a connection of its own.

    It asks the worker's event loop for the jobs before each renewal. If the loop does not answer,
    it is blocked, and the lease is renewed without it until a lease after the latest deadline of
    the jobs that may block it. Then the thread stops renewing until the loop answers, so that a
    worker that is stuck for good loses its jobs to others.
    """

    def __init__(
        self,
        owner: LeaseOwner[T],
        open_store: Callable[[], LeaseStore],
        *,
        lease: float,
        retry_delay: Callable[[int], float],
        clock: Clock,
    ) -> None:
        """``lease`` is in seconds; ``retry_delay`` returns the pause after consecutive failures.

        The thread calls ``open_store``, ``retry_delay`` and the clock's ``monotonic``.
        """
        self._owner = owner
        self._open_store = open_store
        self._lease = lease
        self._retry_delay = retry_delay
        self._clock = clock
        self._answer_seconds = min(_MAX_ANSWER_SECONDS, lease / 12)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Explicit, since a policy may make loops that a thread cannot run.
        self._own_loop = asyncio.SelectorEventLoop()
        self._stopping = asyncio.Event()
        self._answered_at = 0.0
        self._busy_until = -math.inf
        self._failures = 0
        self._blocked = False
        self._gave_up = False

    async def run(self) -> None:
        """Renew until cancelled; the thread has ended when this returns.

        A second cancellation does not wait for the thread. Raises the error that ended it.
        """
        self._loop = asyncio.get_running_loop()
        self._answered_at = self._clock.monotonic()
        ended: asyncio.Future[BaseException | None] = self._loop.create_future()
        threading.Thread(target=self._run, args=(ended,), name="job-lease", daemon=True).start()
        try:
            error = await asyncio.shield(ended)
        except asyncio.CancelledError:
            with contextlib.suppress(RuntimeError):  # it has ended and closed its loop
                self._own_loop.call_soon_threadsafe(self._stopping.set)
            await ended
            raise
        if error is not None:
            raise error

    def covers(self, until: float) -> None:
        """Record that a job began whose deadline is at a monotonic time; call it on the loop."""
        # Read by the thread; the next answer replaces it with the deadline of the jobs then.
        self._busy_until = max(self._busy_until, until)

    # -- in the thread -------------------------------------------------------------------------

    def _run(self, ended: "asyncio.Future[BaseException | None]") -> None:
        error: BaseException | None = None
        try:
            self._own_loop.run_until_complete(self._renew_until_stopped())
        except _LoopClosedError:
            return
        except BaseException as raised:  # noqa: BLE001 - the worker's loop raises it
            error = raised
        finally:
            self._own_loop.close()
        with contextlib.suppress(_LoopClosedError):
            self._post(_resolve, ended, error)

    async def _renew_until_stopped(self) -> None:
        store = self._open_store()
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            while not stopping.done():
                began = self._clock.monotonic()
                view = await self._view()
                asked = self._clock.monotonic() - began
                pause = await self._renew(store, view, stopping)
                # A loop that does not answer must not make the renewals less frequent.
                await asyncio.wait({stopping}, timeout=max(0.0, pause - asked))
        finally:
            stopping.cancel()
            await store.close()

    async def _renew(
        self, store: LeaseStore, view: WorkerView | None, stopping: "asyncio.Future[Any]"
    ) -> float:
        """Renew the lease, or not if the loop is blocked for too long; return the next pause."""
        began = self._clock.monotonic()
        if not self._may_renew(view, began):
            return self._lease / 3
        try:
            answer = await self._register(store, view, stopping)
        except Exception as error:  # noqa: BLE001 - without this loop the worker loses its jobs
            self._failures += 1
            self._post(self._owner.on_failed, error)
            return self._retry_delay(self._failures)
        self._failures = 0
        self._post(self._owner.on_renewed, began, answer)
        return self._lease / 3

    async def _register(
        self, store: LeaseStore, view: WorkerView | None, stopping: "asyncio.Future[Any]"
    ) -> T:
        registering = asyncio.ensure_future(self._owner.register(store, view))
        registering.add_done_callback(ignore_error)
        try:
            # Leaves time for another try before the lease expires.
            await asyncio.wait(
                {registering, stopping},
                timeout=self._lease / 2,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if stopping.done():
                # Not cut off at once: the server could execute it after the deregistration.
                await asyncio.wait({registering}, timeout=_STOP_SECONDS)
            if not registering.done():
                raise LedgerUnavailableError("the ledger does not answer")
            return registering.result()
        finally:
            if registering.cancel():
                await asyncio.wait({registering}, timeout=_STOP_SECONDS)

    def _may_renew(self, view: WorkerView | None, now: float) -> bool:
        if view is not None:
            if self._gave_up:
                _logger.info("Event loop answers again: the job lease is renewed")
            self._blocked = self._gave_up = False
            return True
        extra = {"job": self._blocking_job(), "blocked": round(now - self._answered_at, 3)}
        if not self._blocked:
            self._blocked = True
            _logger.warning("Event loop is blocked; a thread renews the job lease", extra=extra)
        if now <= max(self._answered_at, self._busy_until) + self._lease:
            return True
        if not self._gave_up:
            self._gave_up = True
            _logger.error(
                "Job lease is not renewed: the event loop is blocked beyond every deadline",
                extra=extra,
            )
        return False

    def _blocking_job(self) -> str | None:
        # The asyncio task of a job has the job's id as its name.
        current = asyncio.current_task(self._loop)
        return current.get_name() if current and is_job_id(current.get_name()) else None

    async def _view(self) -> WorkerView | None:
        """Ask the worker's event loop for its jobs; return None if it does not answer in time."""
        answer: asyncio.Future[WorkerView] = self._own_loop.create_future()
        self._post(self._answer, answer)
        await asyncio.wait({answer}, timeout=self._answer_seconds)
        return answer.result() if answer.done() else None

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None  # noqa: S101 - set before the thread starts
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError as error:
            raise _LoopClosedError from error

    # -- on the worker's event loop ------------------------------------------------------------

    def _answer(self, answer: "asyncio.Future[WorkerView]") -> None:
        view = self._owner.view()
        self._answered_at, self._busy_until = self._clock.monotonic(), view.busy_until
        with contextlib.suppress(RuntimeError):  # the thread has ended
            self._own_loop.call_soon_threadsafe(_resolve, answer, view)


class _LoopClosedError(Exception):
    """The worker's event loop is closed, so its worker has ended without a drain."""


def _resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)


def max_renewal_delay(lease: float) -> float:
    """Return the seconds after an outage within which every live worker has renewed its lease.

    A renewal that hangs is cancelled after half a lease, and tried again after a pause.
    """
    return lease / 2 + _max_retry_seconds(lease)


def _max_retry_seconds(lease: float) -> float:
    return min(MAX_RETRY_SECONDS, lease / 6)


class Heartbeat(Role):
    """Registers a worker and renews its lease every third of it.

    After the lease has expired, other workers may take the worker's jobs. Running tasks continue,
    and the ledger rejects the outcome of a job that was claimed again.

    With a lease store the renewals come from a thread. So a worker whose event loop is blocked
    keeps the jobs that have begun, and the others go to other workers.
    """

    name = "job-heartbeat"

    def __init__(
        self,
        context: WorkerContext,
        queues: Collection[str],
        lease: float,
        *,
        view: Callable[[], WorkerView],
        wake: Callable[[], None],
        open_store: Callable[[], LeaseStore] | None = None,
    ) -> None:
        """``lease`` is in seconds.

        ``view`` returns the jobs that the worker has; ``wake`` is called after each renewal.
        ``open_store`` is called in the thread; None: the event loop renews the lease.
        """
        self._context = context
        self._clock = context.clock
        self._queues = tuple(queues)
        self._lease = lease
        self.view = view
        self._wake = wake
        self._open_store = open_store
        self._thread: LeaseThread[Registration] | None = None
        self._rng = default_rng()
        self._valid_until: float | None = None
        self._ends: datetime | None = None
        self.registration: Registration | None = None
        """The answer to the last renewal, while the lease may be valid; None: not registered."""
        self.was_registered = False
        """True once a renewal succeeded."""
        self._leads_from = math.inf
        self._ahead: float | None = None
        """The ledger's time, in seconds since 1970, less the monotonic time; None: unknown."""
        self._unbroken_since = 0.0
        self._loss_logged = False

    def is_valid(self, now: float) -> bool:
        """Return True if the lease is valid at a monotonic time."""
        return self._valid_until is not None and now < self._valid_until

    def is_secure(self, now: float) -> bool:
        """Return True if the lease is valid for long enough to claim jobs under it."""
        return self.is_valid(now + self._lease / 5)

    def unbroken_for(self, now: float) -> float:
        """Return for how many seconds the lease has been valid without a gap; zero if it is not."""
        return now - self._unbroken_since if self.is_valid(now) else 0.0

    def leads(self, now: float) -> bool:
        """Return True if this worker leads at a monotonic time.

        That is also if the lease of the leader has ended since this worker's renewal. Several
        workers may then lead, until they renew their leases.
        """
        return now >= self._leads_from

    @property
    def workers(self) -> int:
        """The live workers that share a queue with this one, itself included."""
        return 1 if self.registration is None else self.registration.workers

    @property
    def others_valid_until(self) -> datetime | None:
        """The ledger's time until which the leases of all live workers are valid; None: unknown.

        That is two thirds of a lease after this worker's own last renewal: every worker that
        renews in time had at least as much left at that moment.
        """
        return None if self._ends is None else self._ends - timedelta(seconds=self._lease / 3)

    def ledger_time(self, now: float) -> datetime | None:
        """Return the ledger's time at a monotonic time; None before the first renewal.

        It is late by the time that an answer takes, at most, so that no time comes too early.
        """
        return None if self._ahead is None else datetime.fromtimestamp(now + self._ahead, UTC)

    def begin(self, execution: Execution, timeout: float) -> bool:
        """Record that a task begins, which may block for ``timeout`` seconds.

        Returns False if its job was released, so that the task must not begin.
        """
        if not self._context.begun.begin(execution):
            return False
        if self._thread is not None:
            self._thread.covers(self._clock.monotonic() + timeout)
        return True

    async def run(self) -> None:
        """Renew the lease until cancelled."""
        try:
            if self._open_store is None:
                while True:
                    await self._clock.sleep(await self._renew())
            self._thread = LeaseThread(
                self,
                self._open_store,
                lease=self._lease,
                retry_delay=lambda failures: self._limited(
                    RETRY_BACKOFF.delay(failures, self._rng)
                ),
                clock=self._clock,
            )
            await self._thread.run()
        finally:
            self._context.availability.remove("register")
            self._valid_until = self._ends = self.registration = None
            self._leads_from = math.inf

    async def register(self, store: LeaseStore, view: WorkerView | None) -> Registration:
        """Renew the lease in ``store``; called in the thread. No view: the loop is blocked.

        Then the jobs that have not begun are released, those of a claim included whose answer the
        loop has not read.
        """
        blocked = view is None
        return await store.register(
            self._context.worker,
            self._queues,
            self._lease,
            self._context.begun.release() if view is None else view.holding,
            tasks=self._context.tasks.names,
            eligible=not blocked,
            grace=0.0 if blocked else None,
        )

    async def _register(self) -> Registration:
        context = self._context
        registering = asyncio.create_task(
            context.ledger.register(
                context.worker,
                self._queues,
                self._lease,
                self.view().holding,
                tasks=context.tasks.names,
            ),
            name="job-register",
        )
        try:
            # Leaves time for another try before the lease expires.
            if not await finished_within(registering, self._lease / 2, self._clock):
                raise LedgerUnavailableError("the ledger does not answer")
        finally:
            registering.cancel()
        return registering.result()

    async def _renew(self) -> float:
        # Measured from before the call: the ledger starts the lease no earlier.
        began = self._clock.monotonic()
        try:
            registration = await self._register()
        except Exception as error:  # noqa: BLE001 - without this loop the worker loses its jobs
            return self.on_failed(error)
        self.on_renewed(began, registration)
        return self._lease / 3

    def on_failed(self, error: Exception) -> float:
        """Record a failed renewal; return the seconds after which to try it again."""
        delay = self._limited(self._context.availability.failed("register", error))
        had_lease = self._valid_until is not None
        if (
            had_lease
            and not self._loss_logged
            and not self.is_valid(self._clock.monotonic() + delay)
        ):
            self._loss_logged = True
            # The reason was logged when the ledger was lost.
            _logger.error("Job lease lost: other workers may take this worker's jobs")
        return delay

    def on_renewed(self, began: float, answer: Registration) -> None:
        """Record a renewal that began at a monotonic time."""
        self.registration, self.was_registered, ends = answer, True, answer.lease_until
        if self._ends is None or ends - timedelta(seconds=self._lease) >= self._ends:
            self._unbroken_since = self._clock.monotonic()
        self._valid_until, self._ends = began + self._lease, ends
        # The ledger answered between the two moments. An answer that took long, or that a blocked
        # loop received late, does not change an estimate that agrees with it.
        answered = ends.timestamp() - self._lease
        least, most = answered - self._clock.monotonic(), answered - began
        if self._ahead is None or not least <= self._ahead <= most:
            self._ahead = least
        leads_in = 0.0 if answer.leader else answer.leader_for
        self._leads_from = self._clock.monotonic() + leads_in
        self._context.availability.succeeded("register")
        if self._loss_logged:
            self._loss_logged = False
            _logger.info("Job lease regained")
        self._wake()

    def _limited(self, delay: float) -> float:
        return min(delay, _max_retry_seconds(self._lease))
