"""What one technology brings to the process."""

from dataclasses import dataclass

from viralfx.domain.errors import ConfigurationError
from viralfx.domain.health import HealthCheck
from viralfx.domain.resources import Resource
from viralfx.domain.shutdown import ShutdownStage

CHECK_SHARE = 0.9
"""Part of HEALTH_CHECK_TIMEOUT after which a check of ours gives up by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """How a technology is checked, opened and left; None where there is nothing to do."""

    check: HealthCheck
    resource: Resource | None = None
    close: ShutdownStage | None = None


def unusable_certificates(variable: str, path: str | None, error: OSError) -> ConfigurationError:
    """Say that a file that a variable names is none of certificates."""
    reason = error.strerror or str(error)
    return ConfigurationError([f"{variable}: {path} holds no certificates: {reason}"])
