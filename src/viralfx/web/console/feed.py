"""The live feed: one stream of server-sent events to each open page.

Each event is encoded once and kept in a buffer. An event with data that need a session has a second
form for the other pages. A page has a position in the buffer and gets small pieces, so a page that
does not read costs little memory: once its position left the buffer, it gets a snapshot. With no
page open, the listeners return in their first line.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from viralfx.core.clock import timestamp
from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import StateChanged, Transition
from viralfx.domain.health.monitor import MonitorEvent
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import ShutdownEvent
from viralfx.jobs.ledger import QueueCounts
from viralfx.resilience.breaker import CallRejected, CircuitBreaker, CircuitEvent
from viralfx.server.interface import Message, Receive, Scope, Send, mark_logged
from viralfx.web.auth import SECURITY_HEADERS
from viralfx.web.console import views
from viralfx.web.responses import encode
from viralfx.web.sessions import Session

_logger = logging.getLogger("viralfx.console")

BEAT_SECONDS = 2.0
_STALLED_SECONDS = 10.0
"""A page that takes nothing for so long loses the rest of its frame, and gets a snapshot later."""
_WOKEN_AT_ONCE = 25
"""Pages that are served in one turn of the event loop, so that probes wait for no more of them."""
FEW_PAGES = 20
_GAP_SECONDS = 0.25
"""With more pages, the time in which the events share one write to each page."""
LAST_EVENT_SECONDS = 0.05
"""Time for the writes of the last event. The pages beyond it see the end of the connection only."""
FOREIGN_SECONDS = 10.0
"""Length of a stream under a server that is not stopped in stages: such a server waits for the end
of its streams before it says that it stops. The page reconnects and misses nothing."""
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    *SECURITY_HEADERS,
)


class _Page(views.Reader):
    """One open stream."""

    __slots__ = ("gone", "session", "waiting")

    def __init__(self, session: Session | None = None, *, everything: bool = False) -> None:
        super().__init__(everything=everything)
        self.session = session
        self.gone = False
        self.waiting: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let the page look at the buffer."""
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)


class Feed:
    """Collects the events of the process, and streams them."""

    def __init__(
        self,
        operations: Operations,
        *,
        max_streams: int,
        in_flight: Callable[[], views.View],
        concurrency: Callable[[], Mapping[str, int]],
        remaining_stages: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """``in_flight`` returns the requests and jobs that run now."""
        self._operations = operations
        self._max_streams = max_streams
        self._in_flight = in_flight
        self._concurrency = concurrency
        self._remaining_stages = remaining_stages
        self._pages: set[_Page] = set()
        self.frames = views.Frames(operations.clock, self.snapshot)
        """The events of the last time."""
        self._missed = False
        """True if something happened while no page was open; it is in no frame."""
        self.requests: Callable[[], int] = int
        """Returns how many requests of the application are in flight."""
        self.before_beat: Callable[[], None] = lambda: None
        """Called every two seconds while pages are open."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False
        self._ran: dict[str, None] = {}
        self._flush_planned = self._stop_changed = False
        self._beating: asyncio.TimerHandle | None = None
        self._waking: asyncio.TimerHandle | None = None
        self._queues: tuple[datetime, Mapping[str, QueueCounts]] | None = None
        self._rejected: dict[str, int] = {}
        self._rejecting: dict[str, None] = {}
        """The circuits that have rejected calls since the last beat."""
        self._circuit_since: dict[str, datetime] = {}
        self._started_at = operations.clock.now()
        operations.monitor.subscribe(self._on_health)
        operations.lifecycle.subscribe(self._on_state)
        operations.shutdown.subscribe(self._on_shutdown)
        operations.breakers.subscribe(self._on_circuit)

    @property
    def pages(self) -> int:
        """How many pages are open."""
        return len(self._pages)

    @property
    def full(self) -> bool:
        """True if no more streams may be opened."""
        return len(self._pages) >= self._max_streams or self._ended

    # -- events ------------------------------------------------------------------------------

    def _on_health(self, event: MonitorEvent) -> None:
        if not self._pages:
            self._missed = True
            return
        if isinstance(event, CheckCompleted):
            self._ran[event.check] = None
        elif isinstance(event, Transition):
            self._ran[event.check] = None
            self._publish("change", views.change_view(event))
            self._plan_flush()

    def _on_state(self, event: StateChanged) -> None:
        self._missed = self._missed or not self._pages
        if self._pages:
            body = {"old": str(event.old), "new": str(event.new), "reason": event.reason}
            self._publish("state", {**body, "at": timestamp(event.at)})

    def _on_shutdown(self, _: ShutdownEvent) -> None:
        self._missed = self._missed or not self._pages
        if self._pages and not self._ended:
            self._stop_changed = True
            self._plan_wake()

    def _on_circuit(self, event: CircuitEvent) -> None:
        name = event.name
        if isinstance(event, CallRejected):
            self._rejected[name] = self._rejected.get(name, 0) + 1
            if self._pages:
                self._rejecting[name] = None
            self._missed = self._missed or not self._pages
            return
        self._circuit_since[name] = self._operations.clock.now()
        try:
            # A circuit may change in any thread, also before the first page and after the loop.
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.publish_circuit, name)
                return
        except RuntimeError:
            pass
        self._missed = True

    def publish_circuit(self, name: str) -> None:
        """Send the state of a circuit to the pages."""
        if not self._pages:
            self._missed = True
            return
        with contextlib.suppress(KeyError):
            self._publish("circuit", self.circuit(self._operations.breakers[name]))

    def on_counted(self, counts: Mapping[str, QueueCounts]) -> None:
        """Receive the counts of the queues."""
        self._missed = self._missed or not self._pages
        before = self._queues
        self._queues = (self._operations.clock.now(), counts)
        if self._pages and (before is None or before[1] != counts):
            self._append("queues", self._queue_list(), everyone=False)
            self._plan_wake()

    def circuit(self, breaker: CircuitBreaker) -> views.View:
        """Return the view of a circuit."""
        name = breaker.name
        rejected, since = self._rejected.get(name, 0), self._circuit_since.get(name)
        return views.circuit_view(breaker, rejected, since, self._operations.clock.now())

    def _queue_list(self) -> views.View | None:
        if self._queues is None:
            return None
        at, counts = self._queues
        concurrency = self._concurrency()
        items = [views.queue_view(name, each, concurrency) for name, each in counts.items()]
        return {"at": timestamp(at), "items": items}

    # -- frames ------------------------------------------------------------------------------

    def _guarded(self, step: Callable[[], None]) -> None:
        """Run a callback of the loop, whose errors would end a process that stops at such errors.

        A view has data of the application's checks, which may raise.
        """
        try:
            step()
        except Exception:
            _logger.exception("Event of the console failed")

    def _plan_flush(self) -> None:
        if not self._flush_planned:
            self._flush_planned = True
            # The report follows the transitions of a turn.
            asyncio.get_running_loop().call_soon(self._guarded, self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        names, self._ran = list(self._ran), {}
        self._missed = self._missed or bool(names and not self._pages)
        if names and self._pages:
            self._publish("checks", views.checks_view(self._operations.monitor.report(), names))

    def _publish(self, event: str, data: Any) -> None:
        self._append(event, data)
        self._plan_wake()

    def _append(self, event: str, data: Any, *, everyone: bool = True) -> None:
        """Add a frame; without ``everyone`` only pages with a session get it."""
        self.frames.append(event, encode(data), everyone=everyone)

    def _plan_wake(self) -> None:
        """Let few pages look at the buffer at once, and many pages once for several events."""
        if len(self._pages) <= FEW_PAGES:
            self._wake_all()
        elif self._waking is None:
            loop = asyncio.get_running_loop()
            self._waking = loop.call_later(_GAP_SECONDS, self._guarded, self._wake_all)

    def _wake_all(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        if self._stop_changed and not self._ended:
            self._stop_changed = False
            self._append("stop", views.stop_view(self._operations))
        self._wake(list(self._pages))

    def _wake(self, pages: list[_Page]) -> None:
        for page in pages[:_WOKEN_AT_ONCE]:
            page.wake()
        if len(pages) > _WOKEN_AT_ONCE:
            asyncio.get_running_loop().call_soon(self._wake, pages[_WOKEN_AT_ONCE:])

    def _beat(self) -> None:
        if not self._pages:
            self._beating = None
            return
        # First, so that a view that raises does not end the beats of all pages.
        loop = asyncio.get_running_loop()
        self._beating = loop.call_later(BEAT_SECONDS, self._guarded, self._beat)
        self.before_beat()
        self._flush()
        for name in list(self._rejecting):
            # First, as a call may be rejected in another thread meanwhile.
            del self._rejecting[name]
            self.publish_circuit(name)
        shutdown = self._operations.shutdown
        beat = {
            "now": timestamp(self._operations.clock.now()),
            "uptime": round(self._operations.lifecycle.uptime, 3),
            "remaining": round(shutdown.remaining(), 1) if shutdown.triggered else None,
        }
        in_flight = self._in_flight()
        # In the buffer, so that one encoding serves all; it has no id, as nothing is missed by it.
        self.frames.append_unnamed(
            *(
                b"event: beat\ndata: %s\n\n" % encode({**beat, "inFlight": each})
                for each in (in_flight, _without_jobs(in_flight))
            )
        )
        self._drop_stalled()
        self._wake_all()

    def _drop_stalled(self) -> None:
        until = self._operations.clock.monotonic() - _STALLED_SECONDS
        for page in self._pages:
            page.drop_before(until)

    def snapshot(self, *, everything: bool) -> views.View:
        """Return the data that a page begins with; ``everything``: also those for a session."""
        operations, lifecycle = self._operations, self._operations.lifecycle
        last = lifecycle.history[-1] if lifecycle.history else None
        return {
            "instance": operations.instance,
            "role": operations.role,
            "version": operations.version,
            "environment": operations.environment,
            "startedAt": timestamp(self._started_at),
            "now": timestamp(operations.clock.now()),
            "uptime": round(lifecycle.uptime, 3),
            "state": {
                "state": str(lifecycle.state),
                "reason": "" if last is None else last.reason,
                "at": None if last is None else timestamp(last.at),
            },
            **views.checks_view(operations.monitor.report()),
            "changes": [views.change_view(each) for each in operations.monitor.history],
            "stop": views.stop_view(operations),
            "circuits": [self.circuit(each) for each in operations.breakers],
            "queues": self._queue_list() if everything else None,
            "inFlight": self._in_flight() if everything else _without_jobs(self._in_flight()),
        }

    def start(self, *, everything: bool) -> msgspec.Raw:
        """Return a snapshot and its id as JSON; a stream from this id on misses nothing."""
        self._forget_missed()
        return self.frames.start(everything=everything)

    def _forget_missed(self) -> None:
        """Make the snapshots before now old, if something happened while no page was open."""
        if self._missed and not self._pages:
            self._missed = False
            self._ran = {}
            self.frames.clear()

    # -- streams -----------------------------------------------------------------------------

    async def stream(
        self,
        last_id: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        *more: tuple[bytes, bytes],
        session: Session | None = None,
        everything: bool = False,
    ) -> None:
        """Send the stream of one page until it leaves, its session ends or the process ends.

        ``everything``: also the events for callers with the right ``read``. The page connects again
        when the session ends; one of a caller that the application names does so after 10 s, since
        the application may have taken the right away.
        """
        start: Message = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [*_HEADERS, *more]})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        loop = asyncio.get_running_loop()
        page = self._open(last_id, loop, _Page(session, everything=everything))
        leaving = asyncio.ensure_future(_disconnected(receive))
        leaving.add_done_callback(lambda _: self._leave(page))
        limits = []
        if not self._operations.staged or (everything and session is None):
            limits.append(FOREIGN_SECONDS)
        if session is not None:
            limits.append((session.expires_at - self._operations.clock.now()).total_seconds())
        limit = loop.call_later(min(limits), self._leave, page) if limits else None
        try:
            await self._send_frames(page, send)
            if not leaving.done():
                # The last frames and the end of the stream are one write.
                last = self.frames.all_after(page) if self._ended and not page.gone else b""
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except asyncio.CancelledError as error:
            if self._ended:
                mark_logged(error)  # the client has not read, and the process exits
            raise
        finally:
            self._pages.discard(page)
            leaving.cancel()
            if limit is not None:
                limit.cancel()

    def _open(self, last_id: str, loop: asyncio.AbstractEventLoop, page: _Page) -> _Page:
        if loop is not self._loop:
            # The timers of a loop that has ended never fire.
            self._loop, self._beating, self._waking = loop, None, None
            self._flush_planned = False
        self._forget_missed()
        page.position = self.frames.position_of(last_id)
        self._pages.add(page)
        if self._beating is None:
            self._beating = loop.call_later(BEAT_SECONDS, self._guarded, self._beat)
        return page

    async def _send_frames(self, page: _Page, send: Send) -> None:
        await send(_body(b"retry: 1000\n\n" + self.frames.next_piece(page)))
        while not (page.gone or self._ended):
            if piece := self.frames.next_piece(page):
                await send(_body(piece))
            else:
                page.waiting = asyncio.get_running_loop().create_future()
                await page.waiting

    def end_sessions(self, is_valid: Callable[[Session], bool]) -> None:
        """End the streams of sessions that are not valid any more, such as after a log-out."""
        for page in list(self._pages):
            if page.session is not None and not is_valid(page.session):
                self._leave(page)

    def _leave(self, page: _Page) -> None:
        page.gone = True
        page.wake()

    async def end(self, budget: float) -> None:
        """Send the last event, and end all streams: a stage of the stop.

        It waits for no page. A page that does not read, or that has no turn in the time for all, is
        left to the close of the server.
        """
        if self._ended:
            return
        if self._pages:
            body = {
                "stop": views.stop_view(self._operations),
                "left": list(self._remaining_stages()),
                "now": timestamp(self._operations.clock.now()),
            }
            self._append("bye", body)
        self._ended = True
        for timer in (self._beating, self._waking):
            if timer is not None:
                timer.cancel()
        loop, pages = asyncio.get_running_loop(), list(self._pages)
        until = loop.time() + min(budget, LAST_EVENT_SECONDS)
        for first in range(0, len(pages), _WOKEN_AT_ONCE):
            if first and loop.time() >= until:
                break
            for page in pages[first : first + _WOKEN_AT_ONCE]:
                page.wake()
            # A page writes and ends within the turn, unless its client does not read.
            await asyncio.sleep(0)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _without_jobs(in_flight: views.View) -> views.View:
    """Return the work in flight without the ids of jobs, which need a session."""
    return {**in_flight, "jobs": []}


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}
