"""Traces: on where a collector is named, and not even imported anywhere else."""

import os
from typing import TYPE_CHECKING

from viralfx.domain.errors import ConfigurationError
from viralfx.telemetry.tracing.variables import is_wanted, problems

if TYPE_CHECKING:
    from viralfx.telemetry.tracing.cleaning import Clean
    from viralfx.telemetry.tracing.wiring import Tracing

__all__ = ["start_tracing"]


def start_tracing(
    *,
    instance: str,
    environment: str,
    clean: "Clean | None" = None,
    clean_sql: "Clean | None" = None,
) -> "Tracing | None":
    """Begin to trace, if the environment's ``OTEL_*`` variables name an endpoint; else None.

    ``instance`` and ``environment`` say which process this is. ``clean`` takes secrets out of any
    text, ``clean_sql`` the values out of statements. Raises :class:`ConfigurationError`.
    """
    if not is_wanted(os.environ):
        return None
    # Before the import, at which the library reads some of them.
    if wrong := list(problems(os.environ)):
        raise ConfigurationError(wrong)
    # Not at the top: it takes as long as everything else at a start together.
    from viralfx.telemetry.tracing.provider import make_provider  # noqa: PLC0415
    from viralfx.telemetry.tracing.wiring import Tracing  # noqa: PLC0415

    provider, exporter = make_provider(
        instance=instance, environment=environment, clean=clean, clean_sql=clean_sql
    )
    return Tracing(provider, exporter)
