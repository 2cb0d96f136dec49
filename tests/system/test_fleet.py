"""The fleet in Postgres: real processes that start, stop and are killed."""

import asyncio
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
from tests import forked
from tests.integration.postgres_clients import config_of, opened
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.service import Service
from tests.system.workers import api, environment_of, worker

from viralfx.adapters.postgres import PostgresFleetStore
from viralfx.domain.fleet import CheckChange, Instance

RIGHT_WITHIN = 5.0 if SOAK else 20.0
"""Seconds after which the page must be right about a start, a kill or a stop."""
WORKERS = 49 if SOAK else 3


async def _instances(database: Database | PostgresServer) -> Sequence[Instance]:
    async with opened(config_of(database, pool_max=1)) as pool:
        return (await PostgresFleetStore(pool).fleet()).instances


async def _changes(database: Database | PostgresServer, check: str) -> Sequence[CheckChange]:
    async with opened(config_of(database, pool_max=1)) as pool:
        return await PostgresFleetStore(pool).changes(check=check, limit=1000)


def states(database: Database | PostgresServer) -> dict[int, str]:
    """Return the states of all processes of the fleet, by process id."""
    found = asyncio.run(_instances(database))
    return {int(each.report.instance.rsplit("-", 2)[1]): each.state for each in found}


def becomes(database: Database, process: Service, *wanted: str) -> None:
    """Wait until the fleet shows a process in one of some states."""
    pid = process.process.pid
    wait_until(
        lambda: states(database).get(pid) in wanted,
        seconds=RIGHT_WITHIN,
        what=lambda: f"{pid} is {wanted}: {states(database)}",
    )


@pytest.fixture
def roomy() -> Iterator[Database]:
    """Return a database on a server that has connections for fifty processes."""
    with postgres_server(settings={"max_connections": "500"}) as postgres:
        found = Database(postgres, postgres.create_database())
        environment = {"DATABASE_URL": postgres.url(found.name)}
        assert forked.viralfx("migrate", environ=environment).returncode == 0
        yield found


@pytest.mark.each_python
@pytest.mark.soak
@pytest.mark.timeout(600 if SOAK else 120)
def test_the_fleet_is_right_about_starts_kills_and_stops(roomy: Database) -> None:
    """Within five seconds in a soak run; a killed process stays, with its last word."""
    database = roomy
    environment = environment_of(database, JOB_LEASE="30000", JOB_SWEEP_INTERVAL="5000")
    with ExitStack() as stack:
        processes = [stack.enter_context(api(environment))]
        becomes(database, processes[0], "ready")
        for _ in range(WORKERS):
            processes.append(stack.enter_context(worker(environment)))
            becomes(database, processes[-1], "ready")
        _, killed, stopped, *_ = processes

        killed.signal(signal.SIGKILL)
        becomes(database, killed, "silent")

        stopped.signal(signal.SIGTERM)
        becomes(database, stopped, "lame_duck", "draining", "stopped")
        assert stopped.exit_code() == 0
        becomes(database, stopped, "stopped")

        found = states(database)
        assert ["ready"] * (len(processes) - 2) == [
            found[each.process.pid] for each in processes if each not in (killed, stopped)
        ]
        by_pid = {
            int(each.report.instance.rsplit("-", 2)[1]): each.report
            for each in asyncio.run(_instances(database))
        }
        last = by_pid[killed.process.pid]
        assert (last.state, last.role, last.checks["database"]) == ("ready", "worker", "pass")
        assert by_pid[processes[0].process.pid].role == "api"
        assert set(last.queues) == {"default", "notifications", "analytics"}


def test_changes_during_a_frozen_database_are_written_after_it(
    own_postgres: PostgresServer,
) -> None:
    """The change that matters most is that of the database, which cannot be written then."""
    environment = environment_of(
        own_postgres,
        HEALTH_CHECK_INTERVAL="300",
        HEALTH_CHECK_TIMEOUT="500",
        DB_HEALTH_CHECK_INTERVAL="300",
    )
    with api(environment) as service:
        own_postgres.freeze()
        try:
            wait_until(lambda: service.get("/health/database").status == 503, what="database fails")
        finally:
            own_postgres.thaw()
        wait_until(lambda: service.get("/health/database").status == 200, what="database passes")

        def written() -> bool:
            news = [each.new for each in asyncio.run(_changes(own_postgres, "database"))]
            return news[:3] == ["pass", "fail", "pass"]

        assert wait_until(written, seconds=15.0, what="both changes are written")
