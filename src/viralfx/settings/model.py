"""Everything that can be set: each setting with its type, limits, default and meaning."""

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from viralfx.domain.shutdown import ShutdownBudgets

# The largest signed 32-bit number: 24 days, and no timer or date overflows with it.
Milliseconds = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PositiveMilliseconds = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Threshold = Annotated[int, Meta(ge=1, le=1000)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Names = tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]*$")], ...]


class Secret(msgspec.Struct, frozen=True):
    """A value that never shows itself: not in a log, a traceback or ``viralfx env``."""

    value: str

    def __repr__(self) -> str:
        return "Secret('***')"


def _meaning(text: str) -> Meta:
    return Meta(description=text)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set. A field's name in capitals is its environment variable."""

    host: Annotated[str, _meaning("Address the API listens on")] = "0.0.0.0"  # noqa: S104 - a pod's
    port: Annotated[Port, _meaning("Port of the API; 0 takes any free one")] = 3000
    management_port: Annotated[
        Port | None,
        _meaning("Second port for health and shutdown that closes last; unset: none"),
    ] = None
    management_token: Annotated[
        Secret | None,
        _meaning("Bearer token for /health/shutdown, and for details when authorized"),
    ] = None
    environment: Annotated[
        str, Meta(min_length=1), _meaning("Name of the environment, shown by /health")
    ] = "development"
    allow_memory_adapters: Annotated[
        bool, _meaning("Let ENVIRONMENT=production run on memory adapters")
    ] = False
    log_level: Annotated[
        Literal["error", "warn", "log", "debug", "verbose"], _meaning("Least level that is logged")
    ] = "log"
    log_format: Annotated[
        Literal["json", "console"], _meaning("JSON lines, or text for people")
    ] = "json"
    state_dir: Annotated[
        str | None, _meaning("Folder that keeps state.json across restarts; unset: memory only")
    ] = None
    queues: Annotated[Names, Meta(min_length=1), _meaning("Names of the job queues")] = (
        "default",
        "notifications",
        "analytics",
    )

    health_check_interval: Annotated[
        PositiveMilliseconds, _meaning("Time between two attempts of a check")
    ] = 5000
    health_check_timeout: Annotated[
        PositiveMilliseconds, _meaning("Time after which an attempt is abandoned and fails")
    ] = 2000
    db_health_check_interval: Annotated[
        PositiveMilliseconds,
        _meaning("Time between two attempts of the database check while it passes"),
    ] = 30000
    health_failure_threshold: Annotated[
        Threshold, _meaning("Observations in a row before a check gets worse")
    ] = 1
    health_recovery_threshold: Annotated[
        Threshold, _meaning("Observations in a row before a check gets better")
    ] = 1
    health_critical: Annotated[
        Names, _meaning("Checks whose failure makes the service unhealthy")
    ] = ("database", "memory")
    health_details: Annotated[
        Literal["always", "authorized"], _meaning("Who may read /health/detailed and one check")
    ] = "always"
    readiness_requires: Annotated[Names, _meaning("Checks that must pass to be ready")] = (
        "database",
    )
    readiness_fail_open_after: Annotated[
        Milliseconds,
        _meaning("Ready again after failing so long on shared dependencies alone; 0: never"),
    ] = 0

    shutdown_readiness_delay: Annotated[
        Milliseconds, _meaning("Time readiness says no while still serving")
    ] = 0
    shutdown_drain_timeout: Annotated[
        Milliseconds, _meaning("Budget for requests and jobs in flight")
    ] = 30000
    shutdown_state_timeout: Annotated[Milliseconds, _meaning("Budget for saving state")] = 5000
    shutdown_connection_timeout: Annotated[
        Milliseconds, _meaning("Budget for closing connections")
    ] = 15000
    shutdown_force_timeout: Annotated[
        PositiveMilliseconds, _meaning("Time from the trigger after which the process is ended")
    ] = 60000
    shutdown_on_uncaught: Annotated[
        bool, _meaning("An uncaught exception starts the shutdown; false: it is only logged")
    ] = True

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

    def contradictions(self, failed: Collection[str] = ()) -> Iterator[str]:
        """Yield what is wrong with values that are right one by one.

        What involves a field in ``failed`` is passed over: its value is not what was meant.
        """
        ok = set(self.__struct_fields__).difference(failed)
        if ok.issuperset(name for name in self.__struct_fields__ if name.startswith("shutdown_")):
            try:
                _ = self.shutdown_budgets
            except ValueError as error:
                yield f"SHUTDOWN_FORCE_TIMEOUT: {error}; raise it, or lower a budget"
        same_port = self.management_port and self.management_port == self.port
        if same_port and ok.issuperset({"port", "management_port"}):
            yield f"MANAGEMENT_PORT: {self.port} is PORT already; choose another"
        tokenless = self.health_details == "authorized" and self.management_token is None
        if tokenless and "management_token" in ok:
            yield "HEALTH_DETAILS: authorized needs MANAGEMENT_TOKEN to be set"
        in_memory = self.environment == "production" and not self.allow_memory_adapters
        if in_memory and "allow_memory_adapters" in ok:
            yield (
                "ENVIRONMENT: production refuses to keep its data in memory, and this version has"
                " memory adapters only; set ALLOW_MEMORY_ADAPTERS=true to accept the loss of all"
                " data at every stop"
            )
