"""How late the event loop is."""

import asyncio
from typing import cast

from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import value
from tests.virtual_time import VirtualTimeLoop, run_in_virtual_time

from viralfx.bootstrap import assemble
from viralfx.settings import Settings
from viralfx.telemetry.metrics.loop import LoopLag

COUNT, SUM = "viralfx_event_loop_lag_seconds_count", "viralfx_event_loop_lag_seconds_sum"


def test_a_loop_that_is_held_up_is_late() -> None:
    """By as much as it was blocked; otherwise by nothing."""
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

    assert value(registry, COUNT) == 11
    assert value(registry, SUM) == 2.75


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
