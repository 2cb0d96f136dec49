"""A task of an older version, whose payload has another field than in ``newer_tasks``."""

import msgspec

from viralfx import task


class Amount(msgspec.Struct, forbid_unknown_fields=True):
    """The older payload."""

    cents: int


@task("versions.changed")
async def changed(payload: Amount) -> int:
    """Take the older payload."""
    return payload.cents
