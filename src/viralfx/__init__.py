"""ViralFX Backend: an operations layer for ASGI applications, and the service built on it."""

from importlib import import_module

from viralfx.core.errors import ConfigurationError, ViralFXError

# Type checkers treat the name as true. Importing it from typing would double the time until
# signals are handled, and the run time of a probe.
TYPE_CHECKING = False
if TYPE_CHECKING:
    __version__: str
    """The version of the distribution, such as ``0.2.0``."""

    from viralfx.bootstrap import PostgresDatabase, RedisClient
    from viralfx.checks import DiskCheck, HttpCheck, SqlAlchemyCheck, TcpCheck
    from viralfx.core.correlation import bind_user_id
    from viralfx.core.errors import LedgerUnavailableError, TransactionError, UnstorableError
    from viralfx.domain.access import Principal, Right
    from viralfx.domain.cache import Cache
    from viralfx.domain.health.check_runner import CheckConfig
    from viralfx.domain.health.model import HealthCheck, Observation, Status
    from viralfx.domain.shutdown import ShutdownStage
    from viralfx.jobs.codec import PayloadError, PayloadTooLargeError
    from viralfx.jobs.hooks import TaskMiddleware
    from viralfx.jobs.ledger import Accepted, KeyHeldError
    from viralfx.jobs.model import (
        InvalidFilterError,
        Job,
        JobFilter,
        JobNotFoundError,
        JobState,
        JobStateError,
        KeyConflictError,
        UnknownQueueError,
    )
    from viralfx.jobs.schedule import UnknownScheduleError
    from viralfx.jobs.service import JobService
    from viralfx.jobs.tasks import Discard, JobContext, Snooze, UnknownTaskError, task
    from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError, circuit_breaker
    from viralfx.resilience.bulkhead import Bulkhead, BulkheadFullError
    from viralfx.resilience.deadline import Deadline
    from viralfx.resilience.fallback import with_fallback
    from viralfx.resilience.policy import Backoff, BackoffPolicy, RetryPolicy
    from viralfx.resilience.retry import retry
    from viralfx.settings import Settings, read_settings
    from viralfx.web.api_docs import ApiDocsPlugin
    from viralfx.web.layer import OperationsConfig, OperationsLayer
    from viralfx.web.plugin import OperationsPlugin

__all__ = [
    "Accepted",
    "ApiDocsPlugin",
    "Backoff",
    "BackoffPolicy",
    "Bulkhead",
    "BulkheadFullError",
    "Cache",
    "CheckConfig",
    "CircuitBreaker",
    "CircuitOpenError",
    "ConfigurationError",
    "Deadline",
    "Discard",
    "DiskCheck",
    "HealthCheck",
    "HttpCheck",
    "InvalidFilterError",
    "Job",
    "JobContext",
    "JobFilter",
    "JobNotFoundError",
    "JobService",
    "JobState",
    "JobStateError",
    "KeyConflictError",
    "KeyHeldError",
    "LedgerUnavailableError",
    "Observation",
    "OperationsConfig",
    "OperationsLayer",
    "OperationsPlugin",
    "PayloadError",
    "PayloadTooLargeError",
    "PostgresDatabase",
    "Principal",
    "RedisClient",
    "RetryPolicy",
    "Right",
    "Settings",
    "ShutdownStage",
    "Snooze",
    "SqlAlchemyCheck",
    "Status",
    "TaskMiddleware",
    "TcpCheck",
    "TransactionError",
    "UnknownQueueError",
    "UnknownScheduleError",
    "UnknownTaskError",
    "UnstorableError",
    "ViralFXError",
    "bind_user_id",
    "circuit_breaker",
    "read_settings",
    "retry",
    "task",
    "with_fallback",
]

_HOMES = {
    "postgres": ("PostgresDatabase",),
    "adapters.redis": ("RedisClient",),
    "checks": ("DiskCheck", "HttpCheck", "SqlAlchemyCheck", "TcpCheck"),
    "domain.access": ("Principal", "Right"),
    "domain.cache": ("Cache",),
    "core.correlation": ("bind_user_id",),
    "core.errors": ("LedgerUnavailableError", "TransactionError", "UnstorableError"),
    "domain.health.check_runner": ("CheckConfig",),
    "domain.health.model": ("HealthCheck", "Observation", "Status"),
    "jobs.codec": ("PayloadError", "PayloadTooLargeError"),
    "jobs.hooks": ("TaskMiddleware",),
    "jobs.ledger": ("Accepted", "KeyHeldError"),
    "jobs.model": (
        "InvalidFilterError",
        "Job",
        "JobFilter",
        "JobNotFoundError",
        "JobState",
        "JobStateError",
        "KeyConflictError",
        "UnknownQueueError",
    ),
    "jobs.schedule": ("UnknownScheduleError",),
    "jobs.service": ("JobService",),
    "jobs.tasks": ("Discard", "JobContext", "Snooze", "UnknownTaskError", "task"),
    "resilience.breaker": ("CircuitBreaker", "CircuitOpenError", "circuit_breaker"),
    "resilience.bulkhead": ("Bulkhead", "BulkheadFullError"),
    "resilience.deadline": ("Deadline",),
    "resilience.fallback": ("with_fallback",),
    "resilience.policy": ("Backoff", "BackoffPolicy", "RetryPolicy"),
    "resilience.retry": ("retry",),
    "domain.shutdown": ("ShutdownStage",),
    "settings": ("Settings", "read_settings"),
    "web.api_docs": ("ApiDocsPlugin",),
    "web.layer": ("OperationsConfig", "OperationsLayer"),
    "web.plugin": ("OperationsPlugin",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import the module of a public name on first use: resilience does not need Litestar."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - slow, and seldom needed

        return version("viralfx")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    except ModuleNotFoundError:
        # Imported late: every import of viralfx would wait for it.
        from viralfx.core.extras import needed_by  # noqa: PLC0415

        with needed_by(f"viralfx.{name}"):
            raise
    globals()[name] = found
    return found
