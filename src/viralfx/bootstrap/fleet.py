"""Wires the fleet: the store of all processes, and the reporter of this one."""

import socket
from typing import TYPE_CHECKING

from viralfx.adapters.memory import MemoryFleetStore
from viralfx.bootstrap.jobs import JobRuntime
from viralfx.domain.fleet import FleetReporter, FleetStore, InstanceReport, held_report
from viralfx.domain.health.model import State
from viralfx.domain.operations import Operations

if TYPE_CHECKING:
    from viralfx.postgres import PostgresDatabase


def wire_fleet(
    operations: Operations, jobs: JobRuntime, database: "PostgresDatabase | None"
) -> tuple[FleetStore, FleetReporter]:
    """Return the store and the reporter, which starts after the resources of ``operations``.

    The store is in Postgres, or in memory without a database. The reporter ends with the process;
    its last report is a shutdown stage, which the caller registers.
    """
    store: FleetStore = MemoryFleetStore(operations.clock)
    if database is not None:
        from viralfx.bootstrap.postgres import fleet_store  # noqa: PLC0415 - without a driver else

        store = fleet_store(database)
    host, started_at = socket.gethostname(), operations.started_at

    def describe() -> InstanceReport:
        return held_report(
            instance=operations.instance,
            host=host,
            role=operations.role,
            version=operations.version,
            environment=operations.environment,
            started_at=started_at,
            lifecycle=operations.lifecycle,
            report=operations.monitor.report(),
            jobs=0 if jobs.worker is None else jobs.worker.active,
            queues=tuple(jobs.concurrency),
        )

    reporter = FleetReporter(
        store,
        describe=describe,
        monitor=operations.monitor,
        lifecycle=operations.lifecycle,
        clock=operations.clock,
    )
    operations.resources = (*operations.resources, reporter)
    operations.lifecycle.subscribe(
        lambda event: reporter.stop() if event.new is State.STOPPED else None
    )
    return store, reporter
