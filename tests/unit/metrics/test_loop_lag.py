"""How late the event loop is."""

import asyncio
from typing import cast

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import value
from tests.virtual_time import VirtualTimeLoop, run_in_virtual_time

from viralfx.bootstrap import assemble
from viralfx.settings import Settings
from viralfx.telemetry.metrics.loop import LoopLag

COUNT, SUM = "viralfx_event_loop_lag_seconds_count", "viralfx_event_loop_lag_seconds_sum"
BUCKET = "viralfx_event_loop_lag_seconds_bucket"


def test_a_loop_that_is_held_up_is_late() -> None:
    """By as much as it was blocked, and by what is left of that half a second later; and so on."""
    registry = CollectorRegistry()

    async def main() -> None:
        lag = LoopLag(registry, period=0.5)
        lag.start()
        lag.start()  # harmless
        await asyncio.sleep(5.25)
        loop = cast("VirtualTimeLoop", asyncio.get_running_loop())
        loop.jump(3.0)  # the next was due in 0.25
        await asyncio.sleep(0.1)
        lag.stop()
        await asyncio.sleep(10)

    run_in_virtual_time(main())

    assert value(registry, COUNT) == 10 + 6
    assert value(registry, SUM) == 2.75 + 2.25 + 1.75 + 1.25 + 0.75 + 0.25


def test_a_loop_that_is_blocked_in_one_piece_is_late_for_as_long() -> None:
    """Thirty seconds of five minutes are a tenth of all samples."""
    registry = CollectorRegistry()

    async def main() -> None:
        lag = LoopLag(registry)
        lag.start()
        await asyncio.sleep(135.1)
        cast("VirtualTimeLoop", asyncio.get_running_loop()).jump(30.0)
        await asyncio.sleep(135.1)
        lag.stop()

    run_in_virtual_time(main())
    count, quick = value(registry, COUNT), value(registry, BUCKET, le="0.25")

    assert count is not None
    assert quick is not None
    assert count == pytest.approx(600, abs=2)
    assert count - quick == pytest.approx(60, abs=1)


def test_a_process_that_was_stopped_for_a_night_does_not_count_for_long() -> None:
    """It makes up for the five minutes of samples that were the latest, and no more."""
    registry = CollectorRegistry()

    async def main() -> None:
        lag = LoopLag(registry)
        lag.start()
        await asyncio.sleep(1.25)
        cast("VirtualTimeLoop", asyncio.get_running_loop()).jump(8 * 3600.0)
        await asyncio.sleep(0.1)
        lag.stop()

    run_in_virtual_time(main())

    assert value(registry, COUNT) == 2 + 600
    assert value(registry, BUCKET, le="10.0") == 2


def test_it_runs_from_the_start_of_the_application_to_its_end() -> None:
    """An application that is only made has no timer; one that has stopped has none any more."""
    registry, counts = CollectorRegistry(), list[float | None]()

    async def main() -> None:
        nonlocal registry
        assembly = assemble(Settings())
        registry, operations = assembly.metrics.registry, assembly.operations
        await asyncio.sleep(10)
        counts.append(value(registry, COUNT))
        await operations.start()
        operations.application_ready()
        await asyncio.sleep(10)
        counts.append(value(registry, COUNT))
        operations.shutdown.trigger("test")
        await operations.shutdown.run()
        counts.append(value(registry, COUNT))
        await asyncio.sleep(10)
        counts.append(value(registry, COUNT))

    run_in_virtual_time(main())
    before, running, stopped, after = counts

    assert before == 0
    assert running is not None
    assert running >= 19
    assert after == stopped
