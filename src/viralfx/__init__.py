"""ViralFX Backend: an operations layer for Litestar services, and the service built on it."""

from importlib import import_module
from typing import TYPE_CHECKING

from viralfx.domain.errors import ViralFXError

if TYPE_CHECKING:
    from viralfx.domain.correlation import bind_user_id
    from viralfx.domain.health import HealthCheck, Observation, Status
    from viralfx.domain.jobs.tasks import JobContext, task
    from viralfx.domain.resilience.backoff import Backoff
    from viralfx.domain.resilience.breaker import CircuitBreaker, circuit_breaker
    from viralfx.domain.resilience.circuit import CircuitOpenError
    from viralfx.domain.resilience.deadline import Deadline
    from viralfx.domain.resilience.fallback import with_fallback
    from viralfx.domain.resilience.retry import retry
    from viralfx.domain.resilience.retry_policy import RetryPolicy
    from viralfx.domain.shutdown import ShutdownStage
    from viralfx.web.plugin import OperationsConfig, OperationsPlugin

__all__ = [
    "Backoff",
    "CircuitBreaker",
    "CircuitOpenError",
    "Deadline",
    "HealthCheck",
    "JobContext",
    "Observation",
    "OperationsConfig",
    "OperationsPlugin",
    "RetryPolicy",
    "ShutdownStage",
    "Status",
    "ViralFXError",
    "bind_user_id",
    "circuit_breaker",
    "retry",
    "task",
    "with_fallback",
]

_HOMES = {
    "domain.correlation": ("bind_user_id",),
    "domain.health": ("HealthCheck", "Observation", "Status"),
    "domain.jobs.tasks": ("JobContext", "task"),
    "domain.resilience.backoff": ("Backoff",),
    "domain.resilience.breaker": ("CircuitBreaker", "circuit_breaker"),
    "domain.resilience.circuit": ("CircuitOpenError",),
    "domain.resilience.deadline": ("Deadline",),
    "domain.resilience.fallback": ("with_fallback",),
    "domain.resilience.retry": ("retry",),
    "domain.resilience.retry_policy": ("RetryPolicy",),
    "domain.shutdown": ("ShutdownStage",),
    "web.plugin": ("OperationsConfig", "OperationsPlugin"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a name's module when it is first used: most uses need few, and none Litestar."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found
