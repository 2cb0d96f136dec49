"""The embedded default: this process's own memory, and stand-ins that live in it."""

from viralfx.adapters.memory.cache import MemoryCacheStore
from viralfx.adapters.memory.database import MemoryDatabase
from viralfx.adapters.memory.job_bell import MemoryBell
from viralfx.adapters.memory.job_ledger import MemoryJobLedger
from viralfx.adapters.memory.process import ProcessMemory, memory_limit
from viralfx.adapters.memory.redis import MemoryRedis
from viralfx.adapters.memory.retry import MemoryRetryPolicy
from viralfx.adapters.memory.state import FileStateStore, MemoryStateStore

__all__ = [
    "FileStateStore",
    "MemoryBell",
    "MemoryCacheStore",
    "MemoryDatabase",
    "MemoryJobLedger",
    "MemoryRedis",
    "MemoryRetryPolicy",
    "MemoryStateStore",
    "ProcessMemory",
    "memory_limit",
]
