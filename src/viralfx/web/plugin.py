"""The plugin: gives a Litestar application the operations layer and its commands."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast
from urllib.parse import urlsplit

from litestar import Litestar
from litestar.config.app import AppConfig
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException, WebSocketException
from litestar.plugins import CLIPlugin, InitPlugin, ReceiveRoutePlugin
from litestar.routes import BaseRoute, WebSocketRoute
from litestar.types import ASGIApp as LitestarASGIApp
from litestar.types import Scope as LitestarScope

from viralfx.core.errors import ConfigurationError
from viralfx.server.interface import ERROR, ASGIApp, Message, Receive, Scope, Send
from viralfx.settings import Settings
from viralfx.settings.doctor import plain_environment
from viralfx.telemetry import CLIENT_DISCONNECTED
from viralfx.web.auth import AccessPolicy
from viralfx.web.dependencies import ApplicationDependencies, ClientDependencies
from viralfx.web.error_log import is_client_disconnect, log_request_error
from viralfx.web.gate import Gate
from viralfx.web.jobs.changes import jobs_router
from viralfx.web.jobs.openapi import COMPONENTS, JobsDocument
from viralfx.web.layer import (
    LIFESPAN_IN_LAYER,
    SECOND_LAYER,
    OperationsConfig,
    OperationsLayer,
)
from viralfx.web.routes import (
    health_router,
    is_operations_route,
    with_components,
    with_finish,
    with_management_token,
)

if TYPE_CHECKING:
    import click

_logger = logging.getLogger("viralfx.lifecycle")

_METRICS_PATH_TAKEN = (
    "OperationsConfig.metrics_path: the application answers {} itself; choose another path, or"
    " remove that route and pass its registries, as in registries=[REGISTRY]"
)


_TRACING = frozenset({"OpenTelemetryPlugin", "OpenTelemetryInstrumentationMiddleware"})
"""Parts of Litestar that make a span of each request."""
_LOGGING = frozenset({"LoggingMiddleware"})
"""The part that logs each request; Litestar's plugin for structlog adds it."""

_COMMANDS = {
    "doctor": "check the settings and the dependencies",
    "env": "list every environment variable and its value",
    "jobs": "list, show, submit, retry, cancel and run jobs; list queues and schedules",
    "migrate": "apply the migrations of the database",
}
"""The commands below ``litestar viralfx``."""


class OperationsPlugin(OperationsLayer, InitPlugin, ReceiveRoutePlugin, CLIPlugin):
    """Adds health endpoints, background checks, correlation ids and shutdown stages to an app.

    The plugin adds and never replaces: the application keeps its routes, error handlers, loggers
    and signals. A gate in front of the application's routing answers probes and sets correlation
    ids. Under ``viralfx serve`` the staged shutdown includes listeners and requests. Under any
    other server the stages run at the end of the application's lifespan.
    """

    __slots__ = ("_app", "_clients")

    def __init__(self, config: OperationsConfig | None = None) -> None:
        """Wire the layer; None uses the default configuration.

        Raises :class:`ConfigurationError` with every problem of the settings, and ``TypeError`` for
        another configuration.
        """
        self._app: Litestar | AppConfig | None = None
        self._clients: ClientDependencies | None = None
        super().__init__(config)

    def _connect(self) -> None:
        if self._app is not None:
            self.attach(self._app)
            self.endpoints.serve_below(self._app.path)

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add routes, dependencies, a lifespan and an error hook to the application.

        Raises :class:`ConfigurationError` for a second application while another one runs: both
        would share one shutdown. Applications that run one after the other may share the plugin.
        Raises it for a second plugin in one application, too.
        """
        if sum(isinstance(each, OperationsPlugin) for each in app_config.plugins) > 1:
            raise ConfigurationError(["OperationsPlugin: the application has two; keep one"])
        self._require_one_application(app_config)
        self._app = app_config
        self._connect()
        if self._config.dependencies:
            self._clients = ClientDependencies(self, app_config)
        app_config.route_handlers.append(health_router(self))
        if self._config.jobs_api:
            self._add_jobs_api(app_config)
        if self._declares_token and app_config.openapi_config is not None:
            app_config.openapi_config = with_management_token(app_config.openapi_config)
        # Entered last and exited first: checks must end before the application closes its pools.
        app_config.lifespan.append(self._lifespan)
        app_config.after_exception.append(keep_error)
        return app_config

    def gate(self, app: ASGIApp, *, own_server: bool = True) -> Gate:
        """Return a gate in front of ``app``, which also bounds the caches of Litestar."""
        return super().gate(BoundedCaches(app, lambda: self._app), own_server=own_server)

    def _has_application(self) -> bool:
        return self._app is not None

    def _traces_itself(self) -> bool:
        return self._has_part(_TRACING)

    def _logs_requests_itself(self) -> bool:
        return self._has_part(_LOGGING)

    def _has_part(self, wanted: Collection[str]) -> bool:
        if self._app is None:
            return False
        # By name: Litestar's own classes need packages that may not be installed.
        parts = [*self._app.plugins, *(getattr(m, "middleware", m) for m in self._app.middleware)]
        return any(getattr(each, "__name__", type(each).__name__) in wanted for each in parts)

    def on_cli_init(self, cli: "click.Group") -> None:
        """Add the commands of this package to Litestar's, as ``litestar viralfx doctor``."""
        _add_commands(cli, self._config.env_prefix)

    def _require_one_application(self, app: Litestar | AppConfig) -> None:
        if self.loop is not None and app is not self._app:
            problem = "OperationsPlugin: each application that runs at the same time needs its own"
            raise ConfigurationError([f"{problem}; make a second one for this application"])

    def _add_jobs_api(self, app_config: AppConfig) -> None:
        if app_config.path.strip("/"):
            problem = "OperationsConfig.jobs_api: the jobs API is at /api/v1, and the application"
            remedy = f"is below {app_config.path}; give that path to its routers instead"
            raise ConfigurationError([f"{problem} {remedy}"])
        app_config.route_handlers.append(jobs_router(self))
        if self._config.include_in_schema and app_config.openapi_config is not None:
            document = JobsDocument(lambda: self.assembly.jobs, self.settings.queues)
            completed = with_finish(app_config.openapi_config, document.finish)
            app_config.openapi_config = (
                completed
                if not self.settings.has_api_tokens
                else with_components(completed, COMPONENTS)
            )

    def attach(self, app: Litestar | AppConfig) -> None:
        """Provide the dependencies of ``app`` to tasks."""
        self._app = app
        self.assembly.jobs.calls.provider = ApplicationDependencies(app)

    def receive_route(self, route: BaseRoute) -> None:
        """Raise :class:`ConfigurationError` for an application route that conflicts with ours.

        Litestar rejects some of these without naming the plugin, and the gate would hide the
        others. WebSocket routes do not conflict: the gate passes WebSockets to the application.
        """
        if self._clients is not None:
            self._clients.require_free_names(route)
        metrics_path = self._config.metrics_path
        if route.path == metrics_path and not isinstance(route, WebSocketRoute):
            raise ConfigurationError([_METRICS_PATH_TAKEN.format(metrics_path)])
        path = self._config.path
        below = route.path == path or route.path.startswith(self.endpoints.path_prefix)
        if not below or isinstance(route, WebSocketRoute) or is_operations_route(route):
            return
        if self.endpoints.find(route.path) is not None:
            what = f"OperationsConfig.path: the application answers {route.path} itself"
            raise ConfigurationError([f"{what}; choose another path than {path}"])

    def mount(self, app: Litestar) -> None:
        """Add the endpoints to an application that was created without the plugin.

        The caller starts the operations layer. Raises :class:`ConfigurationError` if the
        application already has routes at the path or below it.
        """
        path = self._config.path
        conflicts = [r.path for r in app.routes if r.path == path or r.path.startswith(f"{path}/")]
        if conflicts:
            what = f"--app: the application answers {', '.join(sorted(conflicts))} itself"
            remedy = "add OperationsPlugin(OperationsConfig(path=...)) with an unused path to it"
            raise ConfigurationError([f"{what}; {remedy}"])
        self.require_metrics_path(app)
        self.attach(app)
        # The settings are not the application's choice: the command has read the environment.
        self._access_log_is_set = self._environment_sets_access_log()
        app.after_exception.append(keep_error)
        if self._declares_token and app.openapi_config is not None:
            declared = with_management_token(app.openapi_config)
            app.openapi_config.components = declared.components
        app.register(health_router(self))

    @property
    def _declares_token(self) -> bool:
        return AccessPolicy.from_settings(self.settings).has_tokens

    def require_metrics_path(self, app: Litestar) -> None:
        """Raise :class:`ConfigurationError` if the application has a route at ``metrics_path``.

        The gate is in front of the application's routing and would hide that route.
        """
        path = self._config.metrics_path
        if any(route.path == path for route in app.routes):
            raise ConfigurationError([_METRICS_PATH_TAKEN.format(path)])

    @asynccontextmanager
    async def _lifespan(self, app: Litestar) -> AsyncIterator[None]:
        if LIFESPAN_IN_LAYER.get() is asyncio.current_task():
            # Its probes would hide those of the plugin, and the checks behind them.
            raise ConfigurationError([SECOND_LAYER])
        self.require_metrics_path(app)
        try:
            self._require_one_application(app)
            self._app = app
            self._connect()
            self.begin()
        except ConfigurationError as error:
            # Litestar raises it in a group of exceptions, whose text names no reason.
            _logger.error("%s", error)  # noqa: TRY400 - the traceback says nothing more
            raise
        operations = self.operations
        if operations.staged:
            await operations.start()
            yield
            return
        inner = app.asgi_handler
        # Without a runner there is no gate yet, so the gate becomes the innermost wrapper.
        gate = self.gate(cast("ASGIApp", inner), own_server=False)
        gate.open = True
        # Litestar calls the hooks after it has entered the lifespans, and they belong to the start.
        ready = operations.application_ready
        app.on_startup = [*app.on_startup, ready]
        try:
            self.register_drain(lambda: gate)
            await operations.start()
            app.asgi_handler = cast("LitestarASGIApp", gate)
            yield
        finally:
            app.on_startup = [hook for hook in app.on_startup if hook != ready]
            # This also ends the parts that a failed start has begun.
            await self.end()
            app.asgi_handler = inner


_LONG = 256
"""Length of the texts of one request from which they count; 1024 shorter ones take a few MiB."""
_MAX_LONG_BYTES = 64 * 1024
"""Total length of long texts in the caches. Parsed, a query takes forty times its length."""
_CACHED = frozenset({b"cookie", b"host", b"origin"})
_BODY = frozenset({b"content-length", b"transfer-encoding"})
_WITHOUT_BODY = frozenset({"GET", "HEAD"})
_Cache = type(lru_cache(str))


class BoundedCaches:
    """ASGI middleware that bounds the memory of Litestar's caches, which clients fill.

    Litestar caches paths, queries, cookies, forms and URLs with the values that it has parsed from
    them, up to 1024 of each kind, of any length. So the caches are emptied when they may hold more
    than 64 KiB of long ones.
    """

    __slots__ = ("_app", "_held", "_litestar")

    def __init__(self, app: ASGIApp, litestar: Callable[[], object]) -> None:
        """``litestar`` returns the application whose router has a cache of its own."""
        self._app = app
        self._litestar = litestar
        self._held = 0

    # Not async: one more coroutine would cost 1 % of an ordinary request.
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            return self._app(scope, receive, send)
        size = len(scope["path"]) + len(scope.get("query_string", b""))
        has_body = scope.get("method", "GET") not in _WITHOUT_BODY
        for name, value in scope["headers"]:
            if name in _CACHED:
                size += len(value)
            elif name in _BODY:
                has_body = True
        # A handler may parse a body as a form with any Content-Type.
        if has_body or size > _LONG:
            return self._serve(scope, receive, send, size)
        return self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, size: int) -> None:
        async def receive_part() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message

        # Before it, too: it may last long, as an event stream does.
        self._count(size)
        try:
            await self._app(scope, receive_part, send)
        finally:
            self._count(size)

    def _count(self, size: int) -> None:
        self._held += size if size > _LONG else 0
        if self._held > _MAX_LONG_BYTES:
            self._held = 0
            for cache in [*_module_caches(len(sys.modules)), urlsplit]:
                cache.cache_clear()
            router = getattr(self._litestar(), "asgi_router", None)
            if isinstance(cache := getattr(router, "handle_routing", None), _Cache):
                cache.cache_clear()


@lru_cache(maxsize=1)
def _module_caches(_modules: int) -> list[Any]:
    """Return the caches of Litestar's modules and their classes; their names are not public.

    Litestar imports some modules late, so the result holds for a number of imported modules.
    """
    found: list[object] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "litestar":
            for each in vars(module).values():
                found += [each, *(vars(each).values() if isinstance(each, type) else ())]
    plain = (each.__func__ if isinstance(each, classmethod) else each for each in found)
    caches = {id(each): each for each in plain if isinstance(each, _Cache)}
    return [each for each in caches.values() if each.__module__.startswith("litestar.")]


def plugin_of(
    app: object, settings: Settings, tasks: Sequence[Callable[..., object]] = ()
) -> tuple[OperationsPlugin, bool]:
    """Return the plugin of a Litestar application, and whether it was added.

    An application without one gets one with ``settings`` and ``tasks``. Raises
    :class:`ConfigurationError` if routes of the application conflict with the endpoints.
    """
    assert isinstance(app, Litestar)  # noqa: S101 - narrows for the type checker
    found = next((each for each in app.plugins if isinstance(each, OperationsPlugin)), None)
    plugin = found or OperationsPlugin(OperationsConfig(settings=settings, tasks=tasks))
    if found is None:
        plugin.mount(app)
    plugin.require_metrics_path(app)
    plugin.attach(app)
    return plugin, found is None


async def keep_error(error: Exception, scope: LitestarScope) -> None:
    """Store an error in the scope until the status of the response is known; a Litestar hook.

    Litestar by itself logs errors only in debug mode. A WebSocket has no response, so its error is
    logged immediately.
    """
    if is_client_disconnect(error):
        scope[CLIENT_DISCONNECTED] = True  # type: ignore[literal-required]
        return
    if _logs_itself(scope["litestar_app"]):
        return
    if scope["type"] == ScopeType.WEBSOCKET:
        if not isinstance(error, HTTPException | WebSocketException):
            log_request_error(error, "WEBSOCKET", scope["path"])
        return
    scope[ERROR] = error  # type: ignore[literal-required]  # a server's own keys are allowed


def _logs_itself(app: Litestar) -> bool:
    config = app.logging_config
    when = None if config is None or app.logger is None else config.log_exceptions
    return when == "always" or (when == "debug" and app.debug)


def _add_commands(cli: "click.Group", env_prefix: str) -> None:
    """Add the commands to Litestar's; ``env_prefix`` is that of the plugin's settings."""
    import click  # noqa: PLC0415 - only Litestar's command line loads it

    def command(name: str, text: str) -> click.Command:
        @click.pass_context
        def run(context: click.Context, arguments: tuple[str, ...]) -> NoReturn:
            environ = plain_environment(os.environ, env_prefix)
            # The application that Litestar's command has found, and the folder that it is in.
            found: Any = context.obj
            folder = str(getattr(found, "cwd", Path.cwd()))
            environ["PYTHONPATH"] = os.pathsep.join(
                filter(None, (folder, environ.get("PYTHONPATH")))
            )
            given = [name, *arguments]
            takes_app = name == "doctor" or given[:2] in (["jobs", "submit"], ["jobs", "run"])
            if takes_app and not any(each.partition("=")[0] == "--app" for each in arguments):
                given += ["--app", str(found.app_path)]
            sys.stdout.flush()
            # In place of this process: signals, exit codes and terminal are the command's own.
            os.execve(sys.executable, [sys.executable, "-m", "viralfx", *given], environ)  # noqa: S606

        return click.Command(
            name,
            callback=run,
            short_help=text,
            add_help_option=False,  # the command itself answers --help
            context_settings={"ignore_unknown_options": True},
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        )

    group = click.Group("viralfx", help="Operate the application: doctor, migrations, jobs.")
    for name, text in _COMMANDS.items():
        group.add_command(command(name, text))
    cli.add_command(group)
