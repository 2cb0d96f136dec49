"""Wires the audit trail: its store, its log stream and its metrics."""

from typing import TYPE_CHECKING

from viralfx.adapters.memory import MemoryAuditStore
from viralfx.core.clock import Clock
from viralfx.domain.audit import AuditStore, AuditTrail
from viralfx.settings import Settings
from viralfx.telemetry.logging.audit import log_audit
from viralfx.telemetry.metrics import Metrics
from viralfx.telemetry.metrics.audit import AuditMetrics

if TYPE_CHECKING:
    from viralfx.postgres import PostgresDatabase


def wire_audit(
    settings: Settings,
    clock: Clock,
    *,
    instance: str,
    metrics: Metrics,
    database: "PostgresDatabase | None",
) -> AuditTrail:
    """Return the trail; it writes once it is opened, after the database.

    Its store is in Postgres, or in memory without a database.
    """
    store: AuditStore = MemoryAuditStore(clock)
    if database is not None:
        from viralfx.bootstrap.postgres import audit_store  # noqa: PLC0415 - without a driver else

        store = audit_store(database)
    trail = AuditTrail(store, clock=clock, instance=instance, retention=settings.audit_retention)
    trail.subscribe(log_audit)
    trail.subscribe(AuditMetrics(metrics.registry, lost=lambda: trail.lost))
    return trail
