"""An application of taskiq on the ledger, in processes of its own that die."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from tests.integration.taskiq_brokers import set_environment
from tests.servers.postgres import Database
from tests.servers.waiting import until
from tests.system import taskiq_app
from tests.system.service import ROOT
from tests.system.workers import environment_of
from tests.system.workers import worker as viralfx_worker

MESSAGES, SLOTS = 8, 4
SECONDS = 60.0
APP = "tests.system.taskiq_app"


@contextmanager
def taskiq(environment: Mapping[str, str], *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of taskiq in a process group of its own; kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "taskiq", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def worker(kind: str, environment: Mapping[str, str]) -> AbstractContextManager[object]:
    """Run ``taskiq worker`` or ``viralfx worker``; kill it at the end."""
    if kind == "taskiq":
        return taskiq(environment, "worker", f"{APP}:broker", "--workers", "1")
    if kind == "viralfx --app":
        return viralfx(environment, "--app", f"{APP}:broker")
    return viralfx({**environment, "TASK_MODULES": APP})


@contextmanager
def viralfx(environment: Mapping[str, str], *arguments: str) -> Iterator[None]:
    """Run ``viralfx worker``, and kill it at the end."""
    with viralfx_worker(environment, *arguments) as process:
        yield
        process.signal(signal.SIGKILL)


@pytest.mark.each_python
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("killed", "other"), [("taskiq", "viralfx"), ("viralfx --app", "taskiq")])
async def test_no_message_is_lost_when_its_worker_is_killed(
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: str,
    other: str,
) -> None:
    """The other kind of worker runs what the killed one had; the scheduler sends meanwhile."""
    runs = tmp_path / "runs"
    runs.touch()
    environment = environment_of(
        database, TASK_MODULES="none", RUNS=str(runs), JOB_CONCURRENCY=str(SLOTS), LOG_LEVEL="warn"
    )
    set_environment(monkeypatch, database.url)
    broker = taskiq_app.broker

    def lines(word: str) -> list[list[str]]:
        text = runs.read_text(encoding="utf-8")
        return [line.split() for line in text.splitlines() if line.startswith(word)]

    async with broker:
        sent = [await taskiq_app.pack.kiq(number) for number in range(MESSAGES)]
        with worker(killed, environment):
            await until(lambda: len(lines("begin")) == SLOTS, seconds=SECONDS)
        begun = {number for _, number, _ in lines("begin")}
        (tmp_path / "runs.go").touch()
        with (
            worker(other, environment),
            taskiq(environment, "scheduler", f"{APP}:scheduler"),
        ):
            results = await asyncio.gather(*(task.wait_result(timeout=SECONDS) for task in sent))
            await until(lambda: lines("tick"), seconds=SECONDS)
        jobs = [await broker.find_job(task.task_id) for task in sent]

    assert [result.return_value for result in results] == [2 * n for n in range(MESSAGES)]
    assert {number for _, number in lines("end")} == set(map(str, range(MESSAGES)))
    assert begun <= {str(number) for number, job in enumerate(jobs) if job.crashes}
    assert len({pid for _, pid in lines("start")}) == 2
