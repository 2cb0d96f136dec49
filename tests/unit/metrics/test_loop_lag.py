"""Tests of the event loop's lag."""

import asyncio
from typing import cast

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import value
from tests.virtual_time import VirtualTimeLoop, run_in_virtual_time

from viralfx.bootstrap import assemble
from viralfx.settings import Settings
from viralfx.telemetry.metrics.health import LoopLag

COUNT, SUM = "viralfx_event_loop_lag_seconds_count", "viralfx_event_loop_lag_seconds_sum"
BUCKET = "viralfx_event_loop_lag_seconds_bucket"


def test_a_blocked_loop_adds_all_missed_samples() -> None:
    """The first sample is late by the whole delay, each further one by half a second less."""
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


def test_one_long_delay_has_its_share_of_the_samples() -> None:
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


def test_samples_after_a_suspension_are_limited() -> None:
    """Only the five minutes of samples with the longest delays are added."""
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


def test_sampling_runs_from_start_to_stop() -> None:
    """An application has no timer before its start and after its end."""
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
