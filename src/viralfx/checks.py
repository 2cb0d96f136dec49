"""Checks to use in an application. Each takes the application's object and loads no driver."""

import os
import socket
import ssl
from asyncio import open_connection, timeout
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from viralfx.core.errors import ConfigurationError, require_count, require_positive
from viralfx.core.extras import needed_by
from viralfx.core.threads import NameLookups
from viralfx.domain.health.check_runner import InThread
from viralfx.domain.health.model import Observation, Status
from viralfx.domain.webhooks.url import (
    Destination,
    WebhookRefusedError,
    WebhookUnavailableError,
    is_never_allowed,
    parse_address,
    parse_destination,
)

__all__ = ["DiskCheck", "HttpCheck", "SqlAlchemyCheck", "TcpCheck"]

_TIMEOUT = 1.8
"""Below the default of HEALTH_CHECK_TIMEOUT, so that a check names its own reason."""
_LAST_PORT = 65535
_MIN_BYTES = 1_000_000


class _Engine(Protocol):
    def connect(self) -> AbstractContextManager[Any]: ...


class _AsyncEngine(Protocol):
    def connect(self) -> AbstractAsyncContextManager[Any]: ...


SqlAlchemyEngine: TypeAlias = _Engine | _AsyncEngine
"""An ``Engine`` or an ``AsyncEngine`` of SQLAlchemy."""


class SqlAlchemyCheck:
    """Asks a database through an engine of SQLAlchemy, plain or asynchronous.

    It takes a connection of the engine's pool. If all of them are in use, the result is ``warn``
    with code ``pool_exhausted``: a busy pool is no broken database. Give the check an engine with
    ``NullPool`` for a connection of its own.
    """

    def __init__(self, engine: SqlAlchemyEngine, statement: str = "SELECT 1") -> None:
        """``statement`` is one that the database answers at once.

        Raises :class:`ConfigurationError` for a value that is no engine.
        """
        given: Any = engine
        if not (hasattr(given, "connect") and hasattr(given, "dialect") and hasattr(given, "pool")):
            kind = type(given).__name__
            raise ConfigurationError([f"SqlAlchemyCheck takes an engine of SQLAlchemy, not {kind}"])
        self._engine: Any = given
        self._statement = statement
        self._in_thread = InThread("health-check-sqlalchemy", self._ask_plain)
        self._asynchronous = hasattr(given, "sync_engine")

    async def check(self) -> Observation:
        """Run the statement; an error of the driver is an exception."""
        details: dict[str, object] = {"dialect": str(self._engine.dialect.name)}
        pool = self._engine.pool
        # Pools without a limit have none of these.
        most = getattr(pool, "_max_overflow", -1)
        if most >= 0:
            most += pool.size()
            details["pool"] = {"inUse": pool.checkedout(), "limit": most}
            if pool.checkedout() >= most:
                message = f"All {most} connections of the pool are in use"
                return Observation(
                    status=Status.WARN, message=message, details=details, code="pool_exhausted"
                )
        await (self._ask() if self._asynchronous else self._in_thread())
        return Observation(status=Status.PASS, message="The database answers", details=details)

    async def _ask(self) -> None:
        async with self._engine.connect() as connection:
            await connection.exec_driver_sql(self._statement)

    def _ask_plain(self) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(self._statement)


class HttpCheck:
    """Asks an HTTP service by ``GET``; it passes if the status is one of ``statuses``.

    The service may have a private address. Metadata services of clouds, link-local, multicast and
    reserved addresses are refused, whichever name leads there. Redirects are not followed,
    and neither cookies nor proxies are used.
    """

    def __init__(
        self,
        url: str,
        *,
        statuses: Collection[int] = range(200, 300),
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float = _TIMEOUT,
    ) -> None:
        """``tls`` is for a service with a CA of its own. ``timeout`` is in seconds.

        Raises :class:`ConfigurationError` for an unusable URL, address, header or timeout.
        """
        with needed_by("HttpCheck"):
            from viralfx.adapters.http import HttpWebhookSender  # noqa: PLC0415 - only this check

        try:
            self._there = parse_destination(url)
            if self._there.address is not None:
                _check_addresses(self._there, (self._there.host,))
            require_positive("timeout", timeout)
        except (WebhookRefusedError, TypeError, ValueError) as error:
            raise ConfigurationError([f"HttpCheck: {error}"]) from None
        self._headers = dict(headers or {})
        for name, value in self._headers.items():
            if not f"{name}{value}".isprintable() or not name.isascii():
                raise ConfigurationError([f"HttpCheck: {name!r} is not a header that can be sent"])
        self._statuses = statuses
        self._sender = HttpWebhookSender(_check_addresses, timeout=timeout, tls=tls)

    async def check(self) -> Observation:
        """Send one request."""
        where = self._there.authority
        try:
            response = await self._sender.get(self._there, self._headers)
        except WebhookRefusedError as error:
            return _failed(str(error), "address_refused", error)
        except WebhookUnavailableError as error:
            return _failed(str(error), _reason_of(error), error)
        details = {"host": where, "status": response.status}
        if response.status in self._statuses:
            message = f"{where} answers"
            return Observation(status=Status.PASS, message=message, details=details)
        message = f"{where} answers with status {response.status}"
        return Observation(
            status=Status.FAIL, message=message, details=details, code="unexpected_status"
        )


def _check_addresses(destination: Destination, addresses: Iterable[str]) -> None:
    for written in addresses:
        if is_never_allowed(parse_address(written)):
            host = destination.host
            raise WebhookRefusedError(f"{host} has the address {written}, which is never allowed")


class TcpCheck:
    """Connects to a port and closes the connection again."""

    def __init__(self, host: str, port: int, *, timeout: float = _TIMEOUT) -> None:
        """``timeout``: seconds for all addresses of the host together.

        Raises :class:`ConfigurationError` for an unusable host, port or timeout.
        """
        if not str(host).strip() or not str(host).isprintable():
            raise ConfigurationError([f"TcpCheck: {host!r} is not a host"])
        try:
            require_count("port", port)
            require_positive("timeout", timeout)
            if port > _LAST_PORT:
                raise ValueError(f"port must be at most {_LAST_PORT}, got {port}")  # noqa: TRY301
        except (TypeError, ValueError) as error:
            raise ConfigurationError([f"TcpCheck: {error}"]) from None
        self._host, self._port, self._timeout = host, port, timeout
        # The event loop resolves names in threads that others wait for, and cannot cancel them.
        self._names = NameLookups()

    async def check(self) -> Observation:
        """Try the addresses in turn until one accepts."""
        where = f"{self._host}:{self._port}"
        failure: OSError = ConnectionError("the name has no address")
        try:
            async with timeout(self._timeout):
                found = await self._names.addresses(self._host, self._port)
                for address in found:
                    try:
                        # An address that drops packets must not use up the time of the others.
                        async with timeout(self._timeout / len(found)):
                            _, writer = await open_connection(address, self._port)
                    except OSError as error:
                        failure = error
                        continue
                    writer.close()
                    with suppress(OSError):  # the other side may have closed it first
                        await writer.wait_closed()
                    message = f"{where} accepts connections"
                    details = {"host": self._host, "port": self._port}
                    return Observation(status=Status.PASS, message=message, details=details)
        except OSError as error:
            failure = error
        return _failed(f"{where} cannot be connected to", _reason_of(failure), failure)


class DiskCheck:
    """Fails if the file system of a path has less free space than ``least``.

    ``least`` is a share of the file system below 1, or a number of bytes; ``warn`` is a higher
    limit of the same kinds, below which the check warns. Space that only the
    super-user may fill does not count. A file system without free inodes fails, too.
    """

    def __init__(
        self, path: str | os.PathLike[str], least: float, *, warn: float | None = None
    ) -> None:
        """Raise :class:`ConfigurationError` for a limit that is none."""
        limits: dict[str, float] = {"least": least}
        if warn is not None:
            limits["warn"] = warn
        for name, limit in limits.items():
            try:
                require_positive(name, limit)
            except (TypeError, ValueError) as error:
                raise ConfigurationError([f"DiskCheck: {error}"]) from None
            if 1 <= limit < _MIN_BYTES:  # a percentage, or megabytes
                problem = f"{name} is a share below 1, or at least {_MIN_BYTES} bytes: {limit!r}"
                raise ConfigurationError([f"DiskCheck: {problem}"])
        self._path = Path(path)
        self._least, self._warn = least, warn
        self._in_thread = InThread("health-check-disk", self._read_figures)

    async def check(self) -> Observation:
        """Read the figures of the file system; a network file system may block, so in a thread."""
        found = await self._in_thread()
        if not isinstance(found, Observation):
            raise TypeError("the figures of a file system are an observation")
        return found

    def _read_figures(self) -> Observation:
        try:
            figures = os.statvfs(self._path)
        except OSError as error:
            return _failed(f"{self._path} cannot be read", "path_unreadable", error)
        total, free = figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize
        details = {"path": str(self._path), "totalBytes": total, "freeBytes": free}
        say = f"{self._path} has {free // 1_000_000} MB free"
        if free < _bytes_of(self._least, total):
            return Observation(status=Status.FAIL, message=say, details=details, code="disk_full")
        if figures.f_files and not figures.f_favail:
            say = f"{self._path} has no free inodes"
            return Observation(status=Status.FAIL, message=say, details=details, code="no_inodes")
        if self._warn is not None and free < _bytes_of(self._warn, total):
            return Observation(status=Status.WARN, message=say, details=details, code="disk_low")
        return Observation(status=Status.PASS, message=say, details=details)


def _bytes_of(limit: float, total: int) -> float:
    return limit * total if limit < 1 else limit


def _failed(message: str, code: str, error: Exception) -> Observation:
    return Observation(status=Status.FAIL, message=message, code=code, error=error)


def _reason_of(error: BaseException) -> str:
    """Return the code of an error of a connection, by its cause."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, code in _CODES:
        if any(isinstance(each, kind) for each in causes):
            return code
    return "unreachable"


_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "name_unknown"),
    (ssl.SSLError, "tls"),
    (TimeoutError, "timeout"),
    (ConnectionRefusedError, "connection_refused"),
)
