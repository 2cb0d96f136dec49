"""The plugin: gives any Litestar application the operations layer."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from litestar import Litestar
from litestar.config.app import AppConfig
from litestar.plugins import InitPlugin, ReceiveRoutePlugin
from litestar.routes import BaseRoute, WebSocketRoute
from litestar.types import ASGIApp as LitestarASGIApp

from viralfx.bootstrap import assemble
from viralfx.domain.cache import Cache
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.health import HealthCheck
from viralfx.domain.jobs.service import JobService
from viralfx.domain.operations import Operations
from viralfx.domain.resilience.breaker import CircuitBreaker
from viralfx.domain.resilience.retry import Retrier
from viralfx.domain.shutdown import Phase, ShutdownStage
from viralfx.settings import Settings, read_settings
from viralfx.web.access import AccessPolicy
from viralfx.web.answers import OperationsAnswers
from viralfx.web.asgi import ASGIApp
from viralfx.web.failures import keep_error
from viralfx.web.gate import Gate
from viralfx.web.health import ANSWERS, health_router, is_ours
from viralfx.web.jobs import JOBS, JobsApi
from viralfx.web.watching import RequestWatch

if TYPE_CHECKING:
    from viralfx.bootstrap import PostgresDatabase, RedisClient


@dataclass(slots=True, kw_only=True)
class OperationsConfig:
    """What an application adds to the operations layer, or wants otherwise."""

    settings: Settings | None = None
    """The settings; None reads them from the environment."""
    checks: Mapping[str, HealthCheck] = field(default_factory=dict)
    """The application's own health checks by name. HEALTH_CRITICAL and READINESS_REQUIRES may
    name them like the built-in ones."""
    drain_stages: Mapping[str, ShutdownStage] = field(default_factory=dict)
    """Run together with the draining of requests and jobs, within SHUTDOWN_DRAIN_TIMEOUT."""
    save_stages: Mapping[str, ShutdownStage] = field(default_factory=dict)
    """Run in order after draining, within SHUTDOWN_STATE_TIMEOUT."""
    close_stages: Mapping[str, ShutdownStage] = field(default_factory=dict)
    """Run in order after the application's lifespan ended, within SHUTDOWN_CONNECTION_TIMEOUT."""
    breakers: Sequence[CircuitBreaker] = ()
    """The application's circuit breakers: listed as check ``circuits``, saved and restored."""
    retriers: Sequence[Retrier] = ()
    """The application's retriers, each with a name of its own: their failed attempts are counted,
    and what is left of their budgets is shown."""
    tasks: Sequence[Callable[..., Awaitable[object]]] = ()
    """The application's own functions with ``@task``, beside those of TASK_MODULES."""
    path: str = "/health"
    """Where the endpoints are. Manifests and the ``probe`` command expect the default."""
    metrics_path: str = "/metrics"
    """Where the metrics are, in Prometheus's text format or OpenMetrics."""
    tag: str = "operations"
    """The OpenAPI tag of the endpoints."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a path that is not absolute, ends in a slash, or is taken."""
        for name, path in (("path", self.path), ("metrics_path", self.metrics_path)):
            if not path.startswith("/") or path.endswith("/"):
                raise ValueError(f"{name} must start with a slash and not end with one: {path!r}")
        if f"{self.metrics_path}/".startswith(f"{self.path}/"):
            raise ValueError(f"metrics_path must not be below path: {self.metrics_path!r}")


class OperationsPlugin(InitPlugin, ReceiveRoutePlugin):
    """Adds health endpoints, background checks, correlation ids and shutdown stages to an app.

    It appends and never replaces: no route, error handler, logger or signal of the application is
    touched. Probes and correlation ids are the work of a gate in front of the application's own
    routing. Under ``viralfx serve`` the shutdown is staged with listeners and requests; under any
    other server the application's lifespan runs the stages when it ends.
    """

    __slots__ = ("_app_seen", "_config", "answers", "assembly", "settings")

    def __init__(self, config: OperationsConfig | None = None) -> None:
        """Wire the layer.

        Raises :class:`ConfigurationError` that lists every problem of the settings.
        """
        self._config = config = config or OperationsConfig()
        self.settings = config.settings or read_settings(os.environ)
        self._app_seen = False
        self._wire()

    def _wire(self) -> None:
        config = self._config
        self.assembly = assemble(
            self.settings,
            checks=config.checks,
            breakers=config.breakers,
            retriers=config.retriers,
            tasks=config.tasks,
            stages={
                Phase.DRAIN: config.drain_stages,
                Phase.SAVE_STATE: config.save_stages,
                Phase.CLOSE: config.close_stages,
            },
        )
        self.answers = OperationsAnswers(
            self.assembly.operations,
            AccessPolicy.from_settings(self.settings),
            self.assembly.metrics,
            prefix=config.path,
            metrics_path=config.metrics_path,
        )

    @property
    def operations(self) -> Operations:
        """Lifecycle, monitor and shutdown."""
        return self.assembly.operations

    @property
    def database(self) -> "PostgresDatabase":
        """Postgres: its pool and ``execute_with_retry``. Connected once the application starts.

        Raises :class:`ConfigurationError` without DATABASE_URL.
        """
        if self.assembly.database is None:
            raise ConfigurationError(["DATABASE_URL: not set, so there is no database"])
        return self.assembly.database

    @property
    def redis(self) -> "RedisClient":
        """Redis: redis-py's client and ``get_with_graceful_degradation``.

        Raises :class:`ConfigurationError` without REDIS_HOST and REDIS_SENTINEL_ENABLED.
        """
        if self.assembly.redis is None:
            raise ConfigurationError(["REDIS_HOST: not set, so there is no Redis"])
        return self.assembly.redis

    @property
    def cache(self) -> Cache:
        """A cache with a time to live and one load at a time, in Redis or in memory."""
        return self.assembly.cache

    @property
    def jobs(self) -> JobService:
        """Jobs: accept, look up, retry, cancel. In Postgres or in memory."""
        return self.assembly.jobs.service

    def watch(self) -> RequestWatch:
        """Return what a gate tells of each request."""
        return RequestWatch(self.assembly.metrics.requests, access_log=self.settings.access_log)

    def traced(self, app: ASGIApp) -> ASGIApp:
        """Return what a gate is put in front of: an application whose requests are traced."""
        tracing = self.assembly.tracing
        return app if tracing is None else tracing.requests(app)

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Append routes, a lifespan and a hook for errors to the application's own.

        Raises :class:`ConfigurationError` in a second application: they would share one shutdown.
        """
        if self._app_seen:
            raise ConfigurationError(["OperationsPlugin: each application needs one of its own"])
        self._app_seen = True
        router = health_router(prefix=self._config.path, tag=self._config.tag)
        app_config.route_handlers.append(router)
        app_config.state.update(self._state())
        # Entered last and left first: checks must end before the application closes its pools.
        app_config.lifespan.append(self._lifespan)
        app_config.after_exception.append(keep_error)
        return app_config

    def receive_route(self, route: BaseRoute) -> None:
        """Raise :class:`ConfigurationError` for one of the application's that is ours to answer.

        Litestar would refuse some without a word about whose the other one is; the gate would hide
        the rest. It lets WebSockets through.
        """
        path = self._config.path
        below = route.path == path or route.path.startswith(self.answers.below)
        if not below or isinstance(route, WebSocketRoute) or is_ours(route):
            return
        if self.answers.find(route.path) is not None:
            what = f"OperationsConfig.path: the application answers {route.path} itself"
            raise ConfigurationError([f"{what}; choose another path than {path}"])

    def mount(self, app: Litestar) -> None:
        """Add the endpoints to an application that was made without the plugin.

        For a runner, which does the rest itself. Raises :class:`ConfigurationError` when the
        application answers below the same path already.
        """
        path = self._config.path
        taken = [r.path for r in app.routes if r.path == path or r.path.startswith(f"{path}/")]
        if taken:
            what = f"--app: the application answers {', '.join(sorted(taken))} itself"
            remedy = "give it OperationsPlugin(OperationsConfig(path=...)) with a path that is free"
            raise ConfigurationError([f"{what}; {remedy}"])
        self.require_metrics_path(app)
        app.state.update(self._state())
        app.after_exception.append(keep_error)
        app.register(health_router(prefix=path, tag=self._config.tag))

    def require_metrics_path(self, app: Litestar) -> None:
        """Raise :class:`ConfigurationError` where the application answers at it itself.

        The gate stands ahead of its routing, and would hide that route.
        """
        path = self._config.metrics_path
        if any(route.path == path for route in app.routes):
            what = f"OperationsConfig.metrics_path: the application answers {path} itself"
            raise ConfigurationError([f"{what}; choose another path"])

    def _state(self) -> dict[str, object]:
        jobs, token = self.assembly.jobs, self.settings.api_token
        api = JobsApi(
            service=jobs.service,
            watch=jobs.watch,
            token=None if token is None else token.value.strip().encode(),
            open_without_token=self.settings.environment != "production",
        )
        return {"operations": self.operations, ANSWERS: self.answers, JOBS: api}

    @asynccontextmanager
    async def _lifespan(self, app: Litestar) -> AsyncIterator[None]:
        self.require_metrics_path(app)
        if self.operations.shutdown.triggered and not self.operations.staged:
            # A lifespan once more, as with one test client after another. A shutdown is for good,
            # so what was shut down is made anew.
            self._wire()
            app.state.update(self._state())
        operations = self.operations
        if operations.staged:
            await operations.start()
            yield
            return
        inner = app.asgi_handler
        try:
            await operations.start()
            # No runner put a gate in front of the application, so it gets its own, inside itself.
            gate = Gate(self.answers, self.traced(cast("ASGIApp", inner)), self.watch())
            gate.open = True
            app.asgi_handler = cast("LitestarASGIApp", gate)
            operations.application_ready()
            yield
        finally:
            # Also when the start failed: what it began has to end.
            operations.shutdown.trigger("application lifespan ended")
            await operations.shutdown.run()
            app.asgi_handler = inner
