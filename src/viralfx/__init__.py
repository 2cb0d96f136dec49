"""ViralFX Backend: an operations layer for Litestar services, and the service built on it."""

from typing import TYPE_CHECKING

from viralfx.domain.errors import ViralFXError
from viralfx.domain.health import HealthCheck, Observation, Status
from viralfx.domain.shutdown import ShutdownStage

if TYPE_CHECKING:
    from viralfx.web.plugin import OperationsConfig, OperationsPlugin

__all__ = [
    "HealthCheck",
    "Observation",
    "OperationsConfig",
    "OperationsPlugin",
    "ShutdownStage",
    "Status",
    "ViralFXError",
]


def __getattr__(name: str) -> object:
    """Import what needs Litestar only when it is used."""
    if name in {"OperationsConfig", "OperationsPlugin"}:
        from viralfx.web import plugin  # noqa: PLC0415 - the point of this function

        return getattr(plugin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
