"""Credentials and certificates of the moment: they may change while the program runs."""

import getpass
import logging
import os
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from viralfx.core.errors import ViralFXError
from viralfx.settings import (
    CredentialsCallable,
    DatabaseAddress,
    DatabaseSettings,
    RotatingSecret,
    Secret,
)
from viralfx.settings.dsn import parse_database_url
from viralfx.settings.rotation import PasswordFile, mask

_logger = logging.getLogger("viralfx.database")


class CertificateError(ViralFXError, OSError):
    """A file with certificates or a key cannot be used; the text begins with its variable."""

    def __init__(
        self, variable: str, path: str, expected: str, error: OSError | None = None
    ) -> None:
        """``path`` does not hold the ``expected`` content."""
        reason = "" if error is None else f": {error.strerror or error}"
        self.problem = f"{path} holds no {expected}{reason}"
        self.variable = variable
        super().__init__(f"{variable}: {self.problem}")


class _Context(ssl.SSLContext):
    """Verifies the name in the configuration; the driver knows only its address."""

    loaded: ssl.SSLContext
    """Has the certificates; the contexts of all hosts share it."""
    server_name: str

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 - as its base
        server_hostname: str | bytes | None = None,  # noqa: ARG002 - an address
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """See ``ssl.SSLContext.wrap_bio``."""
        return self.loaded.wrap_bio(incoming, outgoing, server_side, self.server_name, session)


class TlsContexts:
    """The TLS contexts for the hosts of the configuration, from the files of the moment.

    May be used from several threads.
    """

    def __init__(self, settings: DatabaseSettings, address: DatabaseAddress | None = None) -> None:
        """Load the certificates; raises :class:`CertificateError` if they cannot be used.

        ``address`` has the versions of TLS and the passphrase of the key.
        """
        self._settings = settings
        self._versions = (address and address.tls_versions) or ("TLSv1.2", "TLSv1.3")
        self._key_password = None if address is None else address.key_password
        self._files = {
            "DB_TLS_CA_FILE": settings.tls_ca_file,
            "DB_TLS_CERT_FILE": settings.tls_cert_file,
            "DB_TLS_KEY_FILE": settings.tls_key_file,
        }
        self._lock = threading.Lock()
        self._state = self._state_of_files()
        self._loaded = None if settings.tls_mode == "disable" else self._load()

    def for_host(self, host: str) -> ssl.SSLContext | bool:
        """Return asyncpg's ``ssl`` for a host.

        It is always explicit, so that the driver does not search for certificate files itself. If
        the files have changed and cannot be used, the last good ones stay in use.
        """
        if self._loaded is None or host.startswith("/"):
            return False
        with self._lock:
            if (state := self._state_of_files()) != self._state:
                self._state = state
                self._renew()
            loaded = self._loaded
        context = _Context(ssl.PROTOCOL_TLS_CLIENT)
        context.loaded, context.server_name = loaded, host
        return context

    def _state_of_files(self) -> Sequence[tuple[int, int, int] | None]:
        return [_state_of_file(path) for path in self._files.values() if path is not None]

    def _renew(self) -> None:
        try:
            self._loaded = self._load()
        except CertificateError as error:
            _logger.warning(
                "Certificates cannot be used; the last good ones stay in use",
                extra={"reason": str(error)},
            )
            return
        _logger.info("Certificates have changed")

    def _load(self) -> ssl.SSLContext:
        mode, ca_file = self._settings.tls_mode, self._settings.tls_ca_file
        # As in libpq: encrypted, but the certificate is verified only against a CA file.
        is_verified = ca_file is not None or mode not in {"prefer", "require"}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca_file is None and is_verified:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        elif ca_file is not None:
            try:
                context.load_verify_locations(cafile=ca_file)
            except OSError as error:
                raise CertificateError("DB_TLS_CA_FILE", ca_file, "certificates", error) from None
        self._load_own(context)
        low, high = self._versions
        if low == "TLSv1.3":
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        if high == "TLSv1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = mode == "verify-full"
        context.verify_mode = ssl.CERT_REQUIRED if is_verified else ssl.CERT_NONE
        return context

    def _load_own(self, context: ssl.SSLContext) -> None:
        certificate, key = self._settings.tls_cert_file, self._settings.tls_key_file
        if certificate is None or key is None:
            return

        def passphrase() -> str:
            if self._key_password is None:
                # OpenSSL would ask for it on the terminal.
                expected = "key without a passphrase; set sslpassword in the address"
                raise CertificateError("DB_TLS_KEY_FILE", key, expected)
            return self._key_password

        try:
            context.load_cert_chain(certificate, key, password=passphrase)
        except CertificateError:
            raise
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                what = f"key of the certificate in {certificate}"
                raise CertificateError("DB_TLS_KEY_FILE", key, what) from None
            is_certificate = _holds_certificate(certificate)
            kind = "PEM format" if self._key_password is None else "PEM format for sslpassword"
            variable, path, what = (
                ("DB_TLS_KEY_FILE", key, f"private key in {kind}")
                if is_certificate
                else ("DB_TLS_CERT_FILE", certificate, "certificate in PEM format")
            )
            raise CertificateError(variable, path, what, error) from None
        except OSError as error:
            raise CertificateError("DB_TLS_CERT_FILE", certificate, "certificate", error) from None


def _holds_certificate(path: str) -> bool:
    try:
        ssl.create_default_context(cafile=path)
    except OSError:
        return False
    return True


def _state_of_file(path: str) -> tuple[int, int, int] | None:
    try:
        state = Path(path).stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


@dataclass(frozen=True, slots=True)
class Login:
    """Where and as whom to log in."""

    address: DatabaseAddress
    user: str | None
    password: str | None = field(repr=False)
    passwords: str | None = field(default=None, repr=False)
    """The content of the address's file of passwords, if there is no other password."""
    file: PasswordFile | None = field(default=None, repr=False)

    def password_for(self, host: str, port: int) -> str | None:
        """Return the password for one of the address's servers."""
        if self.password is not None or self.file is None:
            return self.password
        # As the driver does.
        user = self.user or os.environ.get("PGUSER") or getpass.getuser()
        database = self.address.database or os.environ.get("PGDATABASE") or user
        return self.file.find(host, port, database, user)


class Logins:
    """The address, user and password of the moment."""

    def __init__(
        self,
        address: DatabaseAddress,
        *,
        url: Secret | None,
        variable: str,
        password: Secret | None,
        ask_password: CredentialsCallable | None,
    ) -> None:
        """``variable`` set the ``url``, which held the ``address``.

        ``ask_password`` wins over ``password``, and that over the one in the address.
        """
        self._address = address
        self._url = RotatingSecret(variable, url)
        self._variable = f"{variable}_FILE"
        self._text = None if url is None else url.value
        name = "DB_PASSWORD" if ask_password is None else "OperationsConfig.database_password"
        self._password = RotatingSecret(name, password, ask_password)
        self._file: PasswordFile | None = None

    async def current(self, within: float) -> Login:
        """Return them within some seconds; raises :class:`CredentialsError`."""
        url = await self._url.current()
        if isinstance(url, str) and url != self._text:
            self._text = url
            self._change(url)
        address = self._address
        match await self._password.current(within):
            case None if address.password is None and address.passfile is not None:
                if self._file is None or self._file.path != address.passfile:
                    self._file = PasswordFile(address.passfile)
                return Login(address, address.user, None, self._file.read(), self._file)
            case None:
                return Login(address, address.user, address.password)
            case str(password):
                return Login(address, address.user, password)
            case user, password:
                return Login(address, user, password)

    def refused(self) -> None:
        """Read the files again for the next login."""
        self._url.refused()
        self._password.refused()

    def _change(self, url: str) -> None:
        try:
            address = parse_database_url(url)
            reason = "names another database; restart the program to use it"
        except ValueError as error:
            address, reason = None, str(error)
        if address is None or address.database != self._address.database:
            extra = {"variable": self._variable, "reason": reason}
            _logger.warning("Secret file cannot be used; the last value stays in use", extra=extra)
            return
        if address.password is not None:
            mask(address.password)
        self._address = address
