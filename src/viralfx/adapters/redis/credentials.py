"""TLS and credentials of connections; both may change while the program runs."""

import logging
import ssl
from pathlib import Path

from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError

from viralfx.settings import (
    CredentialsCallable,
    CredentialsError,
    RedisSettings,
    RotatingSecret,
    Secret,
)
from viralfx.settings.groups import parse_redis_url
from viralfx.settings.rotation import mask

_logger = logging.getLogger("viralfx.redis")


class TlsContext:
    """The TLS context that all connections share: loading the system's certificates is slow.

    It is loaded again when the CA file has changed.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._ca_file = settings.tls_ca_file
        self._verify = settings.tls_reject_unauthorized
        self._loaded: ssl.SSLContext | None = None
        self._version: tuple[int, int, int] | None = None

    @property
    def context(self) -> ssl.SSLContext:
        """The context for a new connection.

        Raises ``SSLError`` for an unreadable or invalid CA file. Once loaded, the last good content
        of the file stays in use.
        """
        version = self._file_version()
        if self._loaded is None:
            self._loaded, self._version = self._load(), version
        elif version != self._version:
            self._version = version
            try:
                self._loaded = self._load()
            except ssl.SSLError as error:
                _logger.warning(
                    "Redis CA file cannot be used; the last one stays in use",
                    extra={"variable": "REDIS_TLS_CA_FILE", "reason": str(error)},
                )
            else:
                _logger.info("Redis CA file loaded again", extra={"file": self._ca_file})
        return self._loaded

    def _load(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self._ca_file)
        except ssl.SSLError:
            raise
        except OSError as error:
            raise ssl.SSLError(f"cannot read {self._ca_file}: {error.strerror}") from error
        if not self._verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _file_version(self) -> tuple[int, int, int] | None:
        if self._ca_file is None:
            return None
        try:
            found = Path(self._ca_file).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


_Pair = tuple[str] | tuple[str, str]


class Account:
    """User and password of a server at the moment; all connections to it share one object.

    With ``ask``, the application's callable, user and password of the settings have no effect. With
    ``url``, the content of ``REDIS_URL_FILE``, both come from it; it may not lead elsewhere.
    """

    def __init__(
        self,
        variable: str,
        username: str | None,
        password: Secret | None,
        *,
        ask: CredentialsCallable | None = None,
        url: Secret | None = None,
    ) -> None:
        self._username = username
        self._password = RotatingSecret(variable, password, ask)
        self._url = None if url is None else RotatingSecret("REDIS_URL", url)
        self._text = None if url is None else url.value
        self._of_url: _Pair | None = None

    async def current(self) -> _Pair:
        """Return a password, or a user and a password.

        Raises ``AuthenticationError`` if the callable has none.
        """
        if self._url is not None:
            await self._read_url(self._url)
            if self._of_url is not None:
                return self._of_url
        try:
            found = await self._password.current()
        except CredentialsError as error:
            raise AuthenticationError(str(error)) from error
        return found if isinstance(found, tuple) else self._pair(self._username, found)

    def refused(self) -> None:
        """Read the files again for the next login."""
        self._password.refused()
        if self._url is not None:
            self._url.refused()

    async def _read_url(self, url: RotatingSecret) -> None:
        text = await url.current()
        if not isinstance(text, str) or text == self._text:
            return
        self._text = text
        try:
            found = parse_redis_url(text)
        except ValueError as error:
            _logger.warning(
                "Secret file cannot be used; the last value stays in use",
                extra={"variable": "REDIS_URL_FILE", "reason": str(error)},
            )
            return
        password = found.get("REDIS_PASSWORD")
        if password is not None:
            mask(password)
        self._of_url = self._pair(found.get("REDIS_USERNAME"), password)

    @staticmethod
    def _pair(username: str | None, password: str | None) -> _Pair:
        return (username, password or "") if username else (password or "",)


class Login(CredentialProvider):
    """Gives one connection the credentials of the moment."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._used: _Pair | None = None
        self._next: _Pair | None = None

    async def get_credentials_async(self) -> _Pair:
        """Return a password, or a user and a password; raises ``AuthenticationError``."""
        found, self._used, self._next = self._next, None, None
        self._used = found or await self._account.current()
        return self._used

    async def renewed(self) -> bool:
        """Return True if, after the server refused the credentials, there are others.

        The file is read, or the callable called, again; the next login uses the result. Raises
        ``AuthenticationError``. Returns False if there were no credentials to refuse.
        """
        used, self._used = self._used, None
        if used is None:
            return False
        self._account.refused()
        found = await self._account.current()
        if found == used:
            return False
        self._next = found
        return True
