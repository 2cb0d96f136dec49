"""The composition root: settings in, wired services out; the only package that names adapters."""

from typing import TYPE_CHECKING

from viralfx.bootstrap.assembly import Assembly, assemble
from viralfx.bootstrap.jobs import JobRuntime

if TYPE_CHECKING:
    # For annotations only; the drivers are loaded when the adapters are wired.
    from viralfx.adapters.redis import RedisClient
    from viralfx.postgres import PostgresDatabase

__all__ = ["Assembly", "JobRuntime", "PostgresDatabase", "RedisClient", "assemble"]
