"""The operations layer of an application of any framework: its options and its wired services."""

import asyncio
import gc
import inspect
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self
from weakref import WeakSet

from viralfx.bootstrap import assemble
from viralfx.core.errors import ConfigurationError
from viralfx.domain.cache import Cache
from viralfx.domain.health.check_runner import AnyCheck
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import AnyStage, Phase, PhaseStarted, ShutdownEvent
from viralfx.jobs.hooks import TaskHost, TaskMiddleware
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import Task
from viralfx.resilience.breaker import CircuitBreaker
from viralfx.resilience.retry import Retrier
from viralfx.server.interface import ASGIApp, Receive, Scope, Send
from viralfx.settings import CredentialsCallable, Settings, prefixed, read_settings
from viralfx.settings.model import near_miss
from viralfx.telemetry.logging.lines import FactsInMessages
from viralfx.telemetry.metrics import MetricsRegistry, SiblingProcesses
from viralfx.telemetry.tracing import module_of_application, tracing_of
from viralfx.web.auth import AccessPolicy, Authorize
from viralfx.web.client_address import TrustedProxies
from viralfx.web.endpoints import OperationsEndpoints
from viralfx.web.error_log import cause_of
from viralfx.web.gate import Gate
from viralfx.web.in_flight import RequestRecorder, route_of
from viralfx.web.own_module import OwnModule

if TYPE_CHECKING:
    from viralfx.bootstrap import PostgresDatabase, RedisClient


@dataclass(slots=True, kw_only=True)
class OperationsConfig:
    """The application's additions to the operations layer, and its options."""

    settings: Settings | None = None
    """The settings; None reads them from the environment."""
    env_prefix: str = ""
    """Beginning of the names of all variables: with ``OPS_``, DATABASE_URL is OPS_DATABASE_URL, and
    the name without it is not read. Only for settings from the environment. OpenTelemetry's
    variables keep their names."""
    checks: Mapping[str, AnyCheck] = field(default_factory=dict)
    """The application's own health checks by name: objects with a method ``check``, functions, or
    a :class:`CheckConfig` of one of these. A check without ``async`` runs in a thread.
    HEALTH_CRITICAL and READINESS_REQUIRES accept these names, too."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of checks by name of a group; ``{path}/group/{name}`` answers for those checks alone.
    """
    drain_stages: Mapping[str, AnyStage] = field(default_factory=dict)
    """Stages that run while requests and jobs drain, within SHUTDOWN_DRAIN_TIMEOUT."""
    save_stages: Mapping[str, AnyStage] = field(default_factory=dict)
    """Stages that run in order after the drain, within SHUTDOWN_STATE_TIMEOUT."""
    close_stages: Mapping[str, AnyStage] = field(default_factory=dict)
    """Stages that run in order after the application's lifespan has ended, within
    SHUTDOWN_CONNECTION_TIMEOUT."""
    breakers: Sequence[CircuitBreaker] = ()
    """The application's circuit breakers. The check ``circuits`` shows them, and their states are
    saved at shutdown and restored at the next start."""
    retriers: Sequence[Retrier] = ()
    """The application's retriers, each with a unique name. The metrics show their failed attempts
    and the remainder of their budgets."""
    tasks: Sequence[Callable[..., object] | TaskHost] | None = None
    """The application's functions with ``@task``, in addition to those of TASK_MODULES; also a
    ``viralfx.taskiq.LedgerBroker``. None: all that the module which makes the plugin or the
    middleware declares at its top level, before or after it."""
    task_middleware: Sequence[TaskMiddleware] = ()
    """Coroutine functions around each call of a task; the first is the outermost."""
    database_password: CredentialsCallable | None = None
    """Called for each new connection to Postgres, in place of the password of DATABASE_URL and of
    DB_PASSWORD; otherwise as ``redis_credentials``."""
    redis_credentials: CredentialsCallable | None = None
    """Called for each new connection to Redis, in place of REDIS_USERNAME and REDIS_PASSWORD. It
    returns a password, or (user, password). A plain function runs in a thread, so it may block."""
    registries: Sequence[MetricsRegistry] = ()
    """The application's registries of prometheus_client, whose metrics ``metrics_path`` shows, too;
    of two metrics with one name, that of this package, then that of the first registry."""
    authorize: Authorize | None = None
    """Names the caller of a request without a token of MANAGEMENT_TOKEN, API_TOKEN or TOKENS, and
    its rights, from the headers, such as those of a gateway of OIDC; None is an anonymous caller.
    The names are in lower case, and the values of one name are joined by commas. Any client that
    reaches the port sends headers, so the function has to verify them. It runs on the event loop,
    for each request that needs a right. After an exception the caller is anonymous."""
    path: str = "/health"
    """The path of the endpoints. The manifests and the ``probe`` command expect the default."""
    show_payload: Callable[[str, bytes], str | None] | None = None
    """Returns the text of a job's payload or result that readers of the console may see, from the
    name of its task and JSON; None hides it. Without the function all are hidden."""
    metrics_path: str = "/metrics"
    """The path of the metrics, in Prometheus's text format or OpenMetrics."""
    cors_origins: Sequence[str] = ()
    """Origins whose pages may read the endpoints in a browser, such as
    ``https://status.example``; ``*`` is every origin. They may change nothing."""
    tag: str = "operations"
    """The OpenAPI tag of the endpoints."""
    include_in_schema: bool = True
    """Whether the application's OpenAPI document lists the endpoints and the jobs API."""
    jobs_api: bool = False
    """Whether the application serves the jobs API at ``/api/v1``, with the token API_TOKEN. In any
    framework it needs ``viralfx[litestar]``. Production requires a strong token and a database."""
    dependencies: bool = True
    """Whether handlers of Litestar get ``jobs``, ``cache``, ``database`` and ``redis`` as
    dependencies, unless the application has dependencies of these names."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a prefix that has no effect, and for unusable paths.

        A path is absolute, does not end in a slash, and is not in use. One function in place of a
        list of them, a list in place of a mapping, and an asynchronous ``authorize`` are a
        ``TypeError``.
        """
        self._require_kinds()
        if self.env_prefix and self.settings is not None:
            raise ValueError("env_prefix has no effect with settings; pass one of them")
        if self.env_prefix and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.env_prefix):
            raise ValueError(f"env_prefix must be the start of a name: {self.env_prefix!r}")
        for name, path in (("path", self.path), ("metrics_path", self.metrics_path)):
            if not path.startswith("/") or path.endswith("/"):
                raise ValueError(f"{name} must start with a slash and not end with one: {path!r}")
        if f"{self.metrics_path}/".startswith(f"{self.path}/"):
            raise ValueError(f"metrics_path must not be below path: {self.metrics_path!r}")

    def _require_kinds(self) -> None:
        if inspect.iscoroutinefunction(self.authorize):
            raise TypeError("OperationsConfig.authorize takes a function without async")
        for name, value in (("tasks", self.tasks), ("task_middleware", self.task_middleware)):
            if callable(value):
                raise TypeError(
                    f"OperationsConfig.{name} takes a list, as in {name}=[f]: {value!r}"
                )
        for name in ("checks", "groups", "drain_stages", "save_stages", "close_stages"):
            given: object = getattr(self, name)
            if not isinstance(given, Mapping):
                kind = type(given).__name__
                raise TypeError(f"OperationsConfig.{name} takes a mapping by name, not a {kind}")


SECOND_LAYER = (
    "OperationsMiddleware: the application has an operations layer already; keep one, around the"
    " whole application"
)
READS_STRICTLY: ContextVar[bool] = ContextVar("reads_strictly", default=False)
"""Whether the environment is that of a command of this package, which judges unknown names, too."""
LIFESPAN_IN_LAYER: ContextVar[object] = ContextVar("lifespan_in_layer", default=None)
"""The task with the lifespan of an application that is inside an OperationsMiddleware.

Tasks that the application starts inherit the value, and may run other applications.
"""


class OperationsLayer:
    """Checks, endpoints, jobs and shutdown stages of one application; knows no framework.

    Subclasses connect it to an application. By itself it is for processes without an event loop,
    such as those of a WSGI server: there ``jobs.submit_sync()`` needs DATABASE_URL alone.
    """

    __slots__ = (
        "__weakref__",
        "_access_log_is_set",
        "_config",
        "_facts",
        "_module",
        "_own",
        "_own_tasks",
        "_refused",
        "_run_jobs",
        "_siblings",
        "_spans_left",
        "assembly",
        "endpoints",
        "loop",
        "settings",
    )

    def __init__(self, config: OperationsConfig | None = None) -> None:
        """Wire the layer; None uses the default configuration.

        Raises :class:`ConfigurationError` with every problem of the settings, and ``TypeError`` for
        another configuration.
        """
        given: object = config
        if given is not None and not isinstance(given, OperationsConfig):
            raise TypeError(
                f"{self._name} takes an OperationsConfig, such as OperationsConfig(tasks=[...]),"
                f" not {type(given).__qualname__}"
            )
        self._config = config = config or OperationsConfig()
        self._own = own = OwnModule.of(self) if config.tasks is None else None
        self._own_tasks: Callable[[], Sequence[Task]] = tuple if own is None else own.tasks
        self.settings = config.settings or read_settings(
            os.environ,
            env_prefix=config.env_prefix,
            strict=READS_STRICTLY.get(),
            with_api=config.jobs_api,
            with_tasks=bool(config.tasks or self._own_tasks()),
            authorizes=config.authorize is not None,
        )
        # The loader has judged settings of the environment, and not those of the application.
        if config.settings is not None:
            problem = near_miss(self.settings.environment)
            problems = [problem] if problem else []
            if self.settings.in_production:
                judged = self.settings.contradictions(
                    with_api=config.jobs_api, authorizes=config.authorize is not None
                )
                problems = list(judged)
            if problems:
                raise ConfigurationError(problems)
        self._refused = False
        self._run_jobs = True
        self._siblings = SiblingProcesses()
        self._facts = FactsInMessages.from_settings(self.settings)
        self._access_log_is_set = config.settings is not None or self._environment_sets_access_log()
        self._module = module_of_application()
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop of the application's lifespan; None while it does not run."""
        self._wire()
        _created.add(self)

    def load_tasks(self) -> None:
        """Register the tasks that modules have declared since the layer was wired.

        Call it before the start, once the application is imported. Raises
        :class:`ConfigurationError` for tasks that cannot work, and for those of a module in which
        another layer takes them, too.
        """
        self._require_only_taker()
        try:
            self.assembly.jobs.load_late_tasks()
        except ConfigurationError as error:
            prefix = self._config.env_prefix
            raise ConfigurationError(prefixed(line, prefix) for line in error.problems) from None

    def _require_only_taker(self) -> None:
        own = self._own
        if own is None or not own.tasks() or own.name in self.settings.task_modules:
            return
        if not self._has_rival(own):
            return
        gc.collect()  # one that the module has replaced lives until a collection
        if self._has_rival(own):
            names = ", ".join(repr(task.name) for task in own.tasks())
            problem = (
                f"{self._name}: the module {own.name} makes two, and each would take its tasks"
                f" ({names}); name the tasks of each one with OperationsConfig(tasks=[...])"
            )
            raise ConfigurationError([problem])

    def _has_rival(self, own: OwnModule) -> bool:
        """Return whether another layer takes the tasks of this module, too."""
        return any(each is not self and each._takes_tasks_of(own) for each in _created)  # noqa: SLF001 - its own class

    def _takes_tasks_of(self, module: OwnModule) -> bool:
        own = self._own
        if own is None or own.namespace is not module.namespace:
            return False
        # Layers that functions create one after the other, as tests do, are no rivals.
        return self._is_running or (own.at_top_level and self._has_application())

    @property
    def _is_running(self) -> bool:
        """Whether the lifespan of the application runs, and no shutdown has begun."""
        loop = self.loop
        return not (loop is None or loop.is_closed() or self.operations.shutdown.triggered)

    def _has_application(self) -> bool:
        """Return whether the layer is connected to an application; a subclass knows."""
        return False

    def _environment_sets_access_log(self) -> bool:
        variable = f"{self._config.env_prefix}ACCESS_LOG"
        ignored = any(line.startswith(f"{variable}: ignored") for line in self.settings.warnings)
        names = (variable, f"{variable}_FILE")
        return not ignored and any(os.environ.get(name) for name in names)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _wire(self) -> None:
        config = self._config
        self._spans_left: bool | None = None
        traced = tracing_of(self._module)(assemble)
        self.assembly = traced(
            self.settings,
            checks=config.checks,
            groups=config.groups,
            registries=config.registries,
            breakers=config.breakers,
            retriers=config.retriers,
            tasks=config.tasks or (),
            own_tasks=self._own_tasks,
            task_middleware=config.task_middleware,
            database_password=config.database_password,
            redis_credentials=config.redis_credentials,
            env_prefix=config.env_prefix,
            stages={
                Phase.DRAIN: config.drain_stages,
                Phase.SAVE_STATE: config.save_stages,
                Phase.CLOSE: config.close_stages,
            },
        )
        self.endpoints = OperationsEndpoints(
            self.assembly.operations,
            AccessPolicy.from_settings(self.settings, config.authorize),
            self.assembly.metrics,
            prefix=config.path,
            metrics_path=config.metrics_path,
            groups=config.groups,
            cors_origins=config.cors_origins,
            proxies=TrustedProxies.from_settings(self.settings),
            env_prefix=config.env_prefix,
        )
        self.endpoints.add_console(
            self.assembly,
            self.settings,
            path=config.path,
            show_payload=config.show_payload,
        )
        if not self._run_jobs:
            self.assembly.jobs.disable_worker()
        self._connect()

    def __deepcopy__(self, _memo: object) -> Self:
        """Return the layer itself: routers, which Litestar copies, have it in their options."""
        return self

    def _connect(self) -> None:
        """Connect the application to services that were wired just now."""

    def rewire(self, *, run_jobs: bool = True) -> None:
        """Start anew with an empty memory, for a test; the application must not be started.

        Without ``run_jobs`` this process runs no jobs by itself.
        """
        self._run_jobs = run_jobs
        self._wire()

    @property
    def config(self) -> OperationsConfig:
        """The application's additions and options."""
        return self._config

    @property
    def operations(self) -> Operations:
        """The lifecycle, health monitor and shutdown sequence."""
        return self.assembly.operations

    @property
    def database(self) -> "PostgresDatabase":
        """Postgres: the pool and ``execute_with_retry``. It connects when the application starts.

        Raises :class:`ConfigurationError` if DATABASE_URL is not set.
        """
        self._require_use()
        if self.assembly.database is None:
            raise ConfigurationError(["DATABASE_URL: not set, so there is no database"])
        return self.assembly.database

    @property
    def redis(self) -> "RedisClient":
        """Redis: the redis-py client and ``get_with_graceful_degradation``.

        Raises :class:`ConfigurationError` if no Redis is configured.
        """
        self._require_use()
        if self.assembly.redis is None:
            raise ConfigurationError(["REDIS_HOST: not set, so there is no Redis"])
        return self.assembly.redis

    @property
    def cache(self) -> Cache:
        """A cache with a time to live and single-flight loads, in Redis or in memory."""
        self._require_use()
        return self.assembly.cache

    @property
    def jobs(self) -> JobService:
        """The service that accepts, finds, retries and cancels jobs, in Postgres or in memory."""
        self._require_use()
        return self.assembly.jobs.service

    def refuse_use(self) -> None:
        """Make the clients raise :class:`ConfigurationError`: this process never starts them."""
        self._refused = True

    def _require_use(self) -> None:
        if self._refused:
            problem = (
                f"{self._name}: this process does not start it, because it does not know its"
                " application; name that with --app MODULE:NAME"
            )
            raise ConfigurationError([problem])

    def request_recorder(self, *, own_server: bool = True) -> RequestRecorder:
        """Return the recorder of requests for a gate.

        Another server logs each request itself, and an application may. So with ``own_server``
        False, or beside such an application, this package does so only if ACCESS_LOG is set.
        """
        alone = own_server and not self._logs_requests_itself()
        access_log = self.settings.access_log and (alone or self._access_log_is_set)
        return RequestRecorder(self.assembly.metrics.requests, access_log=access_log)

    def traced(self, app: ASGIApp) -> ASGIApp:
        """Return ``app`` with a span for each recorded request, or unchanged without tracing.

        An application that makes these spans itself gets none, if a provider takes its spans.
        """
        tracing = self.assembly.tracing
        if tracing is None:
            return app
        traced = tracing.requests(app, route_of, cause_of)
        if not self._traces_itself():
            return traced
        return self._by_spans(tracing.correlated(app), traced)

    def _by_spans(self, left: ASGIApp, made: ASGIApp) -> ASGIApp:
        """Return an application for one that makes spans of its requests itself.

        Requests go to ``left`` if the layer leaves the spans to the application, else to ``made``.
        The first request decides: the application may set its provider while it starts.
        """

        def serve(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            if scope["type"] != "lifespan" and self._leaves_spans():
                return left(scope, receive, send)
            return made(scope, receive, send)

        return serve

    def _leaves_spans(self) -> bool:
        if self._spans_left is None:
            tracing = self.assembly.tracing
            self._spans_left = tracing is not None and tracing.is_shared
        return self._spans_left

    def _logs_requests_itself(self) -> bool:
        """Return whether the application logs each request; a subclass may know."""
        return False

    def _traces_itself(self) -> bool:
        """Return whether the application makes a span of each request; a subclass may know."""
        return False

    def gate(self, app: ASGIApp, *, own_server: bool = True) -> Gate:
        """Return a gate in front of ``app`` that traces and records its requests.

        ``own_server`` is that of :meth:`request_recorder`.
        """
        recorder = self.request_recorder(own_server=own_server)
        return Gate(self.endpoints, self.traced(app), recorder)

    def register_drain(self, gate: Callable[[], Gate]) -> None:
        """Let the drain announce the shutdown on streams, and wait for requests.

        For a server that is not the runner's, which has stages for both. That server has stopped
        accepting, so no readiness delay is needed. ``gate`` returns the gate in front of the
        application.
        """
        clock, shutdown = self.operations.clock, self.operations.shutdown

        def announce(event: ShutdownEvent) -> None:
            # Before the stages of the drain, one of which ends streams of jobs.
            if isinstance(event, PhaseStarted) and event.phase is Phase.DRAIN:
                requests = gate().requests
                requests.stopping = True
                requests.announce_shutdown()

        shutdown.subscribe(announce)
        shutdown.register(
            Phase.DRAIN, "requests", lambda budget: gate().requests.drain(budget, clock)
        )

    def begin(self) -> None:
        """Prepare the start of the application's lifespan, on its event loop.

        Raises :class:`ConfigurationError` for tasks that cannot work.
        """
        staged = self.operations.staged
        over = self.operations.shutdown.triggered or self.operations.home.is_forked
        if over and not staged:
            # The lifespan starts again, as with several test clients in a row. A shutdown is final,
            # and so is a home loop, which stays with the parent of a forked process.
            self._wire()
        if not staged:  # otherwise the runner did it
            self.load_tasks()
        self.assembly.jobs.require_dependencies()
        self.loop = asyncio.get_running_loop()
        if not staged:
            self._facts.install()
            self._siblings.warn()

    async def end(self) -> None:
        """Run the shutdown stages at the end of the lifespan, also of one that failed to start."""
        self.operations.shutdown.trigger("application lifespan ended")
        await self.operations.shutdown.run()
        self._siblings.close()
        self._facts.remove()
        self.loop = None


_created: "WeakSet[OperationsLayer]" = WeakSet()


def created_layers() -> list[OperationsLayer]:
    """Return the layers of this process that are in use somewhere."""
    return list(_created)


def refuse_layers(*, but: OperationsLayer | None = None) -> bool:
    """Make the layers of this process refuse their use; return True if there is one.

    ``but``: the one that this process starts. Without this a task that uses another one would wait
    for a connection until its timeout, or submit jobs that no worker finds.
    """
    others = [layer for layer in _created if layer is not but]
    for layer in others:
        layer.refuse_use()
    return bool(others)
