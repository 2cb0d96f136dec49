"""An application with markup in every text that the operations console shows."""

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Annotated

from litestar import Litestar, get
from litestar.params import QueryParameter

from viralfx import (
    CircuitBreaker,
    Observation,
    OperationsConfig,
    OperationsPlugin,
    Status,
    task,
)

PLANTED = (
    "<script>document.body.id='planted'</script><img src=x onerror=\"document.body.id='planted'\">"
)
"""It would give the body an id if a page took it for markup."""

REVERSED = "invoice\u2069\u202eexe.pdf"
"""It would end the isolation of its text, and reverse what comes after it."""

logging.getLogger(f"markup.{PLANTED}")
logging.getLogger(f"reversed.{REVERSED}")


class Supplier:
    """Fails while the file ``SUPPLIER_AWAY`` exists."""

    def check(self) -> Observation:
        """Return the status, with markup in the message and in the details."""
        away = Path(os.environ.get("SUPPLIER_AWAY", "/nonexistent")).exists()
        status = Status.FAIL if away else Status.PASS
        return Observation(
            status=status,
            message=f"The supplier {'does not answer' if away else 'answers'} {PLANTED}",
            code="refused" if away else None,
            details={PLANTED: PLANTED},
        )


@task("console.webhook", queue="notifications")
async def webhook(payload: object) -> object:
    """Fail unless the payload is a number."""
    if isinstance(payload, int):
        return payload
    raise RuntimeError(f"the receiver is away {PLANTED}")


@task("console.long")
async def long(seconds: float) -> str:
    """Run for a time and return markup."""
    await asyncio.sleep(seconds)
    return PLANTED


@task("console.large")
async def large(size: int) -> str:
    """Return markup of so many characters."""
    return (PLANTED * size)[:size]


@task(f"console.planted {PLANTED}")
async def planted(payload: object) -> object:
    """Return the payload; the name of the task is markup."""
    return payload


@task(f"console.reversed {REVERSED}", queue="notifications")
async def turned(payload: object) -> None:
    """Fail; the name of the task and the error would reverse the text after them."""
    raise RuntimeError(f"{REVERSED} {payload}")


carrier = CircuitBreaker(name=f"carrier {PLANTED}")


@get("/carrier")
async def call_carrier() -> dict[str, str]:
    """Fail to reach the carrier."""

    async def fail() -> None:
        raise OSError("away")

    with contextlib.suppress(OSError):
        await carrier.execute(fail)
    return {"state": carrier.state}


@get("/slow", cancel_on_disconnect=True)
async def slow(seconds: Annotated[float, QueryParameter()]) -> dict[str, bool]:
    """Respond after a time, unless the client leaves."""
    await asyncio.sleep(seconds)
    return {"done": True}


@task("console.scheduled", cron="0 3 1 1 *")
async def scheduled(payload: object) -> None:
    """Run once a year."""


async def stage(_budget: float) -> None:
    """Take ``STAGE_SECONDS`` of a phase of the stop, so that a page has the time to show it."""
    await asyncio.sleep(float(os.environ.get("STAGE_SECONDS", "0")))


MORE_CHECKS = int(os.environ.get("MORE_CHECKS", "0"))

plugin = OperationsPlugin(
    OperationsConfig(
        checks={
            "supplier": Supplier(),
            **{f"supplier-{n}": Supplier() for n in range(MORE_CHECKS)},
        },
        tasks=[webhook, long, large, planted, turned, scheduled],
        save_stages={"orders": stage},
        close_stages={"printer": stage},
        show_payload=lambda _, content: content.decode(),
        jobs_api=True,
        breakers=[carrier],
    )
)
app = Litestar([call_carrier, slow], plugins=[plugin])
