"""The way of a job through its worker, from the notification to the settled row."""

import asyncio
import sys
from pathlib import Path
from types import FrameType

from tests.unit.jobs.fleet import Fleet

import viralfx
from viralfx.jobs.model import JobState
from viralfx.jobs.notifier import JobNotification

PACKAGE = Path(viralfx.__file__).parent
WORKER = {
    "jobs/batching.py",
    "jobs/hooks.py",
    "jobs/worker/calls.py",
    "jobs/worker/completer.py",
    "jobs/worker/consumer.py",
    "jobs/worker/availability.py",
    "jobs/worker/context.py",
    "jobs/worker/due_times.py",
    "jobs/worker/execution.py",
    "jobs/worker/lease.py",
    "jobs/worker/poller.py",
    "jobs/worker/quarantine.py",
    "jobs/worker/running.py",
}
"""The files of the worker: each further one makes the way harder to follow."""
MAX_FILES = 25
"""Those of the model, of the codec and of the adapters in memory included."""
MAX_TURNS = 5


async def test_the_way_of_a_job_is_short(fleet: Fleet) -> None:
    """It is counted for the second job, since the first one starts roles of the worker."""
    fleet.start()
    await fleet.final(await fleet.submit())
    job_id = await fleet.accept()
    files: set[str] = set()

    def enter(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.add(path.relative_to(PACKAGE).as_posix())

    turns = 0
    sys.setprofile(enter)
    try:
        await fleet.notifier.notify(JobNotification(queue="default", ids=(job_id,)))
        while (await fleet.memory_ledger.get(job_id)).state is not JobState.COMPLETED:  # type: ignore[union-attr]
            turns += 1
            await asyncio.sleep(0)
    finally:
        sys.setprofile(None)

    assert {each for each in files if each.startswith("jobs/worker/")} <= WORKER
    assert files >= WORKER
    assert len(files) <= MAX_FILES
    assert turns <= MAX_TURNS
