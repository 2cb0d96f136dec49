"""Example applications of users, for ``viralfx serve --app``."""

import asyncio
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any

from litestar import Litestar, Response, WebSocket, get, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.middleware import ASGIMiddleware
from litestar.params import QueryParameter
from litestar.response import ServerSentEvent, Stream
from litestar.types import ASGIApp, Receive, Scope, Send

from viralfx import HealthCheck, Observation, OperationsConfig, OperationsPlugin, Status

HANDLER_SECONDS = 0.02


@get("/work")
async def work() -> dict[str, bool]:
    """Take 20 ms."""
    await asyncio.sleep(HANDLER_SECONDS)
    return {"done": True}


@get("/slow")
async def slow(seconds: Annotated[float, QueryParameter()]) -> dict[str, bool]:
    """Respond after ``seconds``."""
    await asyncio.sleep(seconds)
    return {"done": True}


@get("/events")
async def events() -> ServerSentEvent:
    """Send events without end and ignore the shutdown."""

    async def endless() -> AsyncIterator[str]:
        number = 0
        while True:
            number += 1
            yield str(number)
            await asyncio.sleep(HANDLER_SECONDS)

    return ServerSentEvent(endless())


@get("/flood")
async def flood() -> ServerSentEvent:
    """Send large events without end, as fast as the client reads them."""

    async def endless() -> AsyncIterator[str]:
        while True:
            yield "x" * 65536

    return ServerSentEvent(endless())


@get("/download")
async def download() -> Stream:
    """Begin an answer of known length and never finish it."""

    async def some() -> AsyncIterator[bytes]:
        yield b"." * 1000
        await asyncio.Event().wait()

    return Stream(some(), headers={"content-length": "200000"})


async def _long_after() -> None:
    await asyncio.Event().wait()


@get("/after")
async def after() -> Response[str]:
    """Send a complete response and continue without end in a background task."""
    return Response("answered", background=BackgroundTask(_long_after))


@get("/bytes")
async def endless_bytes() -> Stream:
    """Send bytes without end: a stream without a protocol."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"."
            await asyncio.sleep(HANDLER_SECONDS)

    return Stream(endless())


@websocket("/socket")
async def echo(socket: WebSocket[object, object, object]) -> None:  # type: ignore[type-var]
    """Echo messages until the client disconnects."""
    await socket.accept()
    while True:
        await socket.send_text(await socket.receive_text())


@get("/block/python")
async def block_in_python() -> None:
    """Block the event loop in the interpreter."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        pass


@get("/block/native")
async def block_in_native_code() -> None:
    """Block the event loop in native code that never checks for signals."""
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)


@get("/crash/task")
async def crash_task() -> None:
    """Start a task that fails and that no caller awaits."""

    async def fail() -> None:
        raise RuntimeError("planted in a task")

    asyncio.get_running_loop().call_soon(asyncio.ensure_future, fail())


@get("/crash/callback")
async def crash_callback() -> None:
    """Schedule a callback of the event loop that fails."""

    def fail() -> None:
        raise RuntimeError("planted in a callback")

    asyncio.get_running_loop().call_soon(fail)


@get("/crash/thread")
async def crash_thread() -> None:
    """Start a thread that fails."""

    def fail() -> None:
        raise RuntimeError("planted in a thread")

    threading.Thread(target=fail, name="planted").start()


@get("/crash/main")
async def crash_main() -> None:
    """Install a handler for SIGUSR1 that fails in the main thread."""

    def fail(_number: int, _frame: FrameType | None) -> None:
        raise RuntimeError("planted in the main thread")

    signal.signal(signal.SIGUSR1, fail)


@get("/drop/{kind:str}")
async def drop_future(kind: str) -> None:
    """Drop a future that fails, without retrieving its exception."""
    error = RuntimeError(f"planted in {kind}")

    async def fail() -> None:
        raise error

    def fail_in_a_thread() -> None:
        raise error

    loop = asyncio.get_running_loop()
    match kind:
        case "gather":
            asyncio.gather(fail())  # type: ignore[unused-awaitable]
        case "executor":
            loop.run_in_executor(None, fail_in_a_thread)  # type: ignore[unused-awaitable]
        case _:
            loop.create_future().set_exception(error)


@get("/imported")
async def imported() -> list[str]:
    """Return which of some optional packages are loaded."""
    return [name for name in ("pydantic", "rich") if name in sys.modules]


@get("/stderr/none")
async def no_stderr() -> None:
    """Close standard error."""
    os.close(2)
    sys.stderr = None


@get("/stderr/full")
async def full_stderr() -> None:
    """Make standard error a full pipe without a reader."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 65536)
    os.set_blocking(writer, True)
    os.dup2(writer, 2)


@get("/child/terminated")
async def terminated_child() -> dict[str, int | None]:
    """Fork a child and terminate it."""
    child = multiprocessing.get_context("fork").Process(target=threading.Event().wait)
    child.start()
    child.terminate()
    await asyncio.to_thread(child.join)
    return {"exitcode": child.exitcode}


@get("/child/kept")
async def kept_child() -> None:
    """Fork a child that lives on."""
    multiprocessing.get_context("fork").Process(target=threading.Event().wait).start()


@get("/quiet")
async def quiet() -> ServerSentEvent:
    """Open an event stream without events."""

    async def nothing() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield "never"

    return ServerSentEvent(nothing())


@get("/thread/stuck")
async def stuck_thread() -> None:
    """Start a non-daemon thread that never ends."""
    threading.Thread(target=threading.Event().wait, name="stuck").start()


HANDLERS = [
    work,
    slow,
    events,
    flood,
    download,
    after,
    endless_bytes,
    echo,
    block_in_python,
    block_in_native_code,
    crash_task,
    crash_callback,
    crash_thread,
    crash_main,
    drop_future,
    imported,
    stuck_thread,
    no_stderr,
    full_stderr,
    terminated_child,
    kept_child,
    quiet,
]


def plain() -> Litestar:
    """Return an application without the plugin."""
    return Litestar(HANDLERS, logging_config=None)


class ScriptedCheck:
    """A check whose behaviour an environment variable selects; it counts its attempts."""

    attempts = 0
    outstanding = 0
    most_outstanding = 0

    async def check(self) -> Observation:
        """Hang, raise, swallow cancellation, or pass, and pass in the first ``PLANTED_PASSES``."""
        cls = type(self)
        cls.attempts += 1
        cls.outstanding += 1
        cls.most_outstanding = max(cls.most_outstanding, cls.outstanding)
        try:
            passes = cls.attempts <= int(os.environ.get("PLANTED_PASSES", "0"))
            match None if passes else os.environ.get("PLANTED_CHECK"):
                case "hang":
                    await asyncio.Event().wait()
                case "raise":
                    raise RuntimeError("planted secret in an exception")
                case "swallow":
                    while True:
                        try:
                            await asyncio.Event().wait()
                        except asyncio.CancelledError:
                            continue
                case _:
                    pass
        finally:
            cls.outstanding -= 1
        return Observation(status=Status.PASS, message="planted check passes")


@get("/attempts")
async def attempts() -> dict[str, int]:
    """Return the numbers of attempts of the planted check."""
    return {
        "attempts": ScriptedCheck.attempts,
        "outstanding": ScriptedCheck.outstanding,
        "mostOutstanding": ScriptedCheck.most_outstanding,
    }


class ScriptedStage:
    """A stage whose behaviour an environment variable selects."""

    async def run(self, budget: float) -> None:  # noqa: ARG002
        """Hang, swallow cancellation, fail, or return."""
        match os.environ.get("PLANTED_STAGE"):
            case "hang":
                await asyncio.Event().wait()
            case "swallow":
                while True:
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        continue
            case "fail":
                raise RuntimeError("planted in a stage")
            case "block":
                time.sleep(600)  # noqa: ASYNC251 - the fault itself
            case _:
                pass


def planted() -> Litestar:
    """Return an application with the plugin, a planted check and a planted stage."""
    checks: dict[str, HealthCheck] = {"planted": ScriptedCheck()}
    plugin = OperationsPlugin(
        OperationsConfig(checks=checks, drain_stages={"planted": ScriptedStage()})
    )
    return Litestar([*HANDLERS, attempts], plugins=[plugin], logging_config=None)


async def _fail() -> None:
    raise RuntimeError("planted in start-up")


async def _hang() -> None:
    await asyncio.Event().wait()


def fails_to_start() -> Litestar:
    """Return an application whose start-up fails."""
    return Litestar(on_startup=[_fail], logging_config=None)


def never_starts() -> Litestar:
    """Return an application whose start-up never ends."""
    return Litestar(on_startup=[_hang], logging_config=None)


def default_logging() -> Litestar:
    """Return an application with Litestar's default logging configuration."""
    return Litestar(HANDLERS, plugins=[OperationsPlugin()])


def _ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def ignores_sigterm() -> Litestar:
    """Return an application that ignores SIGTERM."""
    return Litestar(on_startup=[_ignore_sigterm], logging_config=None)


def fails_to_stop() -> Litestar:
    """Return an application whose shutdown fails."""
    return Litestar(on_shutdown=[_fail], logging_config=None)


class Broken(ASGIMiddleware):
    """Middleware that fails every request."""

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Hang on one path and fail on all others."""
        del receive, send, next_app
        if scope["path"] == "/hang":
            await asyncio.Event().wait()
        raise RuntimeError("planted in middleware")


def broken() -> Litestar:
    """Return an application whose middleware fails every request."""
    return Litestar(
        HANDLERS, middleware=[Broken()], plugins=[OperationsPlugin()], logging_config=None
    )


@get("/health")
async def own_health() -> str:
    """Respond at the path of the plugin."""
    return "mine"


def has_health_itself() -> Litestar:
    """Return an application with its own /health route."""
    return Litestar([own_health], logging_config=None)


not_an_app = {"this": "is a dictionary"}


class Foreign:
    """An application of another framework."""

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        """Be called as all of them are."""


def webhooks() -> Litestar:
    """Return an application that sends a webhook for a client, and has the jobs API."""
    plugin = OperationsPlugin(OperationsConfig(jobs_api=True))

    @post("/webhooks", status_code=202)
    async def send_webhook(data: dict[str, Any]) -> dict[str, str]:
        accepted = await plugin.jobs.submit("notifications.webhook", data)
        return {"id": accepted.job.id}

    return Litestar([send_webhook], plugins=[plugin], logging_config=None)
