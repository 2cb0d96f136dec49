"""How Postgres is reached and used: the adapter's own configuration, in seconds."""

import ssl
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresConfig:
    """Address, credentials, TLS, sizes and limits. Durations are seconds."""

    host: str
    """A host name or address, or the folder of a Unix socket."""
    port: int = 5432
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: str | None = None
    schema: str | None = None
    """Where unqualified names are looked up and made; None: the user's own search path."""
    application_name: str = "viralfx"
    tls_mode: str = "prefer"
    """As libpq's ``sslmode``: disable, prefer, require, verify-ca or verify-full."""
    tls_ca_file: str | None = None
    pool_min: int = 2
    pool_max: int = 10
    pool_timeout: float = 30.0
    connection_timeout: float = 30.0
    statement_timeout: float = 60.0
    """The server cancels a statement that runs longer; 0: never."""
    slow_query_threshold: float = 1.0
    """A query that takes as long is logged; 0: none is."""
    doubt_after: float = 2.0
    """A connection that is waited for or in use longer is a reason to look at the database."""
    connect_attempts: int = 5
    connect_delay: float = 5.0

    @property
    def address(self) -> str:
        """Where it is, for people: without credentials."""
        return f"{self.host}:{self.port}/{self.database or ''}"

    def connect_arguments(self) -> dict[str, Any]:
        """Return what ``asyncpg.connect`` takes.

        Raises ``OSError`` (``ssl.SSLError`` included) for certificates that cannot be used.
        """
        settings = {
            "application_name": self.application_name,
            # A plan that was made while a table was empty, and kept, would read all of it later.
            "plan_cache_mode": "force_custom_plan",
        }
        if self.statement_timeout:
            settings["statement_timeout"] = str(max(1, round(self.statement_timeout * 1000)))
        if self.schema:
            quoted = self.schema.replace('"', '""')
            settings["search_path"] = f'"{quoted}"'
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "database": self.database,
            "timeout": self.connection_timeout,
            # The server ends a statement; this is for a server that does not answer any more.
            "command_timeout": self.statement_timeout + 5.0 if self.statement_timeout else None,
            "server_settings": settings,
            "ssl": self.tls(),
            # Said, or the driver looks for them in variables of the environment.
            "direct_tls": False,
            "target_session_attrs": "any",
        }

    def tls(self) -> ssl.SSLContext | bool:
        """Return asyncpg's ``ssl``: what is verified is decided here and not by files it finds."""
        if self.tls_mode == "disable" or self.host.startswith("/"):
            return False
        context = ssl.create_default_context(cafile=self.tls_ca_file)
        context.check_hostname = self.tls_mode == "verify-full"
        if self.tls_mode in {"prefer", "require"}:
            # As libpq: encrypted, but whoever answers is believed, unless there is a CA file.
            context.verify_mode = ssl.CERT_REQUIRED if self.tls_ca_file else ssl.CERT_NONE
        return context
