"""The job ledger and notifier in Postgres."""

from viralfx.jobs.postgres.claims import PostgresLeaseStore
from viralfx.jobs.postgres.ledger import PostgresJobLedger
from viralfx.jobs.postgres.notifier import PostgresNotifier

__all__ = [
    "PostgresJobLedger",
    "PostgresLeaseStore",
    "PostgresNotifier",
]
