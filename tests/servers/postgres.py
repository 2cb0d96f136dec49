"""Postgres servers for tests."""

import asyncio
import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import asyncpg
from tests.servers.certificates import Certificates
from tests.servers.disk import Disk
from tests.servers.host import Host
from tests.servers.processes import ProcessHost, give, make_folder, reachable, run
from tests.servers.server import Server
from tests.servers.supply import Image, Program, UnavailableError, chosen

T = TypeVar("T")
INITDB = (
    *("--no-sync", "--no-instructions", "--locale=C", "--encoding=UTF8"),
    "--wal-segsize=1",  # MB; a server begins with one such file
)
USER = "viralfx"
SETTINGS = {
    # An unfinished login blocks the dropping of any database.
    "authentication_timeout": "10s",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_wal_size": "256MB",
    # The files of the log are small, see INITDB. So few are kept for later use that a full disk is
    # noticed soon, and enough for a standby that was away for a moment.
    "min_wal_size": "5MB",
    "wal_keep_size": "16MB",
}
"""For speed, and so that many servers fit on one machine; a test may say otherwise."""
_FIRST_WITH_STRATEGIES = 15


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


def transactions(database: Database) -> int:
    """Return the number of transactions of a database so far, committed or not."""
    count = "select xact_commit + xact_rollback from pg_stat_database where datname = '{}'"
    # Asked in another database, so that the question does not count.
    ((number,),) = database.server.execute(count.format(database.name))
    return int(number)


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
        """Return an address of it, percent-encoded; the default is the superuser's."""
        account = f"{quote(user or self.user, safe='')}:{quote(password or self.password, safe='')}"
        place = f"{host or self.host}:{port or self.port}/{quote(database, safe='')}"
        query = f"?{urlencode(parameters, quote_via=quote)}" if parameters else ""
        return f"postgresql://{account}@{place}{query}"

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, outside any transaction; return its rows."""
        return [tuple(row) for row in _run(self._fetch(sql, database))]

    def present(self, certificates: Certificates) -> None:
        """Show another certificate to new connections."""
        self._write(certificates)
        self.execute("select pg_reload_conf()")
        self.tls = certificates

    def create_database(self, template: str = "template0") -> str:
        """Create a copy of a database, an empty one unless said, and return its name."""
        name = f"test_{secrets.token_hex(6)}"
        self.execute(f"create database {name} template {template} {self._strategy}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, and end the sessions that are still in it."""
        self.execute(f'drop database if exists "{name}" with (force)')

    @cached_property
    def _strategy(self) -> str:
        # Copying files costs a fraction of logging each page, which is what servers since 15 do.
        ((number,),) = self.execute("select current_setting('server_version_num')::int / 10000")
        return "strategy file_copy" if number >= _FIRST_WITH_STRATEGIES else ""

    @property
    def disk(self) -> Disk | None:
        """The disk of its own, if it has one."""
        return self._host.disk if isinstance(self._host, PostgresProcess) else None

    @property
    def running(self) -> bool:
        """True while its first process runs."""
        return self._host.running()

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
            # Of the tests' own statements alone: those of the program must name their schema.
            server_settings={"search_path": "public, viralfx_ops"},
        )
        try:
            return await connection.fetch(sql)
        finally:
            await connection.close(timeout=5)

    def _prepare(self) -> None:
        # Each file is the server's user's own; Postgres insists on that for the key.
        host, tls = self._host, self.tls
        kind = "host" if tls is None else "hostssl"
        rules = "".join(
            f"{line}\n"
            for line in (
                "local all all trust",
                f"{kind} all all all scram-sha-256",
                f"{kind} replication all all scram-sha-256",
            )
        )
        self._settings |= {
            "listen_addresses": host.listen,
            "port": str(host.listen_port),
            "hba_file": host.write("pg_hba.conf", rules.encode()),
        }
        if tls is not None:
            certificate, key = self._write(tls)
            self._settings |= {"ssl": "on", "ssl_cert_file": certificate, "ssl_key_file": key}

    def _write(self, tls: Certificates) -> tuple[str, str]:
        write = self._host.write
        return (
            write("server.pem", tls.certificate.read_bytes()),
            write("server.key", tls.key.read_bytes()),
        )

    def _arguments(self) -> Sequence[str]:
        pairs = (part for item in self._settings.items() for part in ("-c", "=".join(item)))
        return [*self._first_arguments, *pairs]

    def _responds(self) -> bool:
        # With TLS, a connection that is rejected during the start leaks a transport. An image first
        # starts a server that is not reachable from outside, and the log may hold an earlier run.
        newest = self.log().rpartition("starting PostgreSQL")[2]
        if "listening on IPv4" not in newest or "ready to accept" not in newest:
            return False
        try:
            return self.execute("select 1") == [(1,)]
        except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError):
            return False


class PostgresProcess(ProcessHost):
    """A Postgres process with its data folder."""

    def __init__(self, postgres: Path, *, mebibytes: int | None = None) -> None:
        # Closed by its immediate stop: after a SIGKILL its children are not reaped.
        super().__init__(postgres, stop_signal=Signals.SIGINT, close_signal=Signals.SIGQUIT)
        self.data = self.path / "data"
        self.disk = None if mebibytes is None else Disk(self.data, mebibytes)

    def close(self) -> None:
        """End it and remove its data."""
        if self.disk is not None:
            self.disk.close()
        super().close()

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


_SHARED = "VIRALFX_TEST_SHARED_FOLDER"
_PREPARE = """\
UPDATE pg_database SET datistemplate = false WHERE datname = 'template1'
DROP DATABASE template1
SELECT set_config(name, '1', false) FROM pg_settings WHERE name = 'scram_iterations'
ALTER USER {user} PASSWORD '{password}'
"""
# The usual 4096 iterations protect weak passwords, for more than half of the cost of connecting.


def share_folder() -> None:
    """Let the test processes that this one starts share the folder that servers begin with."""
    if _SHARED not in os.environ:
        os.environ[_SHARED] = str(make_folder())


@cache
def _template(postgres: Path) -> tuple[Path, str]:
    """Return a data folder to copy, and the superuser's password in it."""
    if (shared := os.environ.get(_SHARED)) is None:
        return _made(postgres, make_folder())
    folder = Path(shared, "-".join(postgres.parts[1:]))
    with Path(shared, "lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _made(postgres, give(folder))
            done.touch()
    return folder / "data", (folder / "password").read_text(encoding="ascii")


def _made(postgres: Path, folder: Path) -> tuple[Path, str]:
    password = secrets.token_hex(12)
    secret = folder / "password"
    secret.touch(mode=0o600)
    secret.write_text(password, encoding="ascii")
    options = ("--auth=scram-sha-256", f"--username={USER}", f"--pwfile={give(secret)}")
    data = folder / "data"
    # Most of the cost of a server is the copy of its folder: without the second empty database, and
    # with a log of 1 MB, that is 17 MB instead of 39.
    run([postgres.with_name("initdb"), "-D", data, *options, *INITDB], cwd=folder)
    statements = _PREPARE.format(user=USER, password=password)
    single = ("--single", "-D", data, "-c", "fsync=off", "postgres")
    run([postgres, *single], cwd=folder, given=statements)
    return data, password


@contextmanager
def postgres_server(
    *,
    tls: Certificates | None = None,
    settings: Mapping[str, str] | None = None,
    mebibytes: int | None = None,
) -> Iterator[PostgresServer]:
    """Run a Postgres of its own; with ``tls`` it rejects plain text.

    ``settings`` are configuration parameters; ``mebibytes`` is the size of a disk of its own.
    Raises ``UnavailableError``.
    """
    supply = chosen()
    source = supply.postgres if tls is None else supply.tls_postgres
    if source is None:
        raise UnavailableError(f"no Postgres that speaks TLS in the tier {supply.tier}")
    with _make(source, tls, settings or {}, mebibytes) as server:
        yield server


@contextmanager
def postgres_standby(
    primary: PostgresServer, *, port: int | None = None, mebibytes: int | None = None
) -> Iterator[PostgresServer]:
    """Run a copy of a server that follows it, by the name ``standby``, until it is promoted.

    It follows through ``port`` of this machine, if there is a proxy. Raises ``UnavailableError``.
    """
    source = chosen().postgres
    if isinstance(source, Image):
        raise UnavailableError("no standby of a server in a container")
    postgres = reachable(source.path)
    place = f"host={primary.host} user={primary.user} password={primary.password}"
    host = PostgresProcess(postgres, mebibytes=mebibytes)
    copy = ("--checkpoint=fast", "--no-sync", "--no-manifest", "--wal-method=stream")
    try:
        run(
            [
                postgres.with_name("pg_basebackup"),
                *("-d", f"{place} port={primary.port}", "-D", host.data),
                *copy,
            ],
            cwd=host.path,
        )
        run(["touch", host.data / "standby.signal"], cwd=host.path)
    except BaseException:
        host.close()
        raise
    settings = {
        "primary_conninfo": f"{place} port={port or primary.port} application_name=standby",
        "wal_retrieve_retry_interval": "200ms",
    }
    with _on(host, primary.password, settings) as server:
        yield server


def _make(
    source: Program | Image,
    tls: Certificates | None,
    settings: Mapping[str, str],
    mebibytes: int | None,
) -> PostgresServer:
    if isinstance(source, Image):
        if mebibytes is not None:
            raise UnavailableError("no disk of its own for a server in a container")
        return _in_container(source, tls, settings)
    postgres = reachable(source.path)
    template, password = _template(postgres)
    host = PostgresProcess(postgres, mebibytes=mebibytes)
    run(["cp", "-R", "-p", f"{template}/.", host.data], cwd=host.path)
    return _on(host, password, settings, tls)


def _on(
    host: PostgresProcess,
    password: str,
    settings: Mapping[str, str],
    tls: Certificates | None = None,
) -> PostgresServer:
    own = {
        "unix_socket_directories": "",
        # Below the data folder, so that nothing is left in /dev/shm after a SIGKILL.
        "dynamic_shared_memory_type": "mmap",
    }
    arguments = ["-D", str(host.data)]
    return PostgresServer(
        host, password=password, arguments=arguments, settings={**own, **settings}, tls=tls
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
