"""The extras of the distribution: which part needs one, and the one line for a missing one.

An installation without extras brings three small packages. Everything else is in an extra, and is
imported only where it is used (ADR-0065).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from viralfx.core.errors import ConfigurationError

_OTEL = (
    "opentelemetry.sdk",
    "opentelemetry.instrumentation.asyncpg",
    "opentelemetry.instrumentation.redis",
)

EXTRAS = {
    "litestar": ("litestar", "structlog"),
    "serve": ("uvicorn", "httptools", "structlog"),
    "postgres": ("asyncpg",),
    "migrate": ("asyncpg", "structlog"),
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


SOURCE = "./viralfx-{version}-py3-none-any.whl"
"""The argument of pip: the wheel of a release, because no package index has the distribution.
Another owner of its name there could run code as root.

``viralfx`` on the day that an index has it. README, documents and units follow: `just source`.
"""


def install_command(*extras: str) -> str:
    """Return the command that adds extras to this installation, from where it came.

    pip and uv record that (PEP 610). Without a record, or if the file is gone, it is
    :data:`SOURCE`.
    """
    # Every command imports this module, and a probe must stay cheap.
    from importlib.metadata import PackageNotFoundError, distribution  # noqa: PLC0415
    from json import loads  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415
    from shlex import quote  # noqa: PLC0415
    from urllib.parse import unquote, urlsplit  # noqa: PLC0415

    suffix = f"[{','.join(extras)}]"
    try:
        installed = distribution("viralfx")
    except PackageNotFoundError:  # a checkout that is on the path of modules
        return f"pip install {quote('viralfx' + suffix)}"
    record = loads(installed.read_text("direct_url.json") or "{}")
    url = str(record.get("url", ""))
    if url.startswith("file:") and (path := Path(unquote(urlsplit(url).path))).exists():
        editable = "-e " if record.get("dir_info", {}).get("editable") else ""
        return f"pip install {editable}{quote(str(path) + suffix)}"
    if version_control := record.get("vcs_info"):
        place = f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
        return f"pip install {quote(f'viralfx{suffix} @ {place}')}"
    if url.startswith("https:"):
        return f"pip install {quote(f'viralfx{suffix} @ {url}')}"
    return f"pip install {quote(SOURCE.format(version=installed.version) + suffix)}"


class MissingExtraError(ConfigurationError, ImportError):
    """A package of an extra is not installed; the message names the extra and the remedy.

    Code that makes a part optional may catch it as an ``ImportError``.
    """


def problem(asked_by: str, *extras: str) -> str:
    """Return the line about missing extras.

    ``asked_by`` is a command, a name, or what :func:`is_set` returns for variables.
    """
    return ": ".join(lacking(asked_by, *extras))


def lacking(asked_by: str, *extras: str) -> tuple[str, str]:
    """Return what :func:`problem` says, and the command that installs the extras."""
    held = {inner for extra in extras for inner in _HELD.get(extra, ())}
    named = [extra for extra in extras if extra not in held]
    return f"{asked_by} needs viralfx[{','.join(named)}]", install_command(*named)


def is_set(*variables: str) -> str:
    """Return the beginning of the line about an extra that variables ask for."""
    return f"{' and '.join(variables)} {'is' if len(variables) == 1 else 'are'} set, which"


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

    A need is what asks, as :func:`problem` takes it, and the extra.
    """
    return [problem(asked_by, extra) for asked_by, extra in needs if not is_installed(extra)]


def require(asked_by: str, *extras: str) -> None:
    """Raise :class:`MissingExtraError` with one line for all of ``extras`` that are missing."""
    if absent := [extra for extra in extras if not is_installed(extra)]:
        raise MissingExtraError([problem(asked_by, *absent)])


def require_modules(asked_by: str, extra: str, *modules: str) -> None:
    """Raise :class:`MissingExtraError` that names ``extra`` if one of ``modules`` is missing.

    For a part that needs less than the extra brings, and that other extras bring as well.
    """
    if not all(map(_is_found, modules)):
        raise MissingExtraError([problem(asked_by, extra)])


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
