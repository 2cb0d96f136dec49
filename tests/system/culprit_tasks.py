"""Tasks that go wrong in each known way, and bystanders that count how often they run."""

import asyncio
import ctypes
import hashlib
import math
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import msgspec
from tests.unit.unreadable import ERRORS, POLICIES

from viralfx import JobContext, task

RUNS = "CULPRIT_RUNS_FILE"
"""Environment variable: the file that gets a line for each execution."""

_LEFT = 256 * 2**20
"""Bytes that ``culprits.exhaust`` takes until no memory is left."""
_PIECE = 16 * 2**20
_DEVOURED = 512 * 2**20
"""Bytes that ``culprits.dropped`` takes, piece by piece, as ``culprits.devour`` does."""


def note(context: JobContext, what: str = "begun") -> None:
    """Append a line to the file; one write, so that lines of several processes do not mix."""
    with Path(os.environ[RUNS]).open("a", encoding="ascii") as file:
        file.write(f"{context.id} {what}\n")


# -- bystanders --------------------------------------------------------------------------------


@task("bystanders.notify", queue="notifications")
async def notify(number: int, context: JobContext) -> int:
    """Run for a moment."""
    note(context)
    await asyncio.sleep(0.01)
    return number


@task("bystanders.analyse", queue="analytics")
def analyse(number: int, context: JobContext) -> int:
    """Run for a moment in a thread."""
    note(context)
    time.sleep(0.01)
    return number


# -- results that cannot be stored, or nearly --------------------------------------------------


class Unknown:
    """An object without a JSON form, and without a text."""

    def __repr__(self) -> str:
        raise ValueError("planted: no text")


class Raising(tzinfo):
    """A time zone that raises when a time is encoded."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def tzname(self, _moment: datetime | None, /) -> str:
        """Return a name."""
        return "raising"

    def dst(self, _moment: datetime | None, /) -> None:
        """Return that nothing is known."""

    def utcoffset(self, _moment: datetime | None, /) -> timedelta:
        """Raise the error."""
        raise self._error


@task("culprits.big")
async def big(mebibytes: int, context: JobContext) -> str:
    """Return a long text."""
    note(context)
    return "x" * (mebibytes * 2**20)


@task("culprits.deep")
async def deep(levels: int, context: JobContext) -> msgspec.Raw:
    """Return arrays in arrays."""
    note(context)
    return msgspec.Raw(b"[" * levels + b"]" * levels)


@task("culprits.recursive")
async def recursive(levels: int, context: JobContext) -> object:
    """Return lists in lists."""
    note(context)
    return _nested(levels)


def _nested(levels: int) -> object:
    nested: list[object] = []
    for _ in range(levels):
        nested = [nested]
    return nested


@task("culprits.dropped")
async def dropped(what: str, context: JobContext) -> int:
    """Make what ``big``, ``recursive``, ``exhaust``, ``devour`` or ``fork`` makes, and drop it."""
    note(context)
    if what == "devour":
        return await _devour(_DEVOURED // _PIECE)
    if what == "exhaust":
        return len([bytearray(_PIECE) for _ in range(_LEFT // _PIECE)])
    if what == "fork":
        _fork("the child ends")
        return 1
    made = "x" * (60 * 2**20) if what == "big" else _nested(100_000)
    return len(made)  # type: ignore[arg-type]


@task("culprits.text")
async def text(kind: str, context: JobContext) -> object:
    """Return a text or a number that JSON or Postgres may refuse."""
    note(context)
    return {
        "surrogate": "\ud800",
        "raw surrogate": msgspec.Raw(b'"\\ud800"'),
        "nul": "a\0b",
        "raw nul": msgspec.Raw(b'"a\0b"'),
        "not utf-8": msgspec.Raw(b'"\xff"'),
        "not json": msgspec.Raw(b"{"),
        "two values": msgspec.Raw(b"1 2"),
        "nothing": msgspec.Raw(b""),
        "nan": math.nan,
        "raw nan": msgspec.Raw(b"NaN"),
        "infinity": math.inf,
        "1e400": msgspec.Raw(b"1e400"),
    }[kind]


@task("culprits.object")
async def an_object(kind: str, context: JobContext) -> object:
    """Return an object whose encoding fails."""
    note(context)
    if kind == "generator":
        return (number for number in range(3))
    if kind == "cycle":
        cycle: list[object] = []
        cycle.append(cycle)
        return cycle
    if kind == "unknown":
        return Unknown()
    error = {"raises": ValueError, "exits": SystemExit, "interrupts": KeyboardInterrupt}[kind]
    return datetime(2026, 1, 1, tzinfo=Raising(error("planted")))


@task("culprits.refused")
async def refused(_: None, context: JobContext) -> str:
    """Return a result that a trigger refuses."""
    note(context)
    return "refused"


@task("culprits.unrecordable")
async def unrecordable(_: None, context: JobContext) -> str:
    """Return a result; a trigger refuses each outcome."""
    note(context)
    return "late"


# -- code that blocks --------------------------------------------------------------------------


class Block(msgspec.Struct):
    """Says how to block the event loop, and for how long."""

    how: str
    seconds: float


def _block(block: Block) -> None:
    ends = time.monotonic() + block.seconds
    match block.how:
        case "sleep":
            time.sleep(block.seconds)
        case "python":
            while time.monotonic() < ends:
                pass
        case "hashlib":
            while time.monotonic() < ends:
                hashlib.pbkdf2_hmac("sha256", b"x", b"x", 200_000)
        case "interpreter":
            # One call, which holds the interpreter: longer by one letter takes twice as long.
            for letters in range(18, 40):
                began = time.monotonic()
                re.match(r"(a|a)*b", "a" * letters)
                if time.monotonic() - began > block.seconds / 2:
                    return
        case _:
            raise ValueError(block.how)


@task("culprits.block")
async def block(payload: Block, context: JobContext) -> str:
    """Block the event loop."""
    note(context)
    _block(payload)
    note(context, "ended")
    return payload.how


@task("culprits.block_thread")
def block_thread(payload: Block, context: JobContext) -> str:
    """Block a thread."""
    note(context)
    _block(payload)
    note(context, "ended")
    return payload.how


@task("culprits.stuck", timeout=1.0)
def stuck(seconds: float, context: JobContext) -> None:
    """Block a thread beyond its timeout."""
    note(context)
    time.sleep(seconds)


# -- code that ends what it should not ---------------------------------------------------------


@task("culprits.end")
async def end(how: str, context: JobContext) -> str:
    """End the process, or raise what would end it elsewhere."""
    note(context)
    match how:
        case "exit":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.Event().wait()
        case "system exit":
            raise SystemExit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case _:
            raise ValueError(how)
    return how


@task("culprits.exit_beside")
async def exit_beside(how: str, context: JobContext) -> str:
    """Exit in a task or a callback of its own."""
    note(context)
    _exit_in_callback(how, asyncio.get_running_loop())
    match how:
        case "task":
            await asyncio.create_task(_exit(SystemExit(3)))
        case "interrupted task":
            await asyncio.create_task(_exit(KeyboardInterrupt()))
        case "gather":
            await asyncio.gather(_exit(SystemExit(3)), asyncio.sleep(0.01))
        case "group":
            async with asyncio.TaskGroup() as group:
                group.create_task(_exit(SystemExit(3)))
        case "dropped task":
            dropped = asyncio.create_task(_exit(SystemExit(3)))
            del dropped
    await asyncio.sleep(0.1)
    return how


@task("culprits.fail_beside")
async def fail_beside(how: str, context: JobContext) -> str:
    """Leave behind a task or a callback that fails."""
    note(context)
    if how == "task":
        dropped = asyncio.create_task(_exit(RuntimeError("planted: nothing waits for this task")))
        del dropped
    else:
        asyncio.get_running_loop().call_soon(_nothing().throw, RuntimeError("planted"))
    await asyncio.sleep(0.1)
    return how


def _exit_in_callback(how: str, loop: asyncio.AbstractEventLoop) -> None:
    match how:
        case "callback":
            loop.call_soon(sys.exit, 3)
        case "timer":
            loop.call_later(0.01, sys.exit, 3)
        case "timers":
            loop.call_soon(_exit_repeatedly, loop)
            _left.add(asyncio.create_task(_repeat(object)))
        case "done callback":
            future = loop.create_future()
            future.add_done_callback(lambda _: sys.exit(3))
            future.set_result(None)
        case "closed callback":
            loop.call_soon(_nothing().throw, GeneratorExit)
        case "thread":
            threading.Thread(target=loop.call_soon_threadsafe, args=(sys.exit, 3)).start()


def _exit_repeatedly(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_later(0.02, _exit_repeatedly, loop)
    sys.exit(3)


def _nothing() -> Generator[None]:
    yield


async def _exit(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


@task("culprits.exit_in_loop")
def exit_in_loop(_: None, context: JobContext) -> None:
    """Exit in an event loop of its own."""
    note(context)
    asyncio.run(_exit(SystemExit(3)))


@task("culprits.unreadable")
async def unreadable(kind: str, context: JobContext) -> None:
    """Raise an error whose own code fails."""
    note(context)
    error = ERRORS[kind]
    raise error()


@task("culprits.badly_retried", retry=POLICIES["a timedelta"])
async def badly_retried(_: None, context: JobContext) -> None:
    """Fail; the policy returns no number of seconds."""
    note(context)
    raise ValueError("planted")


@task("culprits.cancel")
async def cancel(how: str, context: JobContext) -> None:
    """Raise the error of a cancellation that was not requested, or cancel itself, or all others."""
    note(context)
    if how == "raised":
        raise asyncio.CancelledError
    if how.startswith("of all"):
        _cancel_all_others()
        if how == "of all, repeatedly":
            _left.add(asyncio.create_task(_repeat(_cancel_all_others)))
            threading.Thread(target=time.sleep, args=(60.0,)).start()
        return
    running = asyncio.current_task()
    assert running is not None
    running.cancel()
    await asyncio.Event().wait()


def _cancel_all_others() -> None:
    for each in asyncio.all_tasks() - {asyncio.current_task()}:
        each.cancel()


async def _repeat(act: Callable[[], object]) -> None:
    """Act in each turn of the event loop; ignore cancellations."""
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
            act()


@task("culprits.fork")
async def fork(how: str, context: JobContext) -> str:
    """Fork; the child ends here, or returns from the task as well."""
    note(context)
    _fork(how)
    return how


@task("culprits.fork_in_thread")
def fork_in_thread(how: str, context: JobContext) -> str:
    """Fork in a thread."""
    note(context)
    _fork(how)
    return how


def _fork(how: str) -> None:
    child = os.fork()
    if how == "the child ends":
        if not child:
            os._exit(0)
        os.waitpid(child, 0)


@task("culprits.end_thread")
def end_thread(_: None, context: JobContext) -> None:
    """End the thread as Python does."""
    note(context)
    raise SystemExit(3)


@task("culprits.vanish", timeout=2.0)
def vanish(_: None, context: JobContext) -> None:
    """End the thread without the knowledge of Python."""
    note(context)
    ctypes.CDLL(None).pthread_exit(None)


@task("culprits.exhaust")
async def exhaust(_: None, context: JobContext) -> None:
    """Use up the memory that this process may have."""
    note(context)
    _exhaust()


def _exhaust() -> None:
    """Allocate memory until there is none within the limit of this process."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + _LEFT
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    taken: list[bytearray] = []
    try:
        while True:
            taken.append(bytearray(_PIECE))
    finally:
        taken.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)


@task("culprits.devour")
async def devour(_: None, context: JobContext) -> None:
    """Take memory until the kernel ends the process."""
    note(context)
    await _devour(sys.maxsize)


async def _devour(pieces: int) -> int:
    """Take so many pieces of memory, each with pages of its own; return their number."""
    taken: list[bytearray] = []
    while len(taken) < pieces:
        taken.append(bytearray(os.urandom(2**20) * (_PIECE // 2**20)))
        await asyncio.sleep(0)
    return len(taken)


# -- code that does not end, or leaves something behind ----------------------------------------


@task("culprits.swallow", timeout=1.0)
async def swallow(_: None, context: JobContext) -> None:
    """Ignore each cancellation."""
    note(context)
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue


@task("culprits.spawn")
async def spawn(count: int, context: JobContext) -> int:
    """Leave tasks behind, which wait or fail."""
    note(context)

    async def left(number: int) -> None:
        await asyncio.sleep(0.5 + number % 10)
        raise RuntimeError("planted: nothing waits for this task")

    for number in range(count):
        _left.add(asyncio.create_task(left(number)))
    return count


_left: set[asyncio.Task[None]] = set()
