"""Redis servers for tests."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from tests.servers.certificates import Certificates
from tests.servers.host import Host
from tests.servers.ports import free_port
from tests.servers.processes import ProcessHost, reachable
from tests.servers.server import Server
from tests.servers.supply import Image, chosen
from tests.servers.tls_terminator import TlsTerminator

CONFIGURATION = "redis.conf"
FILLER = "filler:"
PROGRAM, USER = "redis-server", "redis"
"""The command of a container, and its user."""


class RedisServer(Server):
    """A Redis, or Valkey, of its own.

    Without persistence unless ``arguments`` ask for it: ``["--appendonly", "yes"]``.
    """

    def __init__(
        self,
        host: Host,
        *,
        password: str | None = None,
        tls: Certificates | None = None,
        arguments: Sequence[str] = (),
        lines: Sequence[str] = (),
        may_move: bool = True,
    ) -> None:
        super().__init__(host, may_move=may_move)
        self.password = password
        self.tls = tls
        self._more_arguments = arguments
        self._lines = ['save ""', "appendonly no", *lines]

    def url(self, database: int = 0) -> str:
        """Return an address of it, with its password."""
        account = f":{quote(self.password, safe='')}@" if self.password else ""
        scheme = "redis" if self.tls is None else "rediss"
        return f"{scheme}://{account}{self.host}:{self.port}/{database}"

    def command(self, *arguments: str | bytes | float) -> Any:
        """Run one command on a connection of its own; texts come decoded."""
        client = redis.Redis(
            self.host,
            self.port,
            password=self.password,
            ssl=self.tls is not None,
            ssl_ca_certs=None if self.tls is None else str(self.tls.ca),
            socket_timeout=5,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=True,
        )
        with closing(client):
            execute: Callable[..., Any] = client.execute_command
            return execute(*arguments)

    def flush(self) -> None:
        """Remove all keys, and scripts."""
        self.command("FLUSHALL")
        self.command("SCRIPT", "FLUSH")

    def fill(self) -> None:
        """Set a limit of memory that is exceeded already: it refuses writes that need memory."""
        self.command("CONFIG", "SET", "maxmemory", 100_000)

    def unfill(self) -> None:
        """Remove the limit of memory."""
        self.command("CONFIG", "SET", "maxmemory", 0)

    def role(self) -> str | None:
        """Return ``master`` or ``slave``; None when it does not say.

        A Sentinel that changes the role closes the connections of all clients.
        """
        try:
            return str(self.command("ROLE")[0])
        except redis.ConnectionError:
            return None

    def loading(self, seconds: float) -> None:
        """Restart it so that it answers ``-LOADING`` for about so long; return when it does.

        It keeps its data, and has a thousand more keys afterwards.
        """
        keys = 1000
        fill = "for i = 1, ARGV[1] do redis.call('SET', ARGV[2] .. i, i) end"
        self.command("EVAL", fill, 0, keys, FILLER)
        self.command("SAVE")
        self.kill()
        self._configure(
            f"key-load-delay {int(seconds * 1_000_000 / keys)}",
            "loading-process-events-interval-bytes 1024",
        )
        self._host.start(self._arguments())
        self._wait(self._loads)
        self._configure()

    def _configure(self, *more: str) -> None:
        host = self._host
        lines = [f"bind {host.listen}", f"dir {host.folder}", "protected-mode no"]
        if self.tls is None or host.terminates_tls:
            lines.append(f"port {host.listen_port}")
        else:
            lines += ["port 0", f"tls-port {host.listen_port}", "tls-auth-clients no"]
            for name, source in (("cert", self.tls.certificate), ("key", self.tls.key)):
                lines.append(f"tls-{name}-file {host.write(source.name, source.read_bytes())}")
            lines.append(f"tls-ca-cert-file {host.write('ca.pem', self.tls.ca.read_bytes())}")
        if self.password:
            lines.append(f'requirepass "{self.password}"')
        host.write(CONFIGURATION, "\n".join([*lines, *self._lines, *more, ""]).encode())

    def _prepare(self) -> None:
        self._configure()

    def _arguments(self) -> Sequence[str]:
        return [f"{self._host.folder}/{CONFIGURATION}", *self._more_arguments]

    def _responds(self) -> bool:
        try:
            return bool(self.command("PING"))
        except redis.ConnectionError as error:  # also while it loads
            if isinstance(error, redis.AuthenticationError):
                raise
            return False

    def _loads(self) -> bool:
        try:
            self.command("PING")
        except redis.BusyLoadingError:
            return True
        except redis.ConnectionError:
            return False
        raise AssertionError("loaded before it was seen loading")


def cluster_node() -> list[str]:
    """Return the arguments of a node of a cluster: by default its second port is 10000 higher."""
    return ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]


def redis_host(*, tls: Certificates | None = None) -> Host:
    """Return a place for one Redis, which speaks TLS to its clients if it has to."""
    source = chosen().redis
    if isinstance(source, Image):
        # Not above: only a run with containers pays for these imports.
        from tests.servers.containers import ContainerHost  # noqa: PLC0415 - see above

        return ContainerHost(source, program=PROGRAM, user=USER, inside=6379)
    host = ProcessHost(reachable(source.path))
    return host if tls is None or source.speaks_tls else TlsTerminator(host, tls)


@contextmanager
def redis_hosts(count: int) -> Iterator[list[Host]]:
    """Return places for servers that reach each other where clients reach them."""
    source = chosen().redis
    if not isinstance(source, Image):
        yield [redis_host() for _ in range(count)]
        return
    from tests.servers.containers import neighbours  # noqa: PLC0415 - see redis_host

    with neighbours(source, program=PROGRAM, user=USER, count=count) as hosts:
        yield hosts


@contextmanager
def redis_server(
    *,
    password: str | None = None,
    tls: Certificates | None = None,
    arguments: Sequence[str] = (),
    users: Sequence[str] = (),
    port: int | None = None,
) -> Iterator[RedisServer]:
    """Run a Redis of its own; with ``tls`` it rejects plain text.

    ``arguments`` are the program's; ``users`` are lines of the access control list, such as
    ``alice on >secret ~* +@all``. Raises ``UnavailableError``, and
    ``PortTakenError`` when there is no way to get a ``port`` that was asked for.
    """
    host = redis_host(tls=tls)
    if port is not None:
        host.port = port
    lines = [f"user {user}" for user in users]
    with RedisServer(
        host,
        password=password,
        tls=tls,
        arguments=arguments,
        lines=lines,
        may_move=port is None,
    ) as server:
        yield server
