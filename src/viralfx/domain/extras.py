"""The extras of the distribution: which part needs one, and the one line for a missing one.

``pip install viralfx`` brings three small packages. Everything else is in an extra, and is imported
only where it is used (ADR-0065).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from viralfx.domain.errors import ConfigurationError

_OTEL = (
    "opentelemetry.sdk",
    "opentelemetry.instrumentation.asyncpg",
    "opentelemetry.instrumentation.redis",
)

EXTRAS = {
    "litestar": ("litestar", "structlog"),
    "serve": ("uvicorn", "httptools", "structlog"),
    "postgres": ("asyncpg",),
    "migrate": ("alembic", "sqlalchemy", "asyncpg", "structlog"),
    "redis": ("redis",),
    "jobs": ("taskiq", "taskiq_redis", "redis"),
    "cron": ("cronsim",),
    "webhooks": ("httpcore", "anyio"),
    "otel": (*_OTEL, "opentelemetry.exporter.otlp.proto.http"),
    "otel-grpc": (*_OTEL, "opentelemetry.exporter.otlp.proto.grpc"),
    "heap": ("guppy",),
}
"""The packages that the code imports where it asks for an extra; the first one is of no other.

An extra may hold finer ones: ``serve`` is ``serve-app`` and ``litestar``, and ``postgres`` is
``asyncpg`` and ``migrate``. The code asks for the whole one, and needs this part of it.
"""

_HELD = {"serve": frozenset({"litestar"}), "postgres": frozenset({"migrate"})}
"""The extras within another one that the code asks for, too."""


class MissingExtraError(ConfigurationError, ImportError):
    """A package of an extra is not installed; the message names the extra and the remedy.

    Code that makes a part optional may catch it as an ``ImportError``.
    """


def problem(asked_by: str, *extras: str) -> str:
    """Return the line about missing extras; ``asked_by`` is a variable, a command or a name."""
    held = {inner for extra in extras for inner in _HELD.get(extra, ())}
    requirement = f"viralfx[{','.join(extra for extra in extras if extra not in held)}]"
    return f"{asked_by} needs {requirement}: pip install '{requirement}'"


def is_about_extra(line: str) -> bool:
    """Return True for a line of :func:`problem`."""
    return " needs viralfx[" in line


def is_installed(extra: str) -> bool:
    """Return True if every package of an extra can be imported. Imports none of them."""
    return all(map(_is_found, EXTRAS[extra]))


def _is_found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its parent is missing, or it is being hidden
        return False


def missing(needs: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each need whose extra is not installed.

    A need is the variable, command or name that asks, and the extra.
    """
    return [problem(asked_by, extra) for asked_by, extra in needs if not is_installed(extra)]


def require(asked_by: str, *extras: str) -> None:
    """Raise :class:`MissingExtraError` with one line for all of ``extras`` that are missing."""
    if absent := [extra for extra in extras if not is_installed(extra)]:
        raise MissingExtraError([problem(asked_by, *absent)])


@contextmanager
def needed_by(asked_by: str) -> Iterator[None]:
    """Turn a failed import of a package of an extra into :class:`MissingExtraError`.

    Use it around imports that are made only when they are needed. Other errors pass unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (extra := extra_of(error.name or "")) is None:
            raise
        raise MissingExtraError([problem(asked_by, extra)]) from error


def extra_of(module: str) -> str | None:
    """Return the extra that brings a module; None if it is of no extra."""
    for extra, modules in EXTRAS.items():
        for known in modules:
            # For a missing namespace package, the error names the first part that is missing.
            if f"{module}.".startswith(f"{known}.") or f"{known}.".startswith(f"{module}."):
                return extra
    return None
