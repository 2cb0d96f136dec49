"""The job ledger and notifier in the memory of this process."""

from viralfx.jobs.memory.ledger import MemoryJobLedger
from viralfx.jobs.memory.notifier import MemoryNotifier
from viralfx.jobs.memory.transactions import MemoryTransaction

__all__ = [
    "MemoryJobLedger",
    "MemoryNotifier",
    "MemoryTransaction",
]
