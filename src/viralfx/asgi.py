"""The operations layer for any ASGI application, such as one of FastAPI, Starlette or Django.

::

    app = OperationsMiddleware(FastAPI(), OperationsConfig(checks={"shop": ShopCheck()}))

No framework has to be installed for this module.
"""

import asyncio
import logging
import secrets
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeAlias, cast

from viralfx.core.errors import ConfigurationError, ViralFXError, WorkLostError
from viralfx.core.extras import require
from viralfx.domain.shutdown import Phase
from viralfx.server.interface import ERROR, ASGIApp, Message, Receive, Scope, Send
from viralfx.web.error_log import cause_of
from viralfx.web.gate import Gate
from viralfx.web.in_flight import route_of
from viralfx.web.layer import (
    LIFESPAN_IN_LAYER,
    SECOND_LAYER,
    OperationsConfig,
    OperationsLayer,
    created_layers,
)

__all__ = ["AnyApp", "OperationsMiddleware"]

AnyApp: TypeAlias = Callable[..., Awaitable[object]]
"""An ASGI application; frameworks have types of their own for its arguments."""

_logger = logging.getLogger("viralfx.asgi")

_LAYER = "viralfx.layer"
"""The scope key of the middleware that runs the lifespan."""
_JOBS_API = ("/api/v1/jobs", "/api/v1/queues", "/api/v1/schedules")
"""The paths of the jobs API. Others below ``/api/v1`` are the application's."""


class OperationsMiddleware(OperationsLayer):
    """Adds health endpoints, background checks, correlation ids and shutdown stages to an app.

    It is an ASGI application itself, and the outermost one: probes do not pass through the
    application inside. Under ``viralfx serve`` the staged shutdown includes listeners and requests.
    Under any other server the stages run when the server ends the lifespan.
    """

    __slots__ = ("_gate", "_jobs_api", "_lifespans", "app")

    def __init__(self, app: AnyApp, config: OperationsConfig | None = None) -> None:
        """Wire the layer around ``app``; None uses the default configuration.

        Raises :class:`ConfigurationError` with every problem of the settings, and for an
        application that has the layer already, and for ``jobs_api`` without Litestar, on which that
        API runs. Raises ``TypeError`` for another configuration, and for an application that cannot
        be called.
        """
        if not callable(app):
            raise TypeError(f"OperationsMiddleware takes an ASGI application first, not {app!r}")
        if has_layer(app):
            raise ConfigurationError([SECOND_LAYER])
        if isinstance(config, OperationsConfig) and config.jobs_api:
            require("OperationsConfig.jobs_api", "litestar")
        self.app = cast("ASGIApp", app)
        """The application inside."""
        self._gate: Gate | None = None
        self._jobs_api: ASGIApp | None = None
        self._lifespans = 0
        super().__init__(config)

    # A coroutine function, by which servers recognize an application.
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            await _Lifespan(self, scope, receive, send).run()
        elif self.operations.staged:  # the gate of the runner is in front of this object
            await self._serve(scope, receive, send)
        else:
            await self.current_gate(scope, receive, send)

    @property
    def current_gate(self) -> Gate:
        """The gate in front of the application under a server that is not the runner's."""
        if self._gate is None:
            self._gate = self.gate(self._serve, own_server=False)
            # A server sends no request before the start-up, but it may send no lifespan at all.
            self._gate.open = True
            if not self._lifespans:
                _logger.warning(
                    "The server runs no lifespan, so the instance does not become ready and has no"
                    " ordered stop; turn the lifespan on"
                )
        return self._gate

    # Not a coroutine function: one more coroutine costs 1 % of an ordinary request.
    def _serve(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass a request to the jobs API or to the application."""
        served = self.app
        if self._config.jobs_api and scope["type"] == "http":
            path: str = scope["path"].removeprefix(scope.get("root_path", ""))
            if _is_of_jobs_api(path):
                served = self._jobs_api or self._make_jobs_api()
        return served(scope, receive, send)

    def _make_jobs_api(self) -> ASGIApp:
        # Imported late: Litestar need not be installed without this option.
        from viralfx.web.app import create_jobs_api  # noqa: PLC0415

        api = create_jobs_api(self)
        tracing = self.assembly.tracing
        if tracing is not None and self._traces_itself():
            # The application makes the spans of its requests, and gets none of these.
            api = self._by_spans(tracing.requests(api, route_of, cause_of), api)
        self._jobs_api = api
        return api

    def _connect(self) -> None:
        self._gate = self._jobs_api = None

    def _has_application(self) -> bool:
        return True

    def _traces_itself(self) -> bool:
        return any(map(_makes_spans, _parts_of(self.app)))

    def begin(self) -> None:
        """Prepare the start of the application's lifespan, on its event loop.

        Raises :class:`ConfigurationError` for tasks that cannot work, for routes of the application
        that the endpoints hide, and for a second lifespan at the same time.
        """
        if self.loop is not None and not self.operations.staged:
            problem = "OperationsMiddleware: its lifespan runs already"
            remedy = "give each application that runs at the same time its own middleware"
            raise ConfigurationError([f"{problem}; {remedy}"])
        self._lifespans += 1
        self.require_free_paths()
        super().begin()
        if self._config.jobs_api:
            self._make_jobs_api()  # not during the first request

    def require_free_paths(self) -> None:
        """Raise :class:`ConfigurationError` for routes of the application at paths of the layer.

        The gate and the jobs API are in front of the application and would hide them. Only the
        routes of Starlette and FastAPI are found; a route that also takes other paths is no
        conflict.
        """
        routes = getattr(self.app, "routes", None)
        if not isinstance(routes, list | tuple):
            return
        problems: dict[str, None] = {}
        for path in _hidden_by_jobs_api(routes) if self._config.jobs_api else ():
            what = f"OperationsConfig.jobs_api: the application answers {path} itself"
            problems[f"{what}; move that route, or leave the option out"] = None
        for path in self.endpoints.endpoints:
            if any(_serves(route, path) for route in routes):
                metrics = path == self.config.metrics_path
                option = "metrics_path" if metrics else "path"
                what = f"OperationsConfig.{option}: the application answers {path} itself"
                problems[f"{what}; choose another path"] = None
        if problems:
            raise ConfigurationError(list(problems))


def middleware_around(app: object) -> OperationsMiddleware | None:
    """Return the middleware that an application is in; None if there is none."""
    layers = (each for each in created_layers() if isinstance(each, OperationsMiddleware))
    return next((each for each in layers if each.app is app), None)


_INSTRUMENTATION = "OpenTelemetryMiddleware"
"""The class that makes a span of each request, of OpenTelemetry and of newer Starlette."""
_MAX_LAYERS = 20
"""Middleware around one another that is searched; an object may name itself."""


def _parts_of(app: object) -> Iterator[object]:
    """Yield an application, its middleware and the applications inside, where attributes say so."""
    for _ in range(_MAX_LAYERS):
        yield app
        middleware = getattr(app, "user_middleware", None)  # of Starlette
        if isinstance(middleware, list | tuple):
            yield from (getattr(each, "cls", None) for each in middleware)
        app = getattr(app, "asgi_app", None) or getattr(app, "app", None)  # asgi_app is Quart's
        if app is None:
            return


def _makes_spans(part: object) -> bool:
    # By name and by the mark of the instrumentations: importing their classes would need them.
    kind = part if isinstance(part, type) else type(part)
    if kind.__module__.startswith("django."):
        middleware = sys.modules["django.conf"].settings.MIDDLEWARE
        return any(str(each).startswith("opentelemetry.") for each in middleware)
    own = getattr(part, "_telemetry", None)  # of newer FastAPI, which makes spans by itself
    if isinstance(own, dict) and own.get("tracing") is True:
        return True
    marked = getattr(part, "_is_instrumented_by_opentelemetry", False)
    return kind.__name__ == _INSTRUMENTATION or marked is True


def has_layer(app: object) -> bool:
    """Return whether an application is the middleware, or has the plugin."""
    if isinstance(app, OperationsLayer):
        return True
    plugins = getattr(app, "plugins", None)  # Litestar's
    try:
        return any(isinstance(plugin, OperationsLayer) for plugin in plugins or ())
    except TypeError:  # something else of that name
        return False


def _is_of_jobs_api(path: str) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in _JOBS_API)


def _hidden_by_jobs_api(routes: Iterable[object], prefix: str = "") -> Iterator[str]:
    """Yield the templates of routes for HTTP that are at the paths of the jobs API or below them.

    ``prefix``: the path at which the routes are mounted.
    """
    for route in routes:
        # A router that newer FastAPI includes yields its routes, with their whole paths.
        included = getattr(route, "effective_route_contexts", None)
        if callable(included):
            found = [getattr(each, "starlette_route", None) or each for each in included()]
            yield from _hidden_by_jobs_api(found, prefix)
            continue
        path = f"{prefix}{getattr(route, 'path', '')}"
        inner = getattr(route, "routes", None)  # of a mount
        if isinstance(inner, list | tuple) and inner:
            hidden = list(_hidden_by_jobs_api(inner, path))
            yield from [path] if hidden and _is_of_jobs_api(path) else hidden
        # A WebSocket has neither, and the application gets it.
        elif _is_of_jobs_api(path) and (inner is not None or hasattr(route, "methods")):
            yield path


def _serves(route: object, path: str) -> bool:
    """Return whether a route of Starlette serves this path, and does not serve others like it."""
    matches = getattr(route, "matches", None)
    if matches is None:
        return False
    other = f"{path.rpartition('/')[0]}/{secrets.token_hex(8)}"
    # Something else of that name may take other arguments.
    with suppress(Exception):
        return _matches(matches, path) and not _matches(matches, other)
    return False


def _matches(matches: Any, path: str) -> bool:
    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
    return bool(matches(scope)[0].value)


class _Lifespan:
    """One lifespan of an application, in the task in which the server runs it.

    The order is that of ``viralfx serve``: the resources of the layer are open while the
    application starts, and close after it has stopped.
    """

    def __init__(
        self, layer: OperationsMiddleware, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._layer = layer
        self._staged = layer.operations.staged
        self._scope = scope
        self._server_receive = receive
        self._server_send = send
        self._startup: Message | None = None
        self._asked = False
        """Whether the application has received a message, so that it has a lifespan."""
        self._started = False
        """Whether the server knows that the start-up is complete."""
        self._failed = False
        """Whether the server knows that the start-up failed."""
        self._shutdown: Message | None = None
        self._answer: Message | None = None
        """The application's answer to the shutdown."""
        self._may_stop = asyncio.Event()
        self._has_stopped = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self._startup = await self._server_receive()
        if _LAYER in self._scope:
            await self._fail(SECOND_LAYER)
            return
        self._scope[_LAYER] = self._layer
        try:
            self._layer.begin()
        except ConfigurationError as error:
            await self._fail(str(error))
            return
        try:
            await self._start_layer()
        except Exception as error:  # noqa: BLE001 - a stage or a resource of the application
            await self._end_layer()
            await self._fail(_text_of(error))
            return
        except BaseException:  # the server cancelled the lifespan
            await self._end_layer()
            raise
        try:
            await self._run_application()
        except BaseException:
            # The server cancelled the lifespan, or refused a message of it.
            self._has_stopped.set()
            await self._end_layer()
            raise

    async def _start_layer(self) -> None:
        if self._staged:  # the runner does this
            return
        layer, operations = self._layer, self._layer.operations
        layer.register_drain(lambda: layer.current_gate)
        operations.shutdown.register(Phase.CLOSE, "application", self._stop_application, first=True)
        await operations.start()

    async def _run_application(self) -> None:
        error: Exception | None = None
        outer = LIFESPAN_IN_LAYER.set(asyncio.current_task())
        try:
            await self._layer.app(self._scope, self._receive, self._send)
        except Exception as raised:
            if self._failed or (self._answer is not None and self._staged):
                raise  # the server refused the message
            error = raised
        finally:
            LIFESPAN_IN_LAYER.reset(outer)
        if not self._asked:
            error = None  # raised before the first message, so the application has no lifespan
        if self._failed:
            return
        if error is not None and not self._started:
            self._scope[ERROR] = error
            await self._end_layer()
            await self._fail(_text_of(error))
            return
        if error is not None:
            _logger.error("The application's lifespan failed", exc_info=error)
        await self._go_on("complete" if error is None else "failed")
        if self._stopping is not None:
            await self._stopping

    async def _go_on(self, outcome: str) -> None:
        """Go through the rest of the lifespan in place of the application."""
        if not self._asked:
            await self._receive()
        if not self._started:
            await self._send({"type": "lifespan.startup.complete"})
        if self._shutdown is None:
            await self._receive()
        if self._answer is None:
            await self._send({"type": f"lifespan.shutdown.{outcome}"})

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            assert self._startup is not None  # noqa: S101 - narrows for the type checker
            return self._startup
        self._shutdown = await self._server_receive()
        if not self._staged:
            self._stopping = asyncio.create_task(self._stop(), name="application-stop")
            await self._may_stop.wait()
        return self._shutdown

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.complete":
            if not self._staged:
                self._layer.operations.application_ready()
            self._started = True
        elif kind == "lifespan.startup.failed":
            await self._end_layer()
            self._failed = True
        elif kind in {"lifespan.shutdown.complete", "lifespan.shutdown.failed"}:
            self._answer = message
            if not self._staged:
                self._has_stopped.set()  # the server gets the answer after the last stage
                return
        await self._server_send(message)

    async def _stop(self) -> None:
        """Run the shutdown stages, and answer the server, even if the application does not."""
        await self._layer.end()
        answer: Message = {"type": "lifespan.shutdown.complete"}
        await self._server_send(self._answer or answer)

    async def _stop_application(self, _budget: float) -> None:
        self._may_stop.set()
        if self._started:
            await self._has_stopped.wait()
        if self._answer is not None and self._answer["type"] == "lifespan.shutdown.failed":
            raise WorkLostError("the application's own shutdown failed; the log says why")

    async def _end_layer(self) -> None:
        if not self._staged:
            await self._layer.end()

    async def _fail(self, message: str) -> None:
        self._failed = True
        await self._server_send({"type": "lifespan.startup.failed", "message": message})


def _text_of(error: Exception) -> str:
    """Return the text for the server's log, with the traceback of an unexpected error."""
    if isinstance(error, ViralFXError):
        return str(error)
    return "".join(traceback.format_exception(error))
