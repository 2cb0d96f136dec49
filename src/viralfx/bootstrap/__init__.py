"""The composition root: settings in, wired services out; the only package that names adapters."""

from typing import TYPE_CHECKING

from viralfx.bootstrap.assembly import Assembly, assemble

if TYPE_CHECKING:
    # For annotations of those who hand them on; their drivers load when they are wired.
    from viralfx.adapters.postgres import PostgresDatabase
    from viralfx.adapters.redis import RedisClient

__all__ = ["Assembly", "PostgresDatabase", "RedisClient", "assemble"]
