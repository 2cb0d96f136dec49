"""Traces: on if an OTLP endpoint is set; otherwise OpenTelemetry is not even imported."""

import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from viralfx.domain.errors import ConfigurationError
from viralfx.domain.extras import MissingExtraError, missing
from viralfx.telemetry.tracing.variables import is_disabled, is_enabled, needs, problems

if TYPE_CHECKING:
    from viralfx.telemetry.tracing.cleaning import Clean
    from viralfx.telemetry.tracing.setup import Tracing

__all__ = ["require_packages", "start_tracing"]

_logger = logging.getLogger("viralfx.tracing")


def require_packages(environ: Mapping[str, str]) -> None:
    """Raise :class:`MissingExtraError` if ``OTEL_*`` turn tracing on without its extra."""
    if absent := missing(needs(environ)):
        raise MissingExtraError(absent)


def start_tracing(
    *,
    instance: str,
    environment: str,
    clean: "Clean | None" = None,
    clean_sql: "Clean | None" = None,
) -> "Tracing | None":
    """Start tracing if the ``OTEL_*`` variables name an endpoint; otherwise return None.

    A global provider that the application has set is used in place of these variables, so that
    there is one pipeline. Only OTEL_SDK_DISABLED turns that off.

    ``instance`` and ``environment`` identify this process. ``clean`` redacts secrets in any text,
    ``clean_sql`` removes the values from statements. Without the extra, a warning names it, and
    nothing is traced. Raises :class:`ConfigurationError`.
    """
    if (joined := _join()) is not None:
        return joined
    if not is_enabled(os.environ):
        return None
    # Before the import, because the library reads some variables while it is imported.
    if wrong := list(problems(os.environ)):
        raise ConfigurationError(wrong)
    try:
        require_packages(os.environ)
    except MissingExtraError as error:
        # The variables may be meant for the application's own tracing. A command of this package
        # has refused to start before.
        _logger.warning("Nothing is traced: %s", error)
        return None
    # Not at the top: this import takes as long as the rest of the start-up.
    from viralfx.telemetry.tracing.provider import make_provider  # noqa: PLC0415
    from viralfx.telemetry.tracing.setup import Tracing  # noqa: PLC0415

    provider, exporter = make_provider(
        instance=instance, environment=environment, clean=clean, clean_sql=clean_sql
    )
    return Tracing(provider, exporter)


def _join() -> "Tracing | None":
    # An application that has set a provider has imported the library. Its function for this would
    # load the provider that a variable names, and other modules would refuse invalid variables.
    set_provider = getattr(sys.modules.get("opentelemetry.trace"), "_TRACER_PROVIDER", None)
    if set_provider is None or is_disabled(os.environ):
        return None
    try:
        from viralfx.telemetry.tracing.setup import (  # noqa: PLC0415 - as above
            Tracing,
            provider_of_application,
        )
    except ImportError:  # parts of the library are not installed
        return None
    provider = provider_of_application()
    if provider is None:
        return None
    _logger.info("Traces go to the tracer provider of the application")
    return Tracing(provider)
