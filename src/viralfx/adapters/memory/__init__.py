"""The adapters of the embedded default, in the memory of this process."""

from viralfx.adapters.memory.audit import MemoryAuditStore
from viralfx.adapters.memory.cache import MemoryCacheStore
from viralfx.adapters.memory.fleet import MemoryFleetStore
from viralfx.adapters.memory.health import MemoryDatabase, MemoryRedis
from viralfx.adapters.memory.state import FileStateStore, MemoryStateStore

__all__ = [
    "FileStateStore",
    "MemoryAuditStore",
    "MemoryCacheStore",
    "MemoryDatabase",
    "MemoryFleetStore",
    "MemoryRedis",
    "MemoryStateStore",
]
