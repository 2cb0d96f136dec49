"""A change of the primary under load: how soon jobs are accepted again, and that none is lost."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import asyncpg
import pytest
from tests.chaos.cluster import Cluster, cluster
from tests.contracts.ledgers import draft
from tests.integration.postgres_clients import checked, config_of, migrated, opened
from tests.servers.fixtures import or_skip
from tests.servers.postgres import PostgresServer
from tests.servers.waiting import until, wait_for_code
from tests.soak import SOAK, Record, cycles, spread

from viralfx.core.clock import SystemClock
from viralfx.core.errors import LedgerUnavailableError
from viralfx.domain.health.model import CheckPolicy
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresConfig

INTERVAL, TIMEOUT = 5.0, 2.0
"""The defaults of HEALTH_CHECK_INTERVAL and HEALTH_CHECK_TIMEOUT."""
LIMIT = INTERVAL + (1.0 if SOAK else 5.0)
"""Seconds; a run beside others has more. `just switchovers` makes twenty of each alone."""
SILENT_LIMIT = LIMIT + TIMEOUT
"""The same where the former primary is silent."""
_CLIENTS = 4
_PAUSE = 0.02
_UNNOTICED = 4.0
"""Seconds in which the primary is silent before another one is promoted."""
_LIMITS: dict[str, Any] = {"connection_timeout": 30.0, "pool_timeout": 30.0}
"""The defaults: longer than the service may take."""


@pytest.fixture
def postgres() -> Iterator[Cluster]:
    """Return a primary with a synchronous standby."""
    with or_skip(), cluster() as made:
        if not made.has_standby:
            pytest.skip("no standby of a server in a container")
        yield made


class Load:
    """Clients that submit jobs all the time."""

    def __init__(self, ledger: PostgresJobLedger) -> None:
        self._ledger = ledger
        self.accepted: set[str] = set()
        self.latest = 0.0
        """When the call began that was the last one to succeed."""

    async def run(self) -> None:
        """Submit until cancelled."""
        async with asyncio.TaskGroup() as clients:
            for _ in range(_CLIENTS):
                clients.create_task(self._submit())

    def is_served(self, monitor: HealthMonitor, since: float) -> bool:
        """Return whether the service is ready, and has accepted a job that came later."""
        return self.latest > since and monitor.report().ready

    async def join(self, primary: PostgresServer) -> None:
        """Submit in a transaction of a client, which is connected to the new primary."""
        connection = await asyncpg.connect(primary.url())
        async with connection.transaction():
            (accepted,) = await self._ledger.accept_in(connection, [draft()])
        await connection.close()
        self.accepted.add(accepted.job.id)

    async def _submit(self) -> None:
        while True:
            began = time.monotonic()
            try:
                (accepted,) = await self._ledger.accept([draft()])
            except LedgerUnavailableError:
                pass
            else:
                self.accepted.add(accepted.job.id)
                self.latest = max(self.latest, began)
            await asyncio.sleep(_PAUSE)


async def survive(
    postgres: Cluster, config: PostgresConfig, times: int
) -> Mapping[str, list[float]]:
    """Change the primary so many times in each way; nothing accepted is lost.

    Returns for each way the seconds until the service was ready and accepted a job that came after
    the change.
    """
    took: defaultdict[str, list[float]] = defaultdict(list)
    await migrated(config)
    async with opened(config) as pool, checked(pool) as check:
        monitor = HealthMonitor(clock=SystemClock())
        policy = CheckPolicy(interval=INTERVAL, timeout=TIMEOUT, required_for_readiness=True)
        monitor.register("database", check, policy)
        pool.on_suspected_outage = lambda: monitor.request_check("database")
        monitor.start()
        load = Load(PostgresJobLedger(pool))
        running = asyncio.create_task(load.run())
        changes: dict[str, tuple[Callable[[], None], float]] = {
            "planned": (postgres.switch_over, LIMIT),
            "killed": (postgres.lose_primary, LIMIT),
            "silent": (partial(postgres.lose_silently, _UNNOTICED), SILENT_LIMIT),
        }
        try:
            await until(lambda: load.is_served(monitor, 0.0), seconds=60)
            for kind, (change, limit) in list(changes.items()) * times:
                await asyncio.to_thread(change)
                changed = time.monotonic()
                await until(partial(load.is_served, monitor, changed), seconds=limit)
                took[kind].append(time.monotonic() - changed)
                await load.join(postgres.primary)
                await asyncio.to_thread(postgres.rejoin)
                # A check comes between two changes.
                await wait_for_code(check, None)
        finally:
            running.cancel()
            await asyncio.wait({running})
            await monitor.stop()
    kept = postgres.primary.execute("select id::text from viralfx_ops.viralfx_all_jobs")
    assert load.accepted
    assert load.accepted <= {job for (job,) in kept}
    return took


def record(put: Record, address: str, took: Mapping[str, list[float]]) -> None:
    """Record the times of each kind of change."""
    for kind, seconds in took.items():
        put(f"{address}, {kind}: ready and accepting after", spread(seconds))
    put("changes of the primary", sum(map(len, took.values())))


@pytest.mark.timeout(2400 if SOAK else 120)
async def test_a_name_that_moves(postgres: Cluster, record_property: Record) -> None:
    """The former primary still serves reads after a planned change; it is left at once."""
    config = config_of(postgres.primary, through=postgres.name, **_LIMITS)
    record(record_property, "a name", await survive(postgres, config, len(cycles(20))))


@pytest.mark.timeout(2400 if SOAK else 120)
async def test_several_hosts(postgres: Cluster, record_property: Record) -> None:
    """The one that accepts writes is found."""
    config = config_of(
        postgres.primary,
        hosts=postgres.hosts,
        target_session_attrs="read-write",
        **_LIMITS,
    )
    record(record_property, "several hosts", await survive(postgres, config, len(cycles(20))))
