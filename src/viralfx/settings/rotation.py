"""Credentials that change while the program runs: read anew from a file, or from a callable.

Also reads libpq's files of passwords and of services.
"""

import asyncio
import inspect
import logging
import os
import re
import stat
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from viralfx.core.clock import ignore_error
from viralfx.core.errors import ViralFXError
from viralfx.core.threads import in_thread
from viralfx.settings.groups import Secret

Credentials = str | tuple[str, str]
"""A password, or a user and a password."""
CredentialsCallable = Callable[[], Credentials | Awaitable[Credentials]]
"""Returns the credentials for one new connection. It may be a plain or an async function."""

READ_INTERVAL_SECONDS = 1.0
"""A burst of new connections reads a file once."""
CALL_SECONDS = 10.0
"""Time limit for a callable."""
OTHER_LOOP_SECONDS = 2.0
"""How long a connection of another event loop waits for the loop on which the callable runs."""

_logger = logging.getLogger("viralfx.credentials")


class CredentialsError(ViralFXError):
    """The application's callable returned no credentials; the message names the callable."""


class _Masking(Protocol):
    def add(self, secret: str) -> None: ...


_masking: "weakref.WeakSet[_Masking]" = weakref.WeakSet()


def mask_new_secrets(masking: _Masking) -> None:
    """Call ``masking.add`` with each secret that is read from now on, while ``masking`` exists."""
    _masking.add(masking)


def mask(secret: str) -> None:
    """Mask a new secret in each log of this process."""
    for masking in tuple(_masking):
        masking.add(secret)


class RotatingSecret:
    """The current credentials for one server. All connections to it share one object.

    ``name`` is the variable, or the option that holds the callable, and appears in errors and logs.
    ``source``, if given, is called for each connection: an async function on the event loop of the
    first connection, a plain one in a thread. Connections share a call in a thread that has not
    ended. A connection of another event loop, such as that of the thread that renews leases, gets
    the last result if that loop is blocked. Without ``source`` the value of ``secret`` is returned;
    if it came from a file, the file is read again, at most once a second; a pipe, as of a shell's
    ``<(...)``, is read at the start alone. Each new value is masked in the log. May be used from
    several threads.
    """

    def __init__(
        self,
        name: str,
        secret: Secret | None,
        source: CredentialsCallable | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._source = source
        self._path = rotating_path(secret)
        self._value = None if secret is None else secret.value
        self._clock = clock
        self._read_at = clock()
        self._unreadable = False
        self._failing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last: Credentials | None = None
        self._running: asyncio.Task[object] | None = None

    @property
    def rotates(self) -> bool:
        """True if another value may be returned later."""
        return self._source is not None or self._path is not None

    async def current(self, within: float = CALL_SECONDS) -> Credentials | None:
        """Return the credentials for a new connection; None if there are none.

        A file that cannot be read, or is empty, is logged once, and the last value stays in use.
        Raises :class:`CredentialsError` if the callable fails, takes longer than ``within`` or
        10 s, or returns anything else than a password or a pair of user and password.
        """
        if self._source is not None:
            return await self._called_on_its_loop(self._source, min(within, CALL_SECONDS))
        if self._path is not None and self._clock() - self._read_at >= READ_INTERVAL_SECONDS:
            self._read(self._path)
        return self._value

    def refused(self) -> None:
        """Record that the server refused the credentials: the next connection reads the file."""
        self._read_at = float("-inf")

    def _read(self, path: Path) -> None:
        self._read_at = self._clock()
        try:
            value = path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            self._keep(f"cannot read {path}: {why}")
            return
        if not value.strip():
            self._keep(f"{path} is empty")
            return
        self._unreadable = False
        if value != self._value:
            mask(value)
            self._value = value
            _logger.info("Secret changed", extra={"variable": f"{self._name}_FILE"})

    def _keep(self, reason: str) -> None:
        if not self._unreadable:
            _logger.warning(
                "Secret file cannot be read; the last value stays in use",
                extra={"variable": f"{self._name}_FILE", "reason": reason},
            )
        self._unreadable = True

    async def _called_on_its_loop(self, source: CredentialsCallable, limit: float) -> Credentials:
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop.is_closed():
            self._loop, self._running = loop, None
        if self._loop is loop:
            self._last = await self._called(source, limit)
            return self._last
        # Its client, for example of a cloud's token service, belongs to that loop.
        called = asyncio.run_coroutine_threadsafe(self._called(source, limit), self._loop)
        try:
            async with asyncio.timeout(min(limit, OTHER_LOOP_SECONDS)):
                return await asyncio.wrap_future(called)
        except TimeoutError:
            if self._last is None:
                raise CredentialsError(f"{self._name}: the event loop is blocked") from None
            return self._last

    async def _called(self, source: CredentialsCallable, limit: float) -> Credentials:
        try:
            async with asyncio.timeout(limit):
                if inspect.iscoroutinefunction(source):
                    found: object = await source()
                else:
                    found = await self._result_in_thread(source)
        except TimeoutError:
            raise self._failure(source, f"no answer within {limit:.3g} s") from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a boundary to the application
            # Any error means that there are no credentials.
            # Neither the message nor the chain has its text, because it may quote a token.
            raise self._failure(source, f"raised {type(error).__name__}", error) from None
        self._failing = False
        match found:
            case str(password) if password:
                mask(password)
                return password
            case (str(user), str(password)) if user and password:
                mask(password)
                return user, password
        returned = f"returned {type(found).__name__}; return a password, or (user, password)"
        raise self._failure(source, returned)

    async def _result_in_thread(self, source: CredentialsCallable) -> object:
        """Call a function that may block: tokens come from the network.

        Connections share a call that runs, so that one that hangs takes a single thread.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(_in_thread(source), name="credentials")
            # Raised in the callers; if none is left, its text must not reach the log.
            self._running.add_done_callback(ignore_error)
        return await asyncio.shield(self._running)

    def _failure(
        self, source: Any, reason: str, error: BaseException | None = None
    ) -> CredentialsError:
        named = getattr(source, "__qualname__", type(source).__qualname__)
        name = f"{self._name}: {getattr(source, '__module__', '')}.{named}"
        if not self._failing:
            self._failing = True
            extra = {"callable": name, "reason": reason}
            frames = error and CredentialsError(reason).with_traceback(error.__traceback__)
            _logger.warning("Credentials callable failed", exc_info=frames, extra=extra)
        return CredentialsError(f"{name}: {reason}")


def rotating_path(secret: Secret | None) -> Path | None:
    """Return the file of a secret whose content may change; None for a pipe and without one."""
    path = None if secret is None or secret.file is None else Path(secret.file)
    # A read of a pipe without a writer never ends.
    return None if path is not None and path.is_fifo() else path


async def _in_thread(function: Callable[[], object]) -> object:
    """Call a function in a thread that does not delay the end of the process if it hangs."""
    result = await in_thread(function, "credentials")
    if not inspect.isawaitable(result):
        return result
    async with asyncio.timeout(CALL_SECONDS):
        return await result


def check_passfile(path: str | None) -> str | None:
    """Return the path of a file of passwords; None for none.

    Raises ``ValueError`` if it cannot be read, or if others can read it: libpq ignores it then.
    """
    if not path:
        return None
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise ValueError(f"passfile cannot be read: {error.strerror}; correct the path") from None
    if not stat.S_ISREG(mode) or mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(
            "passfile is not a file for its owner alone; run chmod 600, or use DB_PASSWORD_FILE"
        )
    return path


_ENTRY = re.compile(":".join([r"((?:\\.?+|[^:\\])*+)"] * 5) + r"(?::.*)?")
"""A line of a file of passwords: host, port, database, user and password."""


class PasswordFile:
    """Passwords by server, database and user, in the form of libpq's ``~/.pgpass``.

    The file is read for each new connection. If it cannot be read any more, that is logged once,
    and its last content stays in use. Passwords that are found are masked in the log.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._text = ""
        self._unreadable = False

    def read(self) -> str:
        """Return the content of the moment."""
        try:
            self._text = Path(self.path).read_text(encoding="utf-8")
            self._unreadable = False
        except (OSError, UnicodeDecodeError) as error:
            if not self._unreadable:
                reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
                extra = {"path": self.path, "reason": reason}
                message = "Password file cannot be read; its last content stays in use"
                _logger.warning(message, extra=extra)
            self._unreadable = True
        return self._text

    def find(self, host: str, port: int, database: str, user: str) -> str | None:
        """Return the password of the first line that fits; None without one.

        ``localhost`` in the file also stands for each folder of a Unix socket.
        """
        wanted: tuple[set[str], ...] = ({host}, {str(port)}, {database}, {user})
        if host.startswith("/"):
            wanted[0].add("localhost")
        for line in self._text.splitlines():
            if line.startswith("#") or (fields := _ENTRY.fullmatch(line)) is None:
                continue
            # A backslash keeps the next character.
            *place, password = (re.sub(r"\\(.)", r"\1", each) for each in fields.groups())
            if all(text == "*" or text in names for text, names in zip(place, wanted, strict=True)):
                mask(password)
                return password
        return None


def read_service(name: str, path: str | None) -> dict[str, str]:
    """Return the parameters of a service from libpq's file of services.

    Without ``path`` that is the one of ``PGSERVICEFILE``, else ``~/.pg_service.conf``. Raises
    ``ValueError`` without any part of the file, which may hold a password.
    """
    place = Path(path or os.environ.get("PGSERVICEFILE") or "~/.pg_service.conf")
    try:
        text = place.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no home folder, or not UTF-8 text"
        raise ValueError(
            f"service: its file cannot be read: {why}; name it by servicefile"
        ) from None
    _, *parts = re.split(r"^\s*\[([^\]\n]*)\][^\n]*$", text, flags=re.MULTILINE)
    # As in libpq, the first section of a name counts.
    services = dict(zip(parts[-2::-2], parts[::-2], strict=True))
    if name not in services:
        raise ValueError("service: its file has no service of that name; correct the name")
    lines = [line.strip() for line in services[name].splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name.strip(): value.strip() for name, _, value in reversed(pairs)}
