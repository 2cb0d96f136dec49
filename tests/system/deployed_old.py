"""Tasks of the version before a deployment, for TASK_MODULES."""

import msgspec

from viralfx import task


class Payment(msgspec.Struct, forbid_unknown_fields=True):
    """The payload before the deployment."""

    cents: int


@task("deployed.pay")
async def pay(payment: Payment) -> str:
    """Return the version that ran."""
    return f"old {payment.cents}"
