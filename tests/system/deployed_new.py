"""Tasks of the version after a deployment, for TASK_MODULES: one more, and a changed payload."""

import msgspec

from viralfx import task


class Payment(msgspec.Struct, forbid_unknown_fields=True):
    """The payload after the deployment; it still decodes the old one."""

    amount: str = ""
    cents: int = 0


@task("deployed.pay")
async def pay(payment: Payment) -> str:
    """Return the version that ran."""
    return f"new {payment.amount or payment.cents}"


@task("deployed.refund")
async def refund(number: int) -> int:
    """Return the payload."""
    return number
