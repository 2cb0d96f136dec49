"""Everything that can be set: each setting with its type, limits, default and meaning."""

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from viralfx.domain.shutdown import ShutdownBudgets
from viralfx.domain.webhooks.allowed import AllowList
from viralfx.domain.webhooks.errors import WebhookRefusedError
from viralfx.settings.backends import DatabaseSettings, RedisSettings
from viralfx.settings.database_url import DatabaseAddress, parse_database_url
from viralfx.settings.jobs import JobSettings, WebhookSettings
from viralfx.settings.kinds import (
    Milliseconds,
    Modules,
    Names,
    Port,
    PositiveMilliseconds,
    Secret,
    Threshold,
    meaning,
)

WORKER_MANAGEMENT_PORT = 3001
"""Where `viralfx worker` serves its probes when nothing else is said."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set. A field's name in capitals is its environment variable.

    ``db``, ``redis``, ``job`` and ``webhook`` are groups: their names come before those of their
    fields.
    """

    host: Annotated[str, meaning("Address the API listens on")] = "0.0.0.0"  # noqa: S104 - a pod's
    port: Annotated[Port, meaning("Port of the API; 0 takes any free one")] = 3000
    management_port: Annotated[
        Port | None,
        meaning(
            "Second port for health and shutdown that closes last; unset: none,"
            f" for `viralfx worker` {WORKER_MANAGEMENT_PORT}"
        ),
    ] = None
    management_token: Annotated[
        Secret | None,
        meaning("Bearer token for /health/shutdown, and for details when authorized"),
    ] = None
    api_token: Annotated[
        Secret | None,
        meaning("Bearer token for the jobs API; production needs it; unset: open to everybody"),
    ] = None
    environment: Annotated[
        str, Meta(min_length=1), meaning("Name of the environment, shown by /health")
    ] = "development"
    allow_memory_adapters: Annotated[
        bool, meaning("Let ENVIRONMENT=production run on memory adapters")
    ] = False
    log_level: Annotated[
        Literal["error", "warn", "log", "debug", "verbose"],
        meaning("Least level that is logged; what lines call info is log"),
    ] = "log"
    log_format: Annotated[Literal["json", "console"], meaning("JSON lines, or text for people")] = (
        "json"
    )
    access_log: Annotated[bool, meaning("One log line for each request")] = True
    heap_snapshot_dir: Annotated[
        str | None,
        meaning("Folder for heap reports at SIGUSR2; unset: that for temporary files"),
    ] = None
    loop_stall_threshold: Annotated[
        Milliseconds,
        meaning("Time from which a blocked event loop is logged, with what blocks it; 0: never"),
    ] = 500
    state_dir: Annotated[
        str | None,
        meaning("Folder for state.json across restarts; unset: the database, or memory"),
    ] = None
    queues: Annotated[Names, Meta(min_length=1), meaning("Names of the job queues")] = (
        "default",
        "notifications",
        "analytics",
    )
    task_modules: Annotated[
        Modules, meaning("Modules whose functions with @task are run as jobs")
    ] = ()
    alert_webhook_url: Annotated[
        Secret | None,
        meaning("Where changes of health are sent; unset: nowhere"),
    ] = None

    database_url: Annotated[
        Secret | None,
        meaning("Postgres, as postgresql://user:password@host:5432/database; unset: memory"),
    ] = None
    pool_profile: Annotated[
        Literal["small", "medium", "large"],
        meaning("Sizes of the pool where DB_POOL_MIN and DB_POOL_MAX say nothing"),
    ] = "small"
    db: DatabaseSettings = DatabaseSettings()
    redis: RedisSettings = RedisSettings()
    job: JobSettings = JobSettings()
    webhook: WebhookSettings = WebhookSettings()

    health_check_interval: Annotated[
        PositiveMilliseconds, meaning("Time between two attempts of a check")
    ] = 5000
    health_check_timeout: Annotated[
        PositiveMilliseconds, meaning("Time after which an attempt is abandoned and fails")
    ] = 2000
    health_failure_threshold: Annotated[
        Threshold, meaning("Observations in a row before a check gets worse")
    ] = 1
    health_recovery_threshold: Annotated[
        Threshold, meaning("Observations in a row before a check gets better")
    ] = 1
    health_critical: Annotated[
        Names, meaning("Checks whose failure makes the service unhealthy")
    ] = ("database", "memory")
    health_details: Annotated[
        Literal["always", "authorized"], meaning("Who may read /health/detailed and one check")
    ] = "always"
    readiness_requires: Annotated[Names, meaning("Checks that must pass to be ready")] = (
        "database",
    )
    readiness_fail_open_after: Annotated[
        Milliseconds,
        meaning("Ready again after failing so long on shared dependencies alone; 0: never"),
    ] = 0

    shutdown_readiness_delay: Annotated[
        Milliseconds, meaning("Time readiness says no while still serving")
    ] = 0
    shutdown_drain_timeout: Annotated[
        Milliseconds, meaning("Budget for requests and jobs in flight")
    ] = 30000
    shutdown_state_timeout: Annotated[Milliseconds, meaning("Budget for saving state")] = 5000
    shutdown_connection_timeout: Annotated[
        Milliseconds, meaning("Budget for closing connections")
    ] = 15000
    shutdown_force_timeout: Annotated[
        PositiveMilliseconds, meaning("Time from the trigger after which the process is ended")
    ] = 60000
    shutdown_grace_period: Annotated[
        PositiveMilliseconds | None,
        meaning(
            "Time from SIGTERM until whoever sent it kills, such as a kubelet; unset: not known"
        ),
    ] = None
    shutdown_on_uncaught: Annotated[
        bool, meaning("An uncaught exception starts the shutdown; false: it is only logged")
    ] = True

    @property
    def worker_management_port(self) -> int:
        """Where a worker serves its probes; it always does."""
        return WORKER_MANAGEMENT_PORT if self.management_port is None else self.management_port

    @property
    def shutdown_budgets(self) -> ShutdownBudgets:
        """The shutdown times in seconds. Raises ``ValueError`` when they do not fit."""
        return ShutdownBudgets(
            readiness_delay=self.shutdown_readiness_delay / 1000,
            drain=self.shutdown_drain_timeout / 1000,
            state=self.shutdown_state_timeout / 1000,
            connections=self.shutdown_connection_timeout / 1000,
            force=self.shutdown_force_timeout / 1000,
        )

    @property
    def database_address(self) -> DatabaseAddress | None:
        """What DATABASE_URL says, None while not set. Raises ``ValueError`` when it is wrong."""
        return None if self.database_url is None else parse_database_url(self.database_url.value)

    def contradictions(
        self, failed: Collection[str] = (), *, with_api: bool = False
    ) -> Iterator[str]:
        """Yield what is wrong with values that are right one by one.

        What involves a variable in ``failed`` is passed over: its value is not what was meant.
        ``with_api`` tells that the jobs API is served.
        """
        for variables, problem in self._contradictions():
            if variables.isdisjoint(failed):
                yield problem
        if with_api and self.environment == "production" and self.api_token is None:
            problem = "ENVIRONMENT=production refuses a jobs API that is open to everybody; set it"
            if "API_TOKEN" not in failed:
                yield f"API_TOKEN: {problem}"

    def _contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
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
                    f"SHUTDOWN_GRACE_PERIOD: the process is killed after {grace / 1000:g} s, before"
                    f" it is forced to end after {self.shutdown_force_timeout / 1000:g} s; raise it"
                    " where it is granted, or lower SHUTDOWN_FORCE_TIMEOUT and its budgets"
                ),
            )
        if self.management_port and self.management_port == self.port:
            yield (
                frozenset({"PORT", "MANAGEMENT_PORT"}),
                f"MANAGEMENT_PORT: {self.port} is PORT already; choose another",
            )
        if self.health_details == "authorized" and self.management_token is None:
            yield (
                frozenset({"MANAGEMENT_TOKEN", "HEALTH_DETAILS"}),
                "HEALTH_DETAILS: authorized needs MANAGEMENT_TOKEN to be set",
            )
        try:
            _ = self.database_address
        except ValueError as error:
            yield frozenset({"DATABASE_URL"}), f"DATABASE_URL: {error}"
        if self.db.pool_min > self.db.pool_max:
            problem = (
                f"DB_POOL_MIN: {self.db.pool_min} is more than DB_POOL_MAX={self.db.pool_max};"
                " lower it, or raise DB_POOL_MAX"
            )
            yield frozenset({"DB_POOL_MIN", "DB_POOL_MAX", "POOL_PROFILE"}), problem
        yield from self.db.contradictions()
        yield from self.redis.contradictions()
        yield from self.job.contradictions()
        yield from self.webhook.contradictions()
        yield from self._alerts_to_nowhere()
        if self.environment == "production" and not self.allow_memory_adapters:
            yield from self._memory_in_production()

    def _alerts_to_nowhere(self) -> Iterator[tuple[frozenset[str], str]]:
        if self.alert_webhook_url is None:
            return
        try:
            AllowList(also=self.alert_webhook_url.value.strip())
        except (ValueError, WebhookRefusedError) as error:
            yield frozenset({"ALERT_WEBHOOK_URL"}), f"ALERT_WEBHOOK_URL: {error}"

    def _memory_in_production(self) -> Iterator[tuple[frozenset[str], str]]:
        accept = "ALLOW_MEMORY_ADAPTERS"
        if self.database_url is None:
            problem = (
                "DATABASE_URL: ENVIRONMENT=production refuses a database in memory; set it, or"
                f" {accept}=true to accept the loss of all data at every stop"
            )
            yield frozenset({"DATABASE_URL", accept}), problem
        if not self.redis.in_use:
            problem = (
                "REDIS_HOST: ENVIRONMENT=production refuses a cache in memory; set it, or"
                f" REDIS_SENTINEL_ENABLED=true, or {accept}=true to do without Redis"
            )
            yield frozenset({"REDIS_HOST", "REDIS_SENTINEL_ENABLED", accept}), problem


_BUDGETS = frozenset(
    name.upper() for name in Settings.__struct_fields__ if name.startswith("shutdown_")
)
