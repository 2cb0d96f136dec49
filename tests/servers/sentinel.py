"""A primary and a replica under the watch of three Sentinels."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import redis
from tests.servers import supply
from tests.servers.host import Host
from tests.servers.redis import RedisServer, redis_hosts
from tests.servers.waiting import wait_until

NAME = "viralfx-primary"
QUORUM = 1
DOWN_AFTER = (500, 2500, 4500)
"""Milliseconds without an answer until each Sentinel considers a server down.

A Sentinel asks the others for their votes once as many as the quorum consider the primary down. Two
that ask at the same time may split the votes, and the next vote is six seconds later, long after
the retries of a request. So the first one asks alone. It still needs the vote of another one.
"""

PERIODS = {"PING-PERIOD": 250, "PUBLISH-PERIOD": 500, "INFO-PERIOD": 200}
"""Milliseconds. If the ping period equals the answer timeout, which is the default here, a Sentinel
considers each new server down, also the primary after a failover. Five pings have to take longer
than the second between two checks of a replica, or no replica is fit for promotion. A Sentinel
that sees a promoted replica beside a healthy primary, as after SENTINEL FAILOVER, demotes it after
four publications: by then the Sentinel that promoted it must have checked and published.
"""


class Sentinel(RedisServer):
    """A Sentinel that checks often enough to react within a second."""

    def __init__(self, host: Host, *, password: str | None, lines: Sequence[str]) -> None:
        super().__init__(host, password=password, arguments=["--sentinel"])
        self._lines = [*lines]

    def start(self) -> None:
        """Start it with what it wrote down; return when it answers."""
        super().start()
        self.command("SENTINEL", "DEBUG", *(part for pair in PERIODS.items() for part in pair))

    def knows(self, name: str, *, sentinels: int, replicas: int) -> bool:
        """Return whether it sees a primary up, with so many replicas and other Sentinels."""
        flat = self.command("SENTINEL", "MASTER", name)
        seen = dict(zip(flat[::2], flat[1::2], strict=True))
        counts = int(seen["num-other-sentinels"]), int(seen["num-slaves"])
        return seen["flags"] == "master" and counts == (sentinels, replicas)


class SentinelSetup:
    """What ``sentinel_setup`` runs. Each member may be frozen, killed and started again."""

    def __init__(self, servers: list[RedisServer], sentinels: list[Sentinel], *, name: str) -> None:
        self.name = name
        self.servers = servers
        self.sentinel_servers = sentinels
        self._killed: RedisServer | None = None

    @property
    def refuses(self) -> bool:
        """Whether a member that ended refuses connections.

        In containers they share a network, and the engine takes connections to all ports of it,
        and closes connections without a listener.
        """
        return supply.chosen().tier is not supply.Tier.DOCKER

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

    def fail_over(self) -> RedisServer:
        """Ask for an ordered failover until a Sentinel begins one; return the old primary."""
        old = self.primary_server()

        def begun() -> bool:
            # Refused while it has not checked the replica lately, or with a failover under way.
            with suppress(redis.ResponseError):
                self.sentinel_servers[0].command("SENTINEL", "FAILOVER", self.name)
                return True
            return self.primary_server() is not old

        wait_until(begun, what="a Sentinel begins a failover")
        return old

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
                    return server if server.role() == "master" else None
            return None

        return wait_until(named, seconds=seconds, what=lambda: f"failover; {self.log()}")

    def wait_follows(self, server: RedisServer, *, seconds: float = 20.0) -> None:
        """Wait until a server that was started again is the replica of the primary."""
        wait_until(
            lambda: server.role() == "slave",
            seconds=seconds,
            what=lambda: f"it follows; {self.log()}",
        )

    def log(self) -> str:
        """Return what the Sentinels wrote, one after another."""
        return "\n".join(sentinel.log() for sentinel in self.sentinel_servers)

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
            f"sentinel failover-timeout {name} 3000",
        ]
        if password:
            watch.append(f"sentinel auth-pass {name} {password}")
        if sentinel_password:
            watch.append(f"sentinel sentinel-pass {sentinel_password}")
        sentinels = []
        for host, down_after in zip(others, DOWN_AFTER, strict=True):
            lines = [*watch, f"sentinel down-after-milliseconds {name} {down_after}"]
            sentinel = Sentinel(host, password=sentinel_password, lines=lines)
            sentinels.append(stack.enter_context(sentinel))
        for sentinel in sentinels:
            knows_all = partial(sentinel.knows, name, sentinels=2, replicas=1)
            wait_until(knows_all, what="a Sentinel knows the others")
        yield SentinelSetup([primary, replica], sentinels, name=name)
