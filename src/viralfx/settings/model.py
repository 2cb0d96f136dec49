"""All settings, each with its type, limits, default and meaning."""

from collections.abc import Collection, Iterable, Iterator
from enum import IntEnum
from ipaddress import ip_address, ip_network
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from viralfx.core.errors import edits
from viralfx.core.extras import is_set
from viralfx.domain.shutdown import ShutdownBudgets
from viralfx.domain.webhooks.signature import WebhookKeys, parse_receiver_keys, parse_secrets
from viralfx.domain.webhooks.url import AllowList, WebhookRefusedError
from viralfx.settings.dsn import DatabaseAddress, parse_database_url
from viralfx.settings.groups import (
    DatabaseSettings,
    Duration,
    HttpSettings,
    JobSettings,
    Modules,
    Names,
    Networks,
    Port,
    PositiveDuration,
    RedisSettings,
    Retention,
    Secret,
    Threshold,
    WebhookSettings,
    meaning,
    milliseconds,
)
from viralfx.settings.platform import POD_READINESS_DELAY
from viralfx.settings.strength import REMEDY, weaknesses
from viralfx.settings.tokens import API, MAX_SECRETS, VARIABLES, Token, TokenBook

DATABASE_URLS = ("DATABASE_URL", "DATABASE_MIGRATION_URL", "DATABASE_LISTEN_URL")
"""Variables that hold the address of a database."""

LOG_LEVELS = {
    "info": "log",
    "warning": "warn",
    "critical": "error",
    "fatal": "error",
    "trace": "verbose",
    "notset": "verbose",
}
"""Words of other loggers for the values of LOG_LEVEL."""

CONSOLE_WORDS = {"1": "true", "0": "false"}
"""Other words for the values of CONSOLE."""

SHAPES = {
    "DB_SCHEMA": "a name of lower-case letters, digits and underscores",
    "REDIS_HOST": "the name or address of a host alone; set the rest separately:"
    " REDIS_PORT, REDIS_USERNAME, REDIS_PASSWORD, REDIS_DB, REDIS_TLS_ENABLED",
    "REDIS_SOCKET": "an absolute path",
}
"""Allowed values of the variables with a pattern, in words."""

Queues = tuple[
    Annotated[
        str,
        Meta(
            pattern=r"^[a-z][a-z0-9_-]*(:([1-9][0-9]{0,2}|1000))?$",
            examples=["default:20,notifications:5"],
        ),
    ],
    ...,
]

WORKER_MANAGEMENT_PORT = 3001
"""Default port of the management server of `viralfx worker`."""


OPEN_ENVIRONMENTS = ("development", "test")
"""The values of ENVIRONMENT that open endpoints without a token; all others are production."""
_KNOWN_ENVIRONMENTS = (*OPEN_ENVIRONMENTS, "production")
_SHORT_FORMS = {
    **dict.fromkeys(("dev", "devel", "develop", "developing"), "development"),
    **dict.fromkeys(("testing", "tests", "tst"), "test"),
    **dict.fromkeys(("prod", "prd", "product"), "production"),
}


_WIDEST_NETWORK_OF_PROXIES = {4: 8, 6: 16}
"""The shortest prefix of TRUSTED_PROXIES, by version of IP: no two such networks are everyone."""


class Exposure(IntEnum):
    """The callers that need no token at an endpoint; a higher one includes the lower ones."""

    CLOSED = 0
    """No caller."""
    MACHINE = 1
    """Callers on this machine, by a loopback address or a Unix socket."""
    OPEN = 2
    """Each caller that reaches the port."""


def near_miss(environment: str) -> str | None:
    """Return the problem of an ENVIRONMENT that is probably meant to be a known word."""
    if environment in _KNOWN_ENVIRONMENTS:
        return None
    text = environment.strip().lower()
    meant = _SHORT_FORMS.get(text)
    for known in _KNOWN_ENVIRONMENTS:
        # In a word as short as `test`, two edits make another word of it.
        limit = 2 if len(known) > len("testing") else 0
        if meant is None and edits(text, known, limit=limit) <= limit:
            meant = known
    if meant is None:
        return None
    return (
        f"ENVIRONMENT: {environment!r} is not {meant}; did you mean {meant}? Any other word has the"
        " rules of production"
    )


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach a listener at an address."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


def show(value: object) -> str:
    """Format a value as in the environment: durations in milliseconds, a secret as ``***``."""
    match value:
        case None:
            return ""
        case Secret():
            return "***"
        case bool():
            return str(value).lower()
        case float():
            return str(milliseconds(value))
        case tuple():
            return ",".join(value) or "none"
        case _:
            return str(value)


def _named(variable: str, secret: Secret | None) -> str:
    """Return the variable that was set for a secret: the one of its file, if it came from one."""
    return variable if secret is None or secret.file is None else f"{variable}_FILE"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings. A field's name in capitals is its environment variable.

    ``http``, ``db``, ``redis``, ``job`` and ``webhook`` are groups: the variable of a field in a
    group begins with the name of the group. Durations are in seconds; variables have milliseconds.
    """

    host: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        meaning(
            "Address the ports listen on; unset: 127.0.0.1 in development, elsewhere and with"
            " ALLOW_OPEN_API all addresses"
        ),
    ] = None
    port: Annotated[Port, meaning("Port of the API; 0: any free port")] = 3000
    management_port: Annotated[
        Port | None,
        meaning(
            "Second port for health and shutdown, which closes last; unset: none,"
            f" or {WORKER_MANAGEMENT_PORT} for `viralfx worker`"
        ),
    ] = None
    management_token: Annotated[
        Secret | None,
        meaning(
            "Token of the console, and bearer token for /health/shutdown and for"
            " HEALTH_DETAILS=authorized; two, separated by a space, during a rotation"
        ),
    ] = None
    api_token: Annotated[
        Secret | None,
        meaning(
            "Bearer token for the jobs API, or two during a rotation; unset: open access, which"
            " ALLOW_OPEN_API must allow beyond this machine"
        ),
    ] = None
    tokens: Annotated[
        Secret | None,
        meaning(
            "More tokens with names and rights, one to a line or between `;`: NAME RIGHTS SECRET"
            " [SECRET]"
        ),
    ] = None
    allow_open_api: Annotated[
        bool,
        meaning(
            "Serve the jobs API without API_TOKEN, and in production the details, metrics and API"
            " document without a token"
        ),
    ] = False
    console: Annotated[
        Literal["true", "false", "management"] | None,
        meaning(
            "Ports with the operations console at /health/ui: true for all, false for none, or"
            " management; unset: management in production with MANAGEMENT_PORT, else all; in"
            " production it needs a token"
        ),
    ] = None
    console_max_streams: Annotated[
        int,
        Meta(ge=1, le=10_000),
        meaning("Open event streams of the console per process; pages beyond it ask every 5 s"),
    ] = 100
    runbook_url: Annotated[
        str | None,
        meaning("Address of your copy of docs/runbook.md, for links in the console"),
    ] = None
    trusted_proxies: Annotated[
        Networks,
        meaning(
            "Addresses and networks of proxies whose X-Forwarded-For, Forwarded and"
            " X-Forwarded-Proto count; none: those of every peer are ignored"
        ),
    ] = ()
    http: HttpSettings = HttpSettings()
    environment: Annotated[
        str,
        Meta(min_length=1),
        meaning(
            "Name of the environment; each one but `development` and `test` has the rules of"
            " `production`"
        ),
    ] = "development"
    revision: Annotated[
        str | None, meaning("Commit of the code, shown by /health/info; the image sets it")
    ] = None
    allow_memory_adapters: Annotated[bool, meaning("Allow memory adapters in production")] = False
    log_level: Annotated[
        Literal["error", "warn", "log", "debug", "verbose"],
        meaning("Minimum log level; Python's words are accepted too: info is log, warning is warn"),
    ] = "log"
    log_format: Annotated[
        Literal["json", "console"],
        meaning("json: one JSON object per line; console: human-readable"),
    ] = "json"
    access_log: Annotated[
        bool,
        meaning("Log one line for each request; under another server, only if this is set"),
    ] = True
    audit_retention: Annotated[
        Retention,
        meaning("Time for which events of the audit trail are kept; 0: they are never deleted"),
    ] = 7_776_000.0
    heap_snapshot_dir: Annotated[
        str | None,
        meaning("Folder for heap reports at SIGUSR2; unset: the temporary folder"),
    ] = None
    loop_stall_threshold: Annotated[
        Duration,
        meaning("Time after which a blocked event loop is logged with its stack; 0: never"),
    ] = 0.5
    state_dir: Annotated[
        str | None,
        meaning("Folder of state.json; unset: state is kept in the database or in memory"),
    ] = None
    queues: Annotated[
        Queues,
        Meta(min_length=1),
        meaning("Names of the job queues, `name:5` with a concurrency; else JOB_CONCURRENCY"),
    ] = ("default", "notifications", "analytics")
    task_modules: Annotated[Modules, meaning("Modules that define tasks with @task")] = ()
    alert_webhook_url: Annotated[
        Secret | None,
        meaning("URL to which changes of health are sent; unset: none are sent"),
    ] = None
    alert_webhook_secret: Annotated[
        Secret | None,
        meaning("Signing key of alerts (whsec_...); unset: derived from WEBHOOK_SECRET"),
    ] = None

    database_url: Annotated[
        Secret | None,
        meaning("Address: postgresql://user:password@host:5432/database; unset: memory"),
    ] = None
    database_migration_url: Annotated[
        Secret | None,
        meaning("Address for `viralfx migrate`, past a pooler; unset: DATABASE_URL"),
    ] = None
    database_listen_url: Annotated[
        Secret | None,
        meaning("Address to LISTEN at, past a pooler in transaction mode; unset: DATABASE_URL"),
    ] = None
    pool_profile: Annotated[
        Literal["small", "medium", "large"],
        meaning("Pool size if DB_POOL_MIN and DB_POOL_MAX are not set"),
    ] = "small"
    db: DatabaseSettings = DatabaseSettings()
    redis: RedisSettings = RedisSettings()
    job: JobSettings = JobSettings()
    webhook: WebhookSettings = WebhookSettings()

    health_check_interval: Annotated[
        PositiveDuration, meaning("Time between two runs of a check")
    ] = 5.0
    health_check_timeout: Annotated[
        PositiveDuration, meaning("Time limit of a run of a check, after which it fails")
    ] = 2.0
    health_failure_threshold: Annotated[
        Threshold, meaning("Consecutive worse results before the status of a check gets worse")
    ] = 1
    health_recovery_threshold: Annotated[
        Threshold, meaning("Consecutive better results before the status of a check improves")
    ] = 1
    health_critical: Annotated[
        Names, meaning("Checks whose failure makes the service unhealthy")
    ] = ("database", "memory")
    health_details: Annotated[
        Literal["always", "authorized"] | None,
        meaning(
            "Access to details and metrics: all clients or the token; unset: all on MANAGEMENT_PORT"
            " and with ALLOW_OPEN_API, those of this machine in development"
        ),
    ] = None
    readiness_requires: Annotated[Names, meaning("Checks that must pass for readiness")] = (
        "database",
    )
    readiness_fail_open_after: Annotated[
        Duration,
        meaning("Ready again after shared dependencies failed for so long; 0: never"),
    ] = 0.0

    shutdown_readiness_delay: Annotated[
        Duration,
        meaning(
            "Time between failing readiness and closing the listeners;"
            f" unset in Kubernetes: {milliseconds(POD_READINESS_DELAY)}"
        ),
    ] = 0.0
    shutdown_drain_timeout: Annotated[
        Duration, meaning("Budget for finishing requests and jobs in flight")
    ] = 30.0
    shutdown_state_timeout: Annotated[Duration, meaning("Budget for saving state")] = 5.0
    shutdown_connection_timeout: Annotated[Duration, meaning("Budget for closing connections")] = (
        15.0
    )
    shutdown_force_timeout: Annotated[
        PositiveDuration,
        meaning("Time from the trigger after which the process is forced to exit"),
    ] = 60.0
    shutdown_grace_period: Annotated[
        PositiveDuration | None,
        meaning("Time from SIGTERM to SIGKILL that the platform grants; unset: unknown"),
    ] = None
    shutdown_on_uncaught: Annotated[
        bool, meaning("Shut down after an uncaught exception; false: only log it")
    ] = True

    warnings: tuple[str, ...] = ()
    """Parts of the environment without the intended effect, one line each. No variable sets it."""
    queue_concurrency: tuple[tuple[str, int], ...] = ()
    """The queues with a number in QUEUES, and these numbers. No variable sets it."""

    def __post_init__(self) -> None:
        """Separate the numbers of ``queues`` from the names, and take CONSOLE as a word."""
        if self.console is not None:  # an application may pass a bool
            msgspec.structs.force_setattr(self, "console", str(self.console).lower())
        if any(":" in entry for entry in self.queues):
            parts = [entry.partition(":") for entry in self.queues]
            numbers = tuple((name, int(number)) for name, _, number in parts if number)
            names = tuple(name for name, _, _ in parts)
            msgspec.structs.force_setattr(self, "queue_concurrency", numbers)
            msgspec.structs.force_setattr(self, "queues", names)

    @property
    def queue_entries(self) -> tuple[str, ...]:
        """The entries of QUEUES, with their numbers."""
        numbers = dict(self.queue_concurrency)
        return tuple(f"{name}:{numbers[name]}" if name in numbers else name for name in self.queues)

    def concurrency_of(self, queues: Iterable[str]) -> dict[str, int]:
        """Return how many jobs of each queue a worker runs at once."""
        numbers = dict(self.queue_concurrency)
        return {name: numbers.get(name, self.job.concurrency) for name in queues}

    @property
    def in_production(self) -> bool:
        """True unless ENVIRONMENT is exactly ``development`` or ``test``."""
        return self.environment not in OPEN_ENVIRONMENTS

    @property
    def listen_host(self) -> str:
        """The address that the ports listen on."""
        if self.host is not None:
            return self.host
        everywhere = self.in_production or self.allow_open_api
        return "0.0.0.0" if everywhere else "127.0.0.1"  # noqa: S104 - a pod's address

    @property
    def token_book(self) -> TokenBook:
        """All tokens. Raises ``ValueError`` if TOKENS is invalid."""
        return TokenBook.of(self.tokens, management=self.management_token, api=self.api_token)

    @property
    def has_api_tokens(self) -> bool:
        """True if the jobs API needs a token because there is one for it."""
        return self.api_token is not None or self.tokens is not None

    @property
    def api_exposure(self) -> Exposure:
        """The callers of the jobs API that need no token, if there is none for it."""
        if self.allow_open_api:
            return Exposure.OPEN
        return Exposure.CLOSED if self.in_production else Exposure.MACHINE

    def details_exposure(self, *, on_management_port: bool = False) -> Exposure:
        """Return the callers of details and metrics that need no token at a port."""
        if self.health_details is not None:
            return Exposure.OPEN if self.health_details == "always" else Exposure.CLOSED
        return Exposure.OPEN if on_management_port else self.api_exposure

    @property
    def needs(self) -> Iterator[tuple[str, str]]:
        """The variables that are set and need an extra of the distribution, and that extra."""
        database = _named("DATABASE_URL", self.database_url)
        if self.database_url is not None:
            yield is_set(database), "postgres"
        if self.redis.in_use:
            redis = self._redis_variable
            yield is_set(redis), "redis"
            if self.database_url is not None:
                yield is_set(redis, database), "jobs"
        if self.webhook.allowed_hosts:
            yield is_set("WEBHOOK_ALLOWED_HOSTS"), "webhooks"
        if self.alert_webhook_url is not None:
            yield is_set(_named("ALERT_WEBHOOK_URL", self.alert_webhook_url)), "webhooks"

    @property
    def _redis_variable(self) -> str:
        if self.redis.url is not None:
            return _named("REDIS_URL", self.redis.url)
        if self.redis.sentinel_enabled:
            return "REDIS_SENTINEL_ENABLED"
        return "REDIS_HOST" if self.redis.socket is None else "REDIS_SOCKET"

    @property
    def worker_management_port(self) -> int:
        """Port of the management server of a worker."""
        return WORKER_MANAGEMENT_PORT if self.management_port is None else self.management_port

    @property
    def shutdown_budgets(self) -> ShutdownBudgets:
        """The shutdown times in seconds. Raises ``ValueError`` when they do not fit."""
        return ShutdownBudgets(
            readiness_delay=self.shutdown_readiness_delay,
            drain=self.shutdown_drain_timeout,
            state=self.shutdown_state_timeout,
            connections=self.shutdown_connection_timeout,
            force=self.shutdown_force_timeout,
        )

    @property
    def database_address(self) -> DatabaseAddress | None:
        """The parsed DATABASE_URL; None if unset. Raises ``ValueError`` if it is invalid."""
        return None if self.database_url is None else parse_database_url(self.database_url.value)

    @property
    def database_listen_address(self) -> DatabaseAddress | None:
        """The parsed DATABASE_LISTEN_URL, as :attr:`database_address`."""
        url = self.database_listen_url
        return None if url is None else parse_database_url(url.value)

    @property
    def database_migration_address(self) -> DatabaseAddress | None:
        """The parsed DATABASE_MIGRATION_URL, as :attr:`database_address`."""
        url = self.database_migration_url
        return None if url is None else parse_database_url(url.value)

    def contradictions(
        self,
        failed: Collection[str] = (),
        *,
        with_api: bool = False,
        listens: bool = False,
        judge_environment: bool = True,
        authorizes: bool = False,
    ) -> Iterator[str]:
        """Yield contradictions between values that are valid one by one.

        Variables in ``failed`` were invalid, so contradictions that involve them are skipped.
        ``with_api``: the process serves the jobs API. ``listens``: it does so at ``listen_host``;
        another server has an address of its own. Without ``judge_environment`` an ENVIRONMENT that
        is close to a known word is no problem. ``authorizes``: a function of the application names
        the callers, so the jobs API needs no token.
        """
        if judge_environment and (problem := near_miss(self.environment)):
            yield problem
        for variables, problem in self._contradictions():
            if variables.isdisjoint(failed):
                yield problem
        if self.in_production:
            if with_api or self.task_modules:
                yield from self.jobs_in_memory(failed)
            yield from self._open_in_production(failed, with_api=with_api, authorizes=authorizes)
        elif (
            with_api
            and listens
            and not (self.has_api_tokens or authorizes)
            and not (self.allow_open_api or is_loopback(self.listen_host))
        ):
            yield (
                f"API_TOKEN: HOST={self.listen_host} serves a jobs API without a token to other"
                " machines; set API_TOKEN, or HOST=127.0.0.1, or ALLOW_OPEN_API=true to accept"
                " jobs from all of them"
            )

    def _open_in_production(
        self, failed: Collection[str], *, with_api: bool, authorizes: bool
    ) -> Iterator[str]:
        missing = with_api and not (self.has_api_tokens or self.allow_open_api or authorizes)
        if missing and {"API_TOKEN", "TOKENS", "ALLOW_OPEN_API"}.isdisjoint(failed):
            yield (
                f"API_TOKEN: ENVIRONMENT={self.environment} refuses a jobs API without a token; set"
                " it"
            )
        used = (each for each in self._tokens() if with_api or each.principal.name != API.name)
        for name, problem in weaknesses(used):
            variable = VARIABLES.get(name)
            refused = "a token that" if variable else f"the token of {name}, which"
            yield (
                f"{variable or 'TOKENS'}: ENVIRONMENT={self.environment} refuses {refused}"
                f" {problem}; {REMEDY}"
            )

    def _tokens(self) -> tuple[Token, ...]:
        try:
            return self.token_book.tokens
        except ValueError:  # reported with the contradictions
            return ()

    def _invalid_tokens(self) -> Iterator[tuple[frozenset[str], str]]:
        for variable, secret in (
            ("MANAGEMENT_TOKEN", self.management_token),
            ("API_TOKEN", self.api_token),
        ):
            count = 0 if secret is None else len(secret.value.split())
            if count > MAX_SECRETS:
                problem = f"holds {count} tokens, which white space separates"
                remedy = f"keep at most {MAX_SECRETS}, the new one and the old one"
                yield frozenset({variable}), f"{variable}: {problem}; {remedy}"
        try:
            TokenBook.of(self.tokens)
        except ValueError as error:
            for line in str(error).splitlines():
                yield frozenset({"TOKENS"}), f"TOKENS: {line}"

    def _contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        yield from self._invalid_tokens()
        try:
            _ = self.shutdown_budgets
        except ValueError as error:
            yield (
                _BUDGETS,
                f"SHUTDOWN_FORCE_TIMEOUT: {error}; raise it, or lower a budget",
            )
        if (grace := self.shutdown_grace_period) and grace <= self.shutdown_force_timeout:
            yield (
                _BUDGETS,
                (
                    f"SHUTDOWN_GRACE_PERIOD: the process is killed after {grace:g} s, before"
                    f" it is forced to end after {self.shutdown_force_timeout:g} s; raise it"
                    " where it is granted, or lower SHUTDOWN_FORCE_TIMEOUT and its budgets"
                ),
            )
        if self.queue_concurrency and len(set(self.queues)) < len(self.queues):
            twice = next(name for name in self.queues if self.queues.count(name) > 1)
            problem = f"QUEUES: {twice} is there twice; keep one, such as {twice}:5"
            yield frozenset({"QUEUES"}), problem
        if self.management_port and self.management_port == self.port:
            yield (
                frozenset({"PORT", "MANAGEMENT_PORT"}),
                f"MANAGEMENT_PORT: {self.port} is PORT already; choose another",
            )
        if self.runbook_url and not self.runbook_url.startswith(("https://", "http://")):
            yield (
                frozenset({"RUNBOOK_URL"}),
                f"RUNBOOK_URL: {self.runbook_url!r} is no address of a page; begin with https://",
            )
        if self.health_details == "authorized" and self.management_token is self.tokens is None:
            yield (
                frozenset({"MANAGEMENT_TOKEN", "TOKENS", "HEALTH_DETAILS"}),
                "HEALTH_DETAILS: authorized needs MANAGEMENT_TOKEN to be set",
            )
        for variable in DATABASE_URLS:
            url: Secret | None = getattr(self, variable.lower())
            try:
                _ = url and parse_database_url(url.value)
            except ValueError as error:
                yield frozenset({variable}), f"{variable}: {error}"
        if self.db.pool_min > self.db.pool_max:
            problem = (
                f"DB_POOL_MIN: {self.db.pool_min} is more than DB_POOL_MAX={self.db.pool_max};"
                " lower it, or raise DB_POOL_MAX"
            )
            yield frozenset({"DB_POOL_MIN", "DB_POOL_MAX", "POOL_PROFILE"}), problem
        yield from self._invalid_proxies()
        yield from self.db.contradictions()
        yield from self.redis.contradictions()
        yield from self.job.contradictions()
        yield from self.webhook.contradictions()
        yield from self._invalid_alerts()

    def _invalid_proxies(self) -> Iterator[tuple[frozenset[str], str]]:
        names = frozenset({"TRUSTED_PROXIES"})
        for each in self.trusted_proxies:
            try:
                network = ip_network(each)
            except ValueError as error:
                yield names, f"TRUSTED_PROXIES: {error}"
                continue
            widest = _WIDEST_NETWORK_OF_PROXIES[network.version]
            if network.prefixlen < widest:
                problem = (
                    f"TRUSTED_PROXIES: {each} is wider than /{widest}, so clients in it choose"
                    " their address; list the addresses and networks of your proxies"
                )
                yield names, problem

    def _invalid_alerts(self) -> Iterator[tuple[frozenset[str], str]]:
        try:
            _ = self.alert_webhook_secret and parse_secrets(self.alert_webhook_secret.value)
        except ValueError as error:
            yield frozenset({"ALERT_WEBHOOK_SECRET"}), f"ALERT_WEBHOOK_SECRET: {error}"
        if self.alert_webhook_url is None:
            return
        try:
            AllowList(also=self.alert_webhook_url.value.strip())
        except (ValueError, WebhookRefusedError) as error:
            yield frozenset({"ALERT_WEBHOOK_URL"}), f"ALERT_WEBHOOK_URL: {error}"

    def jobs_in_memory(self, failed: Collection[str] = ()) -> Iterator[str]:
        """Yield a problem if production would keep jobs in memory. The cache may be there."""
        accept = "ALLOW_MEMORY_ADAPTERS"
        refused = self.in_production and not self.allow_memory_adapters
        known = {"DATABASE_URL", "ENVIRONMENT", accept}.isdisjoint(failed)
        if refused and known and self.database_url is None:
            yield (
                f"DATABASE_URL: ENVIRONMENT={self.environment} refuses to keep jobs in memory; set"
                f" it, or {accept}=true to accept the loss of all data at every stop"
            )


def webhook_keys(settings: Settings) -> WebhookKeys:
    """Return the keys of receivers and alerts; the settings must be validated."""
    webhook = settings.webhook
    secrets = (webhook.secret, settings.alert_webhook_secret, webhook.shared_secret)
    derived, alerts, shared = (() if s is None else parse_secrets(s.value) for s in secrets)
    own = {} if webhook.keys is None else parse_receiver_keys(webhook.keys.value)
    return WebhookKeys(derived, own=own, alerts=alerts, shared=shared)


_BUDGETS = frozenset(
    name.upper() for name in Settings.__struct_fields__ if name.startswith("shutdown_")
)
