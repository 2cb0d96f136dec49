"""The fleet in the console: how soon it is right about a start, a stop and a kill.

Small processes share one Postgres: an API, whose console is asked, and workers. They start one
after another, then some are killed and the others are stopped. The times run from the start of the
program, from SIGTERM and from SIGKILL until the API shows the process as it is. Behind a pooler no
connection tells that a process has ended, so only the age of its last report does.
"""

import argparse
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import Program, Server, viralfx, worker
from tests import forked
from tests.servers.postgres import postgres_server
from tests.system.service import request

from viralfx.domain.fleet import BEAT_SECONDS, SILENT_AFTER_SECONDS

PROCESSES, KILLS = 20, 5
RIGHT_WITHIN = 5.0
"""Seconds, after a start or a stop."""
POLL_SECONDS = 0.05
GIVE_UP_SECONDS = 60.0
TOKEN = "0123456789abcdef-of-the-benchmark"
SMALL = {
    "DB_POOL_MIN": "1",
    "DB_POOL_MAX": "3",
    "LOG_LEVEL": "error",
    "MANAGEMENT_TOKEN": TOKEN,
}
POOLERS = {"none": "directly", "transaction": "as behind a pooler"}
SHARED_SECONDS = 1.0
"""For so long the pages share an answer about the fleet."""
LIMITS = {
    "start": RIGHT_WITHIN,
    "stop": RIGHT_WITHIN,
    "kill": SILENT_AFTER_SECONDS + SHARED_SECONDS,
}
RUNNING = {"starting", "ready", "not_ready"}
STOPPING = {"lame_duck", "draining", "stopped"}

Times = dict[str, list[float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-fleet", description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--processes", type=int, default=PROCESSES, help=f"default: {PROCESSES}")
    add("--kills", type=int, default=KILLS, help=f"processes that are killed; default: {KILLS}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    if not 0 < options.kills < options.processes - 1:
        parser.error("kill at least one process, and leave at least one worker to stop")
    found = {pooler: _measure(options, pooler) for pooler in POOLERS}
    targets = [
        Target(
            what=f"the slowest {event}, {words}",
            measured=max(found[pooler][event]),
            limit=limit,
            at_least=False,
            unit=" s",
        )
        for pooler, words in POOLERS.items()
        for event, limit in LIMITS.items()
    ]
    rows = [
        (f"{event}, {words}", str(len(times)), *_figures(times))
        for pooler, words in POOLERS.items()
        for event, times in found[pooler].items()
    ]
    lines = [
        *circumstances(
            command("bench-fleet"),
            f"{options.processes} processes, one of them the API; reports every {BEAT_SECONDS:g} s",
        ),
        "",
        *table(("right after a", "times", "least s", "median s", "most s"), rows),
        "",
        *target_table(targets),
    ]
    return publish("fleet.py", lines, targets, check=options.check, record=not options.dry)


def _figures(times: Sequence[float]) -> tuple[str, str, str]:
    return f"{min(times):.2f}", f"{statistics.median(times):.2f}", f"{max(times):.2f}"


def _measure(options: argparse.Namespace, pooler: str) -> Times:
    """Return the seconds until the fleet is right, for each kind of event."""
    times: Times = {event: [] for event in LIMITS}
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server(settings={"max_connections": "300"}))
        environment = {**SMALL, "DATABASE_URL": postgres.url(), "DB_POOLER": pooler}
        migrated = forked.viralfx("migrate", environ={**os.environ, **environment})
        if migrated.returncode:
            raise SystemExit(migrated.stderr)

        def start(program: Program) -> Server:
            return stack.enter_context(Server(program, anywhere=True))

        api = start(viralfx("viralfx serve", **environment))
        api.wait_for_200("/health/ready", seconds=GIVE_UP_SECONDS)
        states = _reader(api.port)
        workers = []
        for _ in range(options.processes - 1):
            workers.append(start(worker("viralfx worker", **environment)))
            times["start"].append(_until(states, workers[-1], RUNNING, workers[-1].started_at))
            _until(states, workers[-1], {"ready"}, time.monotonic())
        killed, stopped = workers[: options.kills], workers[options.kills :]
        for each in killed:
            os.kill(each.pid, signal.SIGKILL)
            times["kill"].append(_until(states, each, {"silent"}, time.monotonic()))
        for each in stopped:
            each.terminate()
            times["stop"].append(_until(states, each, STOPPING, time.monotonic()))
        for each in stopped:
            _until(states, each, {"stopped"}, time.monotonic())
        last = states()
    wanted = {api.pid: "ready"} | {each.pid: "silent" for each in killed}
    wanted |= {each.pid: "stopped" for each in stopped}
    if last != wanted:
        raise SystemExit(f"the fleet is wrong at the end: {last}, not {wanted}")
    return times


def _reader(port: int) -> Callable[[], Mapping[int, str]]:
    """Log in at the API, and return a function that reads the states by process id."""
    path, body = "/health/ui/session", {"token": TOKEN}
    answer = request(port, path, method="POST", json_body=body)
    cookie = {"Cookie": answer.headers["set-cookie"].split(";")[0]}

    def states() -> Mapping[int, str]:
        items = request(port, "/health/ui/data/fleet", headers=cookie).json()["items"]
        return {int(each["instance"].rsplit("-", 2)[1]): each["state"] for each in items}

    return states


def _until(
    states: Callable[[], Mapping[int, str]], process: Server, wanted: set[str], since: float
) -> float:
    """Return the seconds since a moment until the fleet shows a process in one of some states."""
    while (shown := states().get(process.pid)) not in wanted:
        if time.monotonic() > since + GIVE_UP_SECONDS:
            raise SystemExit(f"{shown}, not one of {wanted}\n{process.output()}")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - since


if __name__ == "__main__":
    sys.exit(main())
