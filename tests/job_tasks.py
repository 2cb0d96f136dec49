"""Tasks as an application declares them, for TASK_MODULES."""

import asyncio
import gc
import os
import sys

import msgspec

from viralfx import JobContext, task


class Parcel(msgspec.Struct, forbid_unknown_fields=True):
    """A payload."""

    weight: int
    to: list[str] = []


@task("parcels.ship")
async def ship(parcel: Parcel, context: JobContext) -> dict[str, object]:
    """Tell what was shipped, and for whom."""
    return {
        "weight": parcel.weight,
        "attempt": context.attempt,
        "correlationId": context.correlation_id,
    }


@task("parcels.echo", queue="analytics")
async def echo(payload: object) -> object:
    """Return what came in."""
    return payload


@task("parcels.wait", queue="notifications")
async def wait(seconds: float) -> float:
    """Take so long."""
    await asyncio.sleep(seconds)
    return seconds


@task("parcels.lose")
async def lose(_: object) -> None:
    """Fail each time."""
    raise RuntimeError("planted: the parcel is lost")


@task("parcels.interpreter")
async def interpreter(_: object) -> dict[str, float]:
    """Return how the interpreter switches between threads and collects garbage."""
    return {"switches": sys.getswitchinterval(), "collects": gc.get_threshold()[0]}


@task("parcels.die")
async def die(_: object) -> None:
    """End the process without any ado."""
    os._exit(66)


@task("parcels.never", queue="notifications")
async def never(_: object) -> None:
    """Wait forever and ignore every cancellation."""
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
