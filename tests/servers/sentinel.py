"""A primary and a replica under the watch of three Sentinels."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import redis
from tests.servers.redis import RedisServer, redis_hosts
from tests.servers.waiting import wait_until

NAME = "viralfx-primary"
QUORUM = 2


class SentinelSetup:
    """What ``sentinel_setup`` runs. Each member may be frozen, killed and started again."""

    def __init__(
        self, servers: list[RedisServer], sentinels: list[RedisServer], *, name: str
    ) -> None:
        self.name = name
        self.servers = servers
        self.sentinel_servers = sentinels
        self._killed: RedisServer | None = None

    @property
    def sentinels(self) -> list[tuple[str, int]]:
        """The addresses of the Sentinels."""
        return [(server.host, server.port) for server in self.sentinel_servers]

    @property
    def password(self) -> str | None:
        """The password of the primary and the replica."""
        return self.servers[0].password

    @property
    def sentinel_password(self) -> str | None:
        """The password of the Sentinels."""
        return self.sentinel_servers[0].password

    def primary(self) -> tuple[str, int]:
        """Return the address that the first Sentinel which answers names."""
        for sentinel in self.sentinel_servers:
            if (named := self._named_by(sentinel)) is not None:
                return named
        raise AssertionError("no Sentinel answers")

    def primary_server(self) -> RedisServer:
        """Return the server that the Sentinels name."""
        named = self.primary()
        return next(server for server in self.servers if (server.host, server.port) == named)

    def replica_server(self) -> RedisServer:
        """Return the server that they do not name."""
        primary = self.primary_server()
        return next(server for server in self.servers if server is not primary)

    def kill_primary(self) -> RedisServer:
        """Kill the server that the Sentinels name, and return it."""
        self._killed = self.primary_server()
        self._killed.kill()
        return self._killed

    def wait_failover(
        self, old: RedisServer | None = None, *, seconds: float = 20.0
    ) -> RedisServer:
        """Wait until all Sentinels that answer name another server than the old one.

        The old one is the one killed last if not given. Returns the new primary once it takes
        writes.
        """
        old = old or self._killed

        def named() -> RedisServer | None:
            answers = {self._named_by(sentinel) for sentinel in self.sentinel_servers} - {None}
            for server in self.servers:
                if server is not old and answers == {(server.host, server.port)}:
                    return server if server.command("ROLE")[0] == "master" else None
            return None

        return wait_until(named, seconds=seconds, what="failover")

    def _named_by(self, sentinel: RedisServer) -> tuple[str, int] | None:
        try:
            host, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
        except redis.RedisError:
            return None
        return str(host), int(port)


@contextmanager
def sentinel_setup(
    *, password: str | None = None, sentinel_password: str | None = None, name: str = NAME
) -> Iterator[SentinelSetup]:
    """Run all five; return when each Sentinel knows the replica and the other Sentinels."""
    with ExitStack() as stack:
        # Either may become the primary, and the other one its replica.
        lines = ["repl-diskless-sync-delay 0"]
        if password:
            lines.append(f"masterauth {password}")
        first, second, *others = stack.enter_context(redis_hosts(2 + 3))
        primary = stack.enter_context(RedisServer(first, password=password, lines=lines))
        lines = [*lines, f"replicaof {primary.host} {primary.port}"]
        replica = stack.enter_context(RedisServer(second, password=password, lines=lines))
        wait_until(lambda: "connected" in replica.command("ROLE"), what="the replica is in step")
        watch = [
            f"sentinel monitor {name} {primary.host} {primary.port} {QUORUM}",
            f"sentinel down-after-milliseconds {name} 500",
            f"sentinel failover-timeout {name} 3000",
        ]
        if password:
            watch.append(f"sentinel auth-pass {name} {password}")
        if sentinel_password:
            watch.append(f"sentinel sentinel-pass {sentinel_password}")
        sentinels = [
            stack.enter_context(
                RedisServer(host, password=sentinel_password, lines=watch, sentinel=True)
            )
            for host in others
        ]
        setup = SentinelSetup([primary, replica], sentinels, name=name)
        for sentinel in sentinels:
            # They find each other by what they publish, every two seconds if not told otherwise.
            sentinel.command("SENTINEL", "DEBUG", "PUBLISH-PERIOD", "100", "INFO-PERIOD", "200")
        for sentinel in sentinels:
            wait_until(partial(_knows_all, sentinel, name), what="a Sentinel knows the others")
        yield setup


def _knows_all(sentinel: RedisServer, name: str) -> bool:
    flat = sentinel.command("SENTINEL", "MASTER", name)
    known = flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
    return int(known["num-other-sentinels"]) == 2 and int(known["num-slaves"]) == 1
