"""Traces: on if an OTLP endpoint is set; otherwise OpenTelemetry is not even imported."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from viralfx.core.errors import ConfigurationError
from viralfx.core.extras import MissingExtraError, missing
from viralfx.telemetry.tracing.variables import is_disabled, is_enabled, needs, problems

if TYPE_CHECKING:
    from viralfx.telemetry.tracing.cleaning import Clean
    from viralfx.telemetry.tracing.setup import Tracing

__all__ = [
    "module_of_application",
    "require_packages",
    "service_of",
    "start_tracing",
    "tracing_of",
]

_logger = logging.getLogger("viralfx.tracing")

SERVICE = "viralfx-backend"
"""The default of OTEL_SERVICE_NAME for the service of this package."""

_OWN_PACKAGE = __name__.partition(".")[0]
_GENERIC = frozenset(
    {
        *("api", "app", "application", "asgi", "backend", "main", "server", "service", "src"),
        *("web", "wsgi"),
    }
)
"""Names of modules that say nothing about the application; the name of the folder may."""

_FRAMEWORKS = frozenset({"django", "fastapi", "litestar", "quart", "starlette", "taskiq"})

_module: ContextVar[str | None] = ContextVar("viralfx_module_of_application", default=None)


@contextmanager
def tracing_of(module: str | None) -> Iterator[None]:
    """Name the service of traces that start in the block after this module of the application."""
    token = _module.set(module)
    try:
        yield
    finally:
        _module.reset(token)


def module_of_application() -> str | None:
    """Return the module of the application whose code is running; None if it has none.

    Within :func:`tracing_of` it is that one. Otherwise it is the first caller outside this package.
    """
    if (module := _module.get()) is not None:
        return module
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the only way to the caller
    module = _OWN_PACKAGE
    while frame is not None and module.partition(".")[0] == _OWN_PACKAGE:
        module, frame = str(frame.f_globals.get("__name__", _OWN_PACKAGE)), frame.f_back
    return None if module.partition(".")[0] in _FRAMEWORKS else module


def service_of(module: str | None) -> str:
    """Return the name of the service whose application a module makes.

    It is that of the top-level package; for a generic name, such as ``main`` and ``app``, that of
    the folder which holds it, or of the folder around ``src``. None, and a module of this package,
    mean the service of this package.
    """
    name = (module or _OWN_PACKAGE).partition(".")[0]
    if name == _OWN_PACKAGE:
        return SERVICE
    found = sys.modules.get(name)
    paths = [*getattr(found, "__path__", ()), getattr(found, "__file__", None) or ""]
    path = Path(paths[0])
    if name == "__main__":
        name = path.parent.name if path.stem == "__main__" else path.stem
        path = path.parent if path.stem == "__main__" else path
    if name in _GENERIC and paths[0]:
        folder = path.resolve().parent
        name = (folder.parent.name if folder.name == "src" else folder.name) or name
    return name or SERVICE


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
        service=service_of(_module.get()),
        instance=instance,
        environment=environment,
        clean=clean,
        clean_sql=clean_sql,
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
