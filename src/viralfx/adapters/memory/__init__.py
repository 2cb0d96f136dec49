"""The adapters of the embedded default, in the memory of this process."""

from viralfx.adapters.memory.embedded import (
    FileStateStore,
    MemoryCacheStore,
    MemoryDatabase,
    MemoryNotifier,
    MemoryRedis,
    MemoryStateStore,
)
from viralfx.adapters.memory.fleet import MemoryFleetStore
from viralfx.adapters.memory.job_changes import MemoryTransaction
from viralfx.adapters.memory.ledger import MemoryJobLedger

__all__ = [
    "FileStateStore",
    "MemoryCacheStore",
    "MemoryDatabase",
    "MemoryFleetStore",
    "MemoryJobLedger",
    "MemoryNotifier",
    "MemoryRedis",
    "MemoryStateStore",
    "MemoryTransaction",
]
