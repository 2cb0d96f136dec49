"""The contract of ``FleetStore``, run against every adapter.

A new adapter adds a row to ``STORES``.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from tests.integration.postgres_clients import checked, config_of, opened
from tests.servers.pgbouncer import POOLED, Poolers
from tests.servers.postgres import Database
from tests.servers.waiting import until

from viralfx.adapters.memory import MemoryFleetStore
from viralfx.adapters.postgres import PostgresFleetStore
from viralfx.core.clock import SystemClock
from viralfx.domain.fleet import (
    MAX_ENDED,
    SILENT_AFTER_SECONDS,
    CheckChange,
    FleetStore,
    FleetUnavailableError,
    Instance,
    InstanceReport,
)

NOON = datetime(2026, 1, 6, 12, tzinfo=UTC)
API = InstanceReport(
    instance="pod-1-17-ab",
    host="pod-1",
    role="api",
    version="1.0.0",
    environment="test",
    started_at=NOON,
    state="ready",
    reason="checks pass",
    health="healthy",
    checks={"database": "pass", "größe <script>": "fail"},
    jobs=2,
    queues=("default", "notifications"),
)
CHANGE = CheckChange(
    instance=API.instance, number=1, check="redis", at=NOON, old=None, new="pass", code=None
)
Make = Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[FleetStore]]

_CLEAR = """
with transitions as (delete from viralfx_transitions) delete from viralfx_instances
"""

_ENDED = """
insert into viralfx_instances (instance, host, role, version, environment, started_at, state,
    reason, health, checks, jobs, queues, seen_at)
select '{state} ' || number, 'pod-2', 'api', '1', 'test', now(), '{state}', '', 'healthy', '{{}}',
    0, '{{}}', now() - number * interval '1 minute'
from generate_series(1, {number}) as number
"""


@asynccontextmanager
async def _memory(_: pytest.FixtureRequest) -> AsyncIterator[FleetStore]:
    yield MemoryFleetStore(SystemClock())


@asynccontextmanager
async def _postgres(request: pytest.FixtureRequest) -> AsyncIterator[FleetStore]:
    database: Database = request.getfixturevalue("ledger_database")
    database.execute(_CLEAR)
    async with opened(config_of(database)) as pool:
        yield PostgresFleetStore(pool)


def _behind(mode: str, prepared: int) -> Make:
    @asynccontextmanager
    async def made(request: pytest.FixtureRequest) -> AsyncIterator[FleetStore]:
        database: Database = request.getfixturevalue("ledger_database")
        poolers: Poolers = request.getfixturevalue("shared_pgbouncer")
        database.execute(_CLEAR)
        pooler = poolers(database.server, mode, max_prepared_statements=prepared)
        async with opened(config_of(database, through=pooler, pooler=mode)) as pool:
            yield PostgresFleetStore(pool)

    return made


STORES: dict[str, Make] = {"memory": _memory, "postgres": _postgres}
POOLERS = {f"pgbouncer {mode} {number}": _behind(mode, number) for mode, number in POOLED}


@pytest.fixture(
    params=[
        *(pytest.param(make, id=name) for name, make in STORES.items()),
        *(pytest.param(make, id=name, marks=pytest.mark.soak) for name, make in POOLERS.items()),
    ]
)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[FleetStore]:
    """Return each store in turn, empty."""
    make: Make = request.param
    async with make(request) as store:
        yield store


async def instances(store: FleetStore) -> Sequence[Instance]:
    """Return the fleet."""
    return (await store.fleet()).instances


async def test_a_report_comes_back_whole_and_replaces_the_one_before(store: FleetStore) -> None:
    """The last report counts; its age is that of the store."""
    await store.report(API)
    changed = replace(API, state="draining", reason="SIGTERM", checks={}, jobs=0, queues=())
    await store.report(changed)
    (found,) = await instances(store)

    assert found.report == changed
    assert 0.0 <= found.age < SILENT_AFTER_SECONDS
    assert found.state == "draining"
    assert found.seen_at.utcoffset() == timedelta(0)


async def test_instances_that_reported_last_come_first(store: FleetStore) -> None:
    """Each has a row of its own."""
    for name in ("a", "b", "c", "a"):
        await store.report(replace(API, instance=name))
        await asyncio.sleep(0.002)

    assert [each.report.instance for each in await instances(store)] == ["a", "c", "b"]


async def test_a_fleet_has_the_last_of_the_processes_that_ended(store: FleetStore) -> None:
    """Of a week of deployments; one that runs is there however many stopped after its report."""
    await store.report(API)
    for number in range(-2, MAX_ENDED):
        if number in {-2, 0}:
            await asyncio.sleep(0.002)
        await store.report(replace(API, instance=f"{number}", host="other", state="stopped"))
    fleet = await store.fleet()
    *ended, running = [each.report.instance for each in fleet.instances]

    assert {*ended} == {f"{number}" for number in range(MAX_ENDED)}
    assert (len(ended), running, fleet.more) == (MAX_ENDED, API.instance, 2)


async def test_the_runs_of_a_process_are_on_its_host_and_in_its_role(store: FleetStore) -> None:
    """Also those that the fleet leaves out."""
    await store.report(replace(API, instance="first", state="stopped"))
    await asyncio.sleep(0.002)
    await store.report(replace(API, instance="worker", role="worker"))
    await store.report(replace(API, instance="other", host="pod-2"))
    await store.report(API)

    runs = [each.report.instance for each in await store.runs(API.instance)]
    assert runs == [API.instance, "first"]
    assert list(await store.runs("unknown")) == []


async def test_a_repeated_report_stores_its_changes_once(store: FleetStore) -> None:
    """The response of a write may be lost; the process then writes it again."""
    changes = [replace(CHANGE, number=n, at=NOON + timedelta(seconds=n)) for n in range(1, 4)]
    await store.report(API, changes[:2])
    await store.report(API, changes)

    assert list(await store.changes()) == changes[::-1]


async def test_a_code_with_any_character_is_stored(store: FleetStore) -> None:
    """The report would otherwise fail as long as the process keeps the change."""
    await store.report(replace(API, reason="\0"), [replace(CHANGE, code="a\0\udcff")])

    assert len(await store.changes()) == 1
    assert len(await instances(store)) == 1


async def test_changes_are_found_by_check_and_instance(store: FleetStore) -> None:
    """The latest come first, up to a limit."""
    other = replace(API, instance="pod-2-1-cd")
    mine = [
        replace(CHANGE, number=1, code="timeout"),
        replace(CHANGE, number=2, check="database", at=NOON + timedelta(seconds=2)),
    ]
    theirs = replace(CHANGE, instance=other.instance, at=NOON + timedelta(seconds=1))
    await store.report(API, mine)
    await store.report(other, [theirs])

    assert list(await store.changes(check="redis")) == [theirs, mine[0]]
    assert list(await store.changes(instance=API.instance)) == mine[::-1]
    assert list(await store.changes(limit=1)) == [mine[1]]
    assert list(await store.changes(check="redis", instance="unknown")) == []


async def test_a_history_begins_with_the_state_before_it(store: FleetStore) -> None:
    """For each check the last change before the time is included."""
    at = [replace(CHANGE, number=n, at=NOON + timedelta(hours=n), new=f"{n}") for n in range(5)]
    database = replace(CHANGE, number=9, check="database", at=NOON)
    await store.report(API, [*at, database])
    since = NOON + timedelta(hours=2, minutes=30)

    assert list(await store.history([API.instance], since)) == [database, at[2], at[3], at[4]]
    assert list(await store.history(["unknown"], since)) == []


async def test_old_rows_are_pruned(store: FleetStore) -> None:
    """A living instance stays, with changes of the retention."""
    now = datetime.now(UTC)
    await store.report(
        API,
        [
            replace(CHANGE, at=now - timedelta(days=8)),
            replace(CHANGE, number=2, at=now - timedelta(days=6)),
        ],
    )

    assert await store.prune(7 * 86400.0) == 1
    assert [each.number for each in await store.changes()] == [2]
    assert len(await instances(store)) == 1
    assert await store.prune(7 * 86400.0) == 0


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancelled_report_is_stored_whole_or_not_at_all(
    store: FleetStore, turns: int
) -> None:
    """A later call works on the same store."""
    task = asyncio.ensure_future(store.report(API, [CHANGE]))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(5.0):
        await asyncio.wait({task})
    assert len(await instances(store)) == len(await store.changes())

    await store.report(API, [CHANGE])

    assert len(await instances(store)) == len(await store.changes()) == 1


async def test_postgres_finds_an_ended_connection_at_once(ledger_database: Database) -> None:
    """The connection of the health check is that of the process: when it ends, so did the process.

    Without one, or behind a pooler, only the age counts.
    """
    ledger_database.execute(_CLEAR)
    async with opened(config_of(ledger_database)) as pool:
        store = PostgresFleetStore(pool)
        await store.report(API)
        assert [each.connected for each in await instances(store)] == [None]

        connection = await pool.connect("health")
        pool.health_backend = connection.get_server_pid()
        assert store.moved()
        await store.report(API)
        assert not store.moved()
        (found,) = await instances(store)
        assert (found.connected, found.state) == (True, "ready")

        await connection.close()
        async with asyncio.timeout(5.0):
            while (await instances(store))[0].connected:  # noqa: ASYNC110 - the server ends it
                await asyncio.sleep(0.01)
        assert (await instances(store))[0].state == "silent"

        await store.report(replace(API, state="stopped"))
        assert (await instances(store))[0].state == "stopped"


async def test_a_process_whose_idle_connection_ended_is_not_silent(
    ledger_database: Database,
) -> None:
    """The server may end it long before the next query of the health check."""
    ledger_database.execute(_CLEAR)
    async with opened(config_of(ledger_database)) as pool, checked(pool) as check:
        store = PostgresFleetStore(pool)
        await check.query.run()
        first = pool.health_backend
        await store.report(API)
        ledger_database.execute(f"select pg_terminate_backend({first})")
        await until(store.moved)
        await store.report(API)
        (found,) = await instances(store)
        assert (found.connected, found.state) == (None, "ready")

        await check.query.run()
        assert pool.health_backend not in {None, first}


async def test_postgres_leaves_out_silent_processes_that_ended_early(
    ledger_database: Database,
) -> None:
    """As stopped ones; a process that crashes again and again leaves as many."""
    ledger_database.execute(_CLEAR)
    async with opened(config_of(ledger_database)) as pool:
        store = PostgresFleetStore(pool)
        await store.report(API)
        for state, number in (("ready", 3), ("stopped", 1)):
            ledger_database.execute(_ENDED.format(state=state, number=MAX_ENDED + number))
        fleet = await store.fleet()
    states = Counter(each.state for each in fleet.instances)

    assert states == {"ready": 1, "silent": MAX_ENDED, "stopped": MAX_ENDED}
    assert fleet.more == 4


async def test_postgres_lists_the_connections_once(ledger_database: Database) -> None:
    """A subquery would do it for each of the instances of a week."""
    async with opened(config_of(ledger_database)) as pool:
        statement = PostgresFleetStore(pool)._fleet
    plan = ledger_database.execute(f"explain {statement}")
    assert "pg_stat_get_activity" in str(plan)
    assert "SubPlan" not in str(plan)


async def test_a_missing_table_makes_the_store_unavailable(database: Database) -> None:
    """Before the first migration the process runs without a fleet."""
    async with opened(config_of(database)) as pool:
        with pytest.raises(FleetUnavailableError, match="viralfx migrate"):
            await PostgresFleetStore(pool).report(API)
