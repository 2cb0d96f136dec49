"""Deadline: one time limit for a whole operation; and the cancellation that a job can ask for."""

import asyncio
import math
import threading
from collections import deque
from contextvars import Context, ContextVar, copy_context
from types import TracebackType
from typing import Self

from viralfx.core.clock import Clock, SystemClock
from viralfx.core.errors import require_not_negative


class Deadline:
    """A point in time, ``seconds`` after its creation, that limits ``async with`` blocks.

    When the deadline passes, the block is cancelled and ``TimeoutError`` is raised. If no time is
    left when the block starts, ``TimeoutError`` is raised at once. Retries inside the block do not
    start a wait that would end after the deadline. One deadline may limit several blocks, nested
    or in several tasks. If a block suppresses its cancellation, the deadline waits for it.

    Raises ``ValueError`` for a negative or non-finite number of seconds.
    """

    __slots__ = ("_clock", "_cut", "_entered", "_expires_at", "_seconds")

    def __init__(self, seconds: float, *, clock: Clock | None = None) -> None:
        if not (type(seconds) is float and 0 <= seconds < math.inf):  # the usual case first
            require_not_negative("a deadline", seconds)
        self._seconds = seconds
        self._clock = clock or SystemClock()
        self._expires_at = self._clock.monotonic() + seconds
        self._cut = False
        self._entered: _Block | None = None
        """The last block, until it has ended."""

    def remaining(self) -> float:
        """Return the seconds left; zero once the deadline has passed."""
        return max(0.0, self._expires_at - self._clock.monotonic())

    @property
    def seconds(self) -> float:
        """The seconds of the whole block."""
        return self._seconds

    @property
    def cut(self) -> bool:
        """True if a block ended with the ``TimeoutError`` of this deadline."""
        return self._cut

    async def __aenter__(self) -> Self:
        """Start the block.

        Raises ``TimeoutError`` if no time is left.
        """
        if self._expires_at <= self._clock.monotonic():
            # With a timer alone, the block would run up to its first await.
            raise TimeoutError(self._message)
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            raise RuntimeError("a deadline must be entered by an asyncio task")
        block = self._entered = _Block(self, task, _active())
        _innermost.set(block)
        _new_blocks.add(block, loop)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the block; a cancellation by this deadline becomes ``TimeoutError``."""
        block = innermost = _active()
        # A generator that is suspended in a block of its own keeps that block active.
        while block is not None and block.deadline is not self:
            block = block.outer
        if block is None:
            # A generator may be closed in a context that was not copied from that of its block.
            block = self._entered
        if block is None:
            raise RuntimeError("a deadline must be left where it was entered")
        if block is innermost:
            _innermost.set(block.outer)
        if block is self._entered:
            self._entered = None
        if block.end() and kind is not None and issubclass(kind, asyncio.CancelledError):
            self._cut = True
            raise TimeoutError(self._message) from error

    @property
    def _message(self) -> str:
        return f"the deadline of {self._seconds:g} s has passed"


class _Block:
    """One active ``async with`` block. Kept in the task's context: a deadline can have several.

    It cancels its task by the rules of ``asyncio.timeout``. An ``asyncio.timeout`` starts a timer
    for each block, also for one that never waits.
    """

    __slots__ = (
        "_cancelling",
        "_context",
        "_expired",
        "_task",
        "_timer",
        "deadline",
        "ended",
        "outer",
    )

    def __init__(
        self, deadline: Deadline, task: "asyncio.Task[object]", outer: "_Block | None"
    ) -> None:
        self.deadline = deadline
        self.outer = outer
        self._task = task
        self._cancelling = task.cancelling()
        # The cancellation counts as one by the code of the block.
        self._context: Context | None = copy_context()
        self._timer: asyncio.TimerHandle | None = None
        self._expired = self.ended = False

    def start_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the task when the deadline passes, unless the block has ended."""
        context = self._context
        if context is not None:
            context.run(self._start_timer, loop, context)

    def _start_timer(self, loop: asyncio.AbstractEventLoop, context: Context) -> None:
        try:
            left = self.deadline.remaining()
        except Exception as error:  # noqa: BLE001 - reported as an error of the block's own code
            what = "The clock of a deadline has failed"
            loop.call_exception_handler({"message": what, "exception": error})
        else:
            if left:
                self._timer = loop.call_later(left, self._expire, context=context)
            else:
                self._expire()

    def _expire(self) -> None:
        self._expired = self._task.cancel()

    def end(self) -> bool:
        """End the block; return True if only its deadline has cancelled the task."""
        self.ended = True
        self._context = None  # it refers to the block around this one
        if self._timer is not None:
            self._timer.cancel()
        return self._expired and self._task.uncancel() <= self._cancelling


class _NewBlocks(threading.local):
    """The blocks that this thread's event loop has entered in its current turn.

    Their timers start in the next turn. Most blocks have ended by then and need none. A block that
    never awaits cannot be cancelled anyway.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._blocks: deque[_Block] = deque()

    def add(self, block: _Block, loop: asyncio.AbstractEventLoop) -> None:
        """Start the timer of a block in the next turn of the running loop."""
        if loop is not self._loop or not self._blocks:
            # Another loop may have been closed before its next turn.
            self._loop, self._blocks = loop, deque()
            # Without the context of this block: an exit that a signal handler raises meanwhile is
            # not of its code.
            loop.call_soon(self._start_timers, self._blocks, loop, context=Context())
        self._blocks.append(block)

    def _start_timers(self, blocks: deque[_Block], loop: asyncio.AbstractEventLoop) -> None:
        try:
            while blocks:
                blocks.popleft().start_timer(loop)
        finally:
            if blocks:  # a signal handler has raised
                loop.call_soon(self._start_timers, blocks, loop)
            elif blocks is self._blocks:
                self._loop = None


_new_blocks = _NewBlocks()
_innermost: ContextVar[_Block | None] = ContextVar("viralfx_deadline", default=None)


def _active() -> _Block | None:
    """Return the innermost block that has not ended, and unlink all that have.

    Another context may have ended a block: an asynchronous generator may be closed in one of its
    own, and the tasks that a block started keep a copy of its context.
    """
    innermost = block = _not_ended(_innermost.get())
    while block is not None:
        outer = block.outer = _not_ended(block.outer)
        block = outer
    return innermost


def _not_ended(block: _Block | None) -> _Block | None:
    while block is not None and block.ended:
        block = block.outer
    return block


def time_left() -> float:
    """Return the seconds left until the earliest enclosing deadline; infinity without one."""
    left, block = math.inf, _active()
    while block is not None:
        left = min(left, block.deadline.remaining())
        block = block.outer
    return left


_making_event = threading.Lock()


class Cancellation:
    """Whether an execution should end: its deadline has passed, or the worker cancelled it.

    It has the methods of a ``threading.Event`` that read, and you can use it as a condition. A
    task in a thread asks it between two steps of its work; a coroutine need not, because it gets
    ``CancelledError``.
    """

    __slots__ = ("_deadline", "_event", "_set", "seen")

    def __init__(self, deadline: Deadline | None = None) -> None:
        self._deadline = deadline
        self._set = False
        # Made by the first wait: few tasks wait, and an event takes longer than an empty task.
        self._event: threading.Event | None = None
        self.seen = False
        """True once the task has read that it should end."""

    def is_set(self) -> bool:
        """Return True if the execution should end."""
        self.seen = self.seen or self.requested
        return self.seen

    @property
    def requested(self) -> bool:
        """The same, without counting as seen by the task."""
        return self._set or (self._deadline is not None and not self._deadline.remaining())

    __bool__ = is_set

    def wait(self, timeout: float | None = None) -> bool:
        """Block this thread until the execution should end, at most ``timeout`` seconds.

        Returns :meth:`is_set`. Call it in a thread only: it would block an event loop.
        """
        left = math.inf if self._deadline is None else self._deadline.remaining()
        seconds = min(left, math.inf if timeout is None else timeout)
        with _making_event:
            event = self._event = self._event or threading.Event()
        # In this order: a call of set() either finds the event or is found here.
        if not self._set:
            event.wait(None if seconds == math.inf else seconds)
        return self.is_set()

    def set(self) -> None:
        """Request the end of the execution; the worker calls it."""
        self._set = True
        if self._event is not None:
            self._event.set()
