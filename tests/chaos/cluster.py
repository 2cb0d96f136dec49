"""The database of the chaos run: a primary with a standby, behind a proxy that cuts at commits."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tests.servers.fault_proxy import BLACKHOLE, DROP, PASS, RESET, CutCommits, FaultProxy
from tests.servers.pgbouncer import PgBouncer, pgbouncer
from tests.servers.postgres import PostgresServer, postgres_server, postgres_standby
from tests.servers.supply import UnavailableError
from tests.servers.waiting import wait_until

_MEBIBYTES = 768
_CUT = 0.005
"""Share of statements that a cut connection meets; eight times as many COMMITs."""
_IN_STEP = "select count(*) from pg_stat_replication where sync_state = 'sync'"
_CUT_LISTENERS = """
select pg_terminate_backend(pid) from pg_stat_activity where application_name like '%-listen'
"""
_DOWN = 1.0
_FULL = 3.0
"""Seconds that the server is away, and that its disk is full."""
_SESSIONS = 80
"""Connections to the server that a pooler in session mode may open."""
_PAUSED = 3.0
"""Seconds in which the pooler lets its clients wait."""
_STUCK = 15.0
"""Seconds in which a server that has space again recovers, or is restarted by its operator."""
_SILENT = 10.0
"""Seconds without a reply of the standby: more than a call of the ledger waits for its commit."""
_SEGMENTS = 12
"""Segments of the log to use up on the full disk."""


class Cluster:
    """A primary that commits only with its standby, and one address that leads to the primary.

    Two more addresses lead to a server each, whichever is the primary. Servers in containers have
    no standby, and only root gets a disk that can be full.
    """

    def __init__(self, rng: random.Random | None) -> None:
        """Without ``rng``, no connection is cut at commits, and no disk can be full."""
        self._servers: dict[PostgresServer, ExitStack] = {}
        self._pooling = ExitStack()
        self.pooler: PgBouncer | None = None
        self._link: FaultProxy | None = None
        self._mebibytes: int | None = _MEBIBYTES if rng else None
        try:
            self._primary = self._run(lambda: postgres_server(mebibytes=self._mebibytes))
        except UnavailableError:
            self._mebibytes = None
            self._primary = self._run(postgres_server)
        self._standby: PostgresServer | None = None
        self._former: PostgresServer | None = None
        self._proxies: list[FaultProxy] = []
        self._places: list[FaultProxy] = []
        try:
            self._proxy = self._lead_to(self._primary)
            # The first place is always that of the primary; both swap at a failover.
            self._places = [self._lead_to(self._primary) for _ in range(2)]
            self._follow()
        except BaseException:
            self.close()
            raise
        if rng is not None:
            self._proxy.mode = CutCommits(_CUT, rng)

    def pool(self, mode: str, prepared: int) -> None:
        """Put a PgBouncer in front of the address, which follows so many prepared statements."""
        port = self._proxy.port
        # In session mode each connection of five processes has one to the server.
        size = _SESSIONS if mode == "session" else 20
        made = pgbouncer(
            self._primary, mode, port=port, max_prepared_statements=prepared, default_pool_size=size
        )
        self.pooler = self._pooling.enter_context(made)

    @property
    def has_standby(self) -> bool:
        """True if a failover is possible."""
        return self._standby is not None

    @property
    def has_disk(self) -> bool:
        """True if its disk can be full."""
        return self._mebibytes is not None

    @property
    def cut(self) -> int:
        """Connections cut at commits."""
        return self._proxy.struck

    def url(self, database: str, *, past_proxy: bool = False) -> str:
        """Return the address of a database, through the proxy unless said."""
        if past_proxy:
            return self._primary.url(database)
        place = self._proxy if self.pooler is None else self.pooler
        return self._primary.url(database, host=place.host, port=place.port)

    def create_database(self) -> str:
        """Create an empty database and return its name."""
        return self._primary.create_database()

    def execute(self, sql: str, database: str) -> list[tuple[Any, ...]]:
        """Run one statement on the primary, past the proxy."""
        return self._primary.execute(sql, database)

    @property
    def primary(self) -> PostgresServer:
        """The server that accepts writes."""
        return self._primary

    @property
    def name(self) -> FaultProxy:
        """The address that leads to the primary; connections stay where they lead."""
        return self._proxy

    @property
    def hosts(self) -> tuple[tuple[str, int], ...]:
        """The addresses of both servers, in an order that failovers do not change."""
        return tuple(sorted((place.host, place.port) for place in self._places))

    def close(self) -> None:
        """End all of it."""
        self._pooling.close()
        for proxy in (self._link, *self._proxies):
            if proxy is not None:
                proxy.close()
        for stack in list(self._servers.values()):
            stack.close()

    def restart(self) -> None:
        """Stop the primary in order, and start it again."""
        self._primary.stop()
        time.sleep(_DOWN)
        self._primary.start()

    def kill(self) -> None:
        """Kill the primary, and start it again."""
        self._primary.kill()
        self._primary.start()

    def restart_pooler(self) -> None:
        """Stop the pooler at once, and start it again."""
        assert self.pooler is not None
        self.pooler.stop()
        time.sleep(_DOWN)
        self.pooler.start()

    def pause_pooler(self) -> None:
        """Pause the pooler for a time."""
        assert self.pooler is not None
        self.pooler.pause()
        time.sleep(_PAUSED)
        self.pooler.resume()

    def cut_listeners(self) -> None:
        """End all sessions that listen for notifications."""
        self._primary.execute(_CUT_LISTENERS)

    def fail_over(self) -> None:
        """Kill the primary and promote the standby; then give that one a standby."""
        self._promote()

    def fail_over_from_silence(self) -> None:
        """Do the same after a time in which no commit came to the standby."""
        assert self._link is not None
        self._link.mode = BLACKHOLE
        time.sleep(_SILENT)
        # Data on its way does not arrive.
        self._link.mode = RESET
        self._promote()

    def switch_over(self) -> None:
        """Let the primary accept no writes, promote the standby, and lead to it.

        The former primary goes on serving reads until :meth:`rejoin`.
        """
        self._primary.execute("alter system set default_transaction_read_only = on")
        self._primary.execute("select pg_reload_conf()")
        wait_until(lambda: self._primary.execute("show default_transaction_read_only") == [("on",)])
        self._move()

    def lose_primary(self) -> None:
        """Kill the primary, promote the standby, and lead to it."""
        self._primary.kill()
        self._move()

    def lose_silently(self, pause: float) -> None:
        """Let the primary vanish without a word, promote the standby, and lead to it.

        No packet comes from the former primary until :meth:`rejoin`, nor an end of a connection.
        ``pause``: seconds until the promotion, such as a tool takes to notice the silence.
        """
        # The name leads new connections on; the address of the former primary is silent.
        self._places[0].mode, self._proxy.mode = BLACKHOLE, DROP
        self._primary.freeze()
        time.sleep(pause)
        self._move()

    def rejoin(self) -> None:
        """End the former primary, and give the primary a standby in its place."""
        assert self._former is not None
        self._servers.pop(self._former).close()
        self._former = None
        self._follow()
        if self._proxy.mode is DROP:
            self._places[1].mode = self._proxy.mode = PASS

    def fill_disk(self) -> None:
        """Leave the primary no space for rows and for its log; then free it."""
        disk = self._primary.disk
        assert disk is not None
        disk.fill()
        began = time.monotonic()
        # Without this the log goes on in segments that it has.
        for _ in range(_SEGMENTS):
            try:
                self._primary.execute("select pg_switch_wal()")
            except Exception:  # noqa: BLE001 - the server ends, in one way or another
                break
        time.sleep(max(0.0, began + _FULL - time.monotonic()))
        disk.empty()
        with suppress(AssertionError):
            wait_until(self._serves, seconds=_STUCK, what="the server recovers")
            return
        # Its recovery has met the full disk, and may then wait without an end.
        self._primary.kill()
        wait_until(self._serves, seconds=40, what=self._primary.log)

    def _serves(self) -> bool:
        if not self._primary.running:
            self._primary.start()
        try:
            return self._primary.execute("select 1") == [(1,)]
        except Exception:  # noqa: BLE001 - it recovers, or is about to end
            return False

    def _promote(self) -> None:
        former, standby = self._primary, self._standby
        assert standby is not None
        former.kill()
        self._lead(standby)
        self._servers.pop(former).close()
        self._follow()

    def _move(self) -> None:
        self._former, standby = self._primary, self._standby
        assert standby is not None
        self._lead(standby)
        # As the tools that manage failovers: commits do not wait for a standby that is not there.
        standby.execute("alter system set synchronous_standby_names = ''")
        standby.execute("select pg_reload_conf()")

    def _lead(self, standby: PostgresServer) -> None:
        standby.execute("select pg_promote()")
        self._proxy.upstream = standby.host, standby.port
        self._primary, self._standby = standby, None
        self._places.reverse()

    def _lead_to(self, server: PostgresServer) -> FaultProxy:
        proxy = FaultProxy(server.port, host=server.host)
        self._proxies.append(proxy)
        return proxy

    def _follow(self) -> None:
        primary = self._primary
        if self._link is not None:
            self._link.close()
        link = self._link = FaultProxy(primary.port, host=primary.host)
        try:
            standby = self._run(
                lambda: postgres_standby(primary, port=link.port, mebibytes=self._mebibytes)
            )
        except UnavailableError:
            return
        self._standby = standby
        self._places[1].upstream = standby.host, standby.port
        # A copy inherits this; the first primary does not have it.
        primary.execute("alter system set synchronous_standby_names = 'standby'")
        primary.execute("select pg_reload_conf()")
        wait_until(lambda: primary.execute(_IN_STEP) == [(1,)], what="the standby is in step")

    def _run(self, server: "Callable[[], Any]") -> PostgresServer:
        with ExitStack() as stack:
            started: PostgresServer = stack.enter_context(server())
            self._servers[started] = stack.pop_all()
        return started


@contextmanager
def cluster(
    rng: random.Random | None = None, *, pooler: str | None = None, prepared: int = 0
) -> Iterator[Cluster]:
    """Run a cluster; without ``rng``, one without random faults.

    ``pooler``: the mode of a PgBouncer in front of its address; None: there is none. ``prepared``:
    its ``max_prepared_statements``.
    """
    made = Cluster(rng)
    try:
        if pooler is not None:
            made.pool(pooler, prepared)
        yield made
    finally:
        made.close()
