"""Tasks of a newer version: one that is new, and one whose payload has changed."""

import msgspec
from tests.system.culprit_tasks import note

from viralfx import JobContext, task


class Amount(msgspec.Struct, forbid_unknown_fields=True):
    """The newer payload."""

    amount: str


@task("versions.new")
async def new(number: int, context: JobContext) -> int:
    """Exist only in the newer version."""
    note(context)
    return number


@task("versions.changed")
async def changed(payload: Amount, context: JobContext) -> str:
    """Take the newer payload."""
    note(context)
    return payload.amount
