"""PgBouncer in front of a Postgres of a test."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import Signals

import psutil
from tests.servers.certificates import Certificates
from tests.servers.host import Host
from tests.servers.postgres import PostgresServer
from tests.servers.processes import ProcessHost, reachable
from tests.servers.server import Server
from tests.servers.supply import UnavailableError
from tests.servers.waiting import wait_until
from tests.soak import SOAK

CONFIGURATION, USERS = "pgbouncer.ini", "users.txt"
MODES = ("session", "transaction")
PREPARED = (0, 200)
"""Values of ``max_prepared_statements``: statements that the pooler follows for each client."""
POOLED = [(mode, number) for mode in MODES for number in PREPARED] if SOAK else [("transaction", 0)]
"""Where contract suites run: everywhere in a soak run, else where a pooler allows least."""


class PgBouncer(Server):
    """A pooler with the accounts of a server; any database of the server can be named."""

    def __init__(
        self,
        host: Host,
        server: PostgresServer,
        mode: str,
        *,
        port: int | None = None,
        users: dict[str, str] | None = None,
        tls: Certificates | None = None,
        **settings: object,
    ) -> None:
        """``port``: where the server is found, such as that of a proxy in front of it."""
        super().__init__(host)
        self.server = server
        self.mode = mode
        self._port = port or server.port
        self._users = {server.user: server.password, **(users or {})}
        self._tls = tls
        self._settings = settings

    def pause(self) -> None:
        """Let clients wait for the server.

        In transaction mode it returns when no connection to the server is left. In session mode
        clients that have one keep it.
        """
        self._signal(Signals.SIGUSR1)
        if self.mode == "transaction":
            wait_until(lambda: not self._server_connections(), what=self.log)

    def resume(self) -> None:
        """Serve clients again."""
        self._signal(Signals.SIGUSR2)

    def set(self, **settings: object) -> None:
        """Change settings, in force after its next start."""
        self._settings |= settings
        self._prepare()

    def _signal(self, number: Signals) -> None:
        os.kill(self.pids[0], number)

    def _server_connections(self) -> int:
        process = psutil.Process(self.pids[0])
        found = process.net_connections("tcp")
        return sum(bool(each.raddr) and each.raddr.port == self._port for each in found)

    def _prepare(self) -> None:
        host, server = self._host, self.server
        users = "".join(f'"{name}" "{password}"\n' for name, password in self._users.items())
        settings: dict[str, object] = {
            "listen_addr": host.listen,
            "listen_port": host.listen_port,
            "unix_socket_dir": "",
            "pool_mode": self.mode,
            "auth_type": "scram-sha-256",
            "auth_file": host.write(USERS, users.encode()),
            "max_client_conn": 500,
            # A server that comes back is found at once; 15 s would be usual.
            "server_login_retry": 0.2,
            "log_connections": 0,
            "log_disconnections": 0,
            **self._settings,
        }
        if self._tls is not None:
            for name, source in (("cert", self._tls.certificate), ("key", self._tls.key)):
                path = host.write(source.name, source.read_bytes())
                settings[f"client_tls_{name}_file"] = path
            settings["client_tls_sslmode"] = "require"
        place = f"host={server.host} port={self._port}"
        lines = [f"{name} = {value}" for name, value in settings.items()]
        text = "\n".join(["[databases]", f"* = {place}", "[pgbouncer]", *lines, ""])
        host.write(CONFIGURATION, text.encode())

    def _arguments(self) -> Sequence[str]:
        return [CONFIGURATION]

    def _responds(self) -> bool:
        return True  # it listens once it has started


def program() -> Path:
    """Return the program. Raises ``UnavailableError`` where there is none on this machine."""
    found = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        raise UnavailableError("pgbouncer is not on PATH; Debian's package pgbouncer has it")
    return Path(found)


@contextmanager
def pgbouncer(server: PostgresServer, mode: str, **settings: object) -> Iterator[PgBouncer]:
    """Run a PgBouncer in front of a server; the arguments are those of :class:`PgBouncer`.

    Raises ``UnavailableError``.
    """
    # SIGTERM waits for all clients to leave, SIGQUIT for none.
    host = ProcessHost(
        reachable(program()), stop_signal=Signals.SIGQUIT, close_signal=Signals.SIGQUIT
    )
    with PgBouncer(host, server, mode, **settings) as pooler:  # type: ignore[arg-type]  # as given
        yield pooler


Poolers = Callable[..., PgBouncer]
"""Puts a PgBouncer in front of a server until the end of the test: server, mode, settings."""
