"""An application of taskiq, whose tasks note in the file RUNS when they begin and end."""

import asyncio
import os
from pathlib import Path

from taskiq import TaskiqEvents, TaskiqScheduler, TaskiqState
from taskiq.schedule_sources import LabelScheduleSource

from viralfx.taskiq import LedgerBroker

broker = LedgerBroker()
idle = LedgerBroker()  # has no task
scheduler = TaskiqScheduler(broker, [LabelScheduleSource(broker)])


def note(*words: object) -> None:
    """Append a line."""
    with Path(os.environ["RUNS"]).open("a", encoding="utf-8") as file:
        print(*words, file=file)


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def start(state: TaskiqState) -> None:
    """Start the worker."""
    state.pid = os.getpid()
    note("start", state.pid)


@broker.task("pack")
async def pack(number: int) -> int:
    """Go on when RUNS.go exists."""
    note("begin", number, broker.state.pid)
    while not Path(f"{os.environ['RUNS']}.go").exists():  # noqa: ASYNC110, ASYNC240 - of a test
        await asyncio.sleep(0.05)
    note("end", number)
    return number * 2


@broker.task("tick", schedule=[{"interval": 1}])
def tick() -> None:
    """Run by the scheduler."""
    note("tick")
