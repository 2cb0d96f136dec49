"""Postgres servers for tests."""

import asyncio
import ctypes
import secrets
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import asyncpg
from tests.servers.certificates import Certificates
from tests.servers.host import Host
from tests.servers.processes import ProcessHost, give, make_folder, reachable, run
from tests.servers.server import Server
from tests.servers.supply import Image, Program, UnavailableError, chosen

T = TypeVar("T")
INITDB = ("--no-sync", "--no-instructions", "--locale=C", "--encoding=UTF8")
USER = "viralfx"
SETTINGS = {
    # Who is half way through a login holds up the dropping of any database.
    "authentication_timeout": "10s",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_wal_size": "256MB",
}
"""For speed, and so that many servers fit on one machine; a test may say otherwise."""


@dataclass(frozen=True)
class Database:
    """One database of a server."""

    server: "PostgresServer"
    name: str

    @property
    def url(self) -> str:
        """Its address with user and password."""
        return self.server.url(self.name)

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser."""
        return self.server.execute(sql, self.name)


class PostgresServer(Server):
    """A cluster of its own, with one superuser and password authentication."""

    user = USER

    def __init__(
        self,
        host: Host,
        *,
        password: str,
        arguments: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
        tls: Certificates | None = None,
    ) -> None:
        super().__init__(host)
        self.password = password
        self.tls = tls
        self._first_arguments = arguments
        self._settings = {**SETTINGS, **(settings or {})}

    def url(
        self,
        database: str = "postgres",
        *,
        user: str | None = None,
        password: str | None = None,
        host: str | None = None,
        port: int | None = None,
        **parameters: str,
    ) -> str:
        """Return an address of it, percent-encoded; what is not given is the superuser's."""
        account = f"{quote(user or self.user, safe='')}:{quote(password or self.password, safe='')}"
        place = f"{host or self.host}:{port or self.port}/{quote(database, safe='')}"
        query = f"?{urlencode(parameters, quote_via=quote)}" if parameters else ""
        return f"postgresql://{account}@{place}{query}"

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, outside any transaction; return its rows."""
        return [tuple(row) for row in _run(self._fetch(sql, database))]

    def create_database(self, template: str = "template0") -> str:
        """Create a copy of a database, an empty one unless said, and return its name."""
        name = f"test_{secrets.token_hex(6)}"
        self.execute(f"create database {name} template {template}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, and end the sessions that are still in it."""
        self.execute(f'drop database if exists "{name}" with (force)')

    async def _fetch(self, sql: str, database: str) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(
            host=self.host,
            port=self.port,
            user=self.user,
            password=self.password,
            database=database,
            ssl=self.tls.client_context() if self.tls else False,
            timeout=5,
            command_timeout=20,
        )
        try:
            return await connection.fetch(sql)
        finally:
            await connection.close(timeout=5)

    def _prepare(self) -> None:
        # Each file is the server's user's own; Postgres insists on that for the key.
        host, tls = self._host, self.tls
        kind = "host" if tls is None else "hostssl"
        rules = f"local all all trust\n{kind} all all all scram-sha-256\n"
        self._settings |= {
            "listen_addresses": host.listen,
            "port": str(host.listen_port),
            "hba_file": host.write("pg_hba.conf", rules.encode()),
        }
        if tls is not None:
            self._settings |= {
                "ssl": "on",
                "ssl_cert_file": host.write("server.pem", tls.certificate.read_bytes()),
                "ssl_key_file": host.write("server.key", tls.key.read_bytes()),
            }

    def _arguments(self) -> Sequence[str]:
        pairs = (part for item in self._settings.items() for part in ("-c", "=".join(item)))
        return [*self._first_arguments, *pairs]

    def _answers(self) -> bool:
        # What is refused while it starts leaves a transport behind when TLS is spoken. An image
        # first starts one that nobody outside reaches, and it may have run before.
        newest = self.log().rpartition("starting PostgreSQL")[2]
        if "listening on IPv4" not in newest or "ready to accept" not in newest:
            return False
        try:
            return self.execute("select 1") == [(1,)]
        except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError):
            return False


class PostgresProcess(ProcessHost):
    """A Postgres process with its data folder."""

    def __init__(self, postgres: Path, template: Path) -> None:
        # Closed by its immediate stop: after a SIGKILL nobody collects its children.
        super().__init__(postgres, stop_signal=Signals.SIGINT, close_signal=Signals.SIGQUIT)
        self.data = self.path / "data"
        run(["cp", "-R", "-p", template, self.data], cwd=self.path)

    def kill(self) -> None:
        """End it with its children, and release what they shared."""
        super().kill()
        # It had no time to give back its piece of System V memory, which no process owns.
        try:
            line = (self.data / "postmaster.pid").read_text(encoding="ascii").split("\n")[6]
        except (FileNotFoundError, IndexError):
            return
        remove = 0  # IPC_RMID
        ctypes.CDLL(None).shmctl(int(line.split()[1]), remove, None)


@cache
def _template(postgres: Path) -> tuple[Path, str]:
    """Return a data folder to copy, and the superuser's password in it."""
    folder, password = make_folder(), secrets.token_hex(12)
    secret = folder / "password"
    secret.touch(mode=0o600)
    secret.write_text(password, encoding="ascii")
    options = ("--auth=scram-sha-256", f"--username={USER}", f"--pwfile={give(secret)}")
    data = folder / "data"
    run([postgres.with_name("initdb"), "-D", data, *options, *INITDB], cwd=folder)
    return data, password


@contextmanager
def postgres_server(
    *, tls: Certificates | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[PostgresServer]:
    """Run a Postgres of its own; with ``tls`` it answers nobody in plain text.

    ``settings`` are configuration parameters. Raises ``UnavailableError``.
    """
    supply = chosen()
    source = supply.postgres if tls is None else supply.tls_postgres
    if source is None:
        raise UnavailableError(f"no Postgres that speaks TLS in the tier {supply.tier}")
    with _make(source, tls, settings) as server:
        yield server


def _make(
    source: Program | Image, tls: Certificates | None, settings: Mapping[str, str] | None
) -> PostgresServer:
    if isinstance(source, Image):
        return _in_container(source, tls, settings or {})
    postgres = reachable(source.path)
    template, password = _template(postgres)
    host = PostgresProcess(postgres, template)
    own = {
        "unix_socket_directories": "",
        # Below the data folder, so that nothing is left in /dev/shm after a SIGKILL.
        "dynamic_shared_memory_type": "mmap",
    }
    arguments = ["-D", str(host.data)]
    return PostgresServer(
        host, password=password, arguments=arguments, settings={**own, **(settings or {})}, tls=tls
    )


def _in_container(
    image: Image, tls: Certificates | None, settings: Mapping[str, str]
) -> PostgresServer:
    # Not above: only a run with containers pays for these imports.
    from tests.servers.containers import ContainerHost  # noqa: PLC0415 - see above

    password = secrets.token_hex(12)
    environment = {
        "POSTGRES_USER": USER,
        "POSTGRES_PASSWORD": password,
        "POSTGRES_DB": "postgres",
        "POSTGRES_INITDB_ARGS": " ".join(INITDB),
    }
    host = ContainerHost(
        image, program="postgres", user="postgres", inside=5432, environment=environment
    )
    return PostgresServer(host, password=password, settings=settings, tls=tls)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end in a thread of its own: the caller's may have a running event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
