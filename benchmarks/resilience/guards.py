"""Measures retry, breaker and both for a call that succeeds, as multiples of a bare await.

It measures a deadline beside ``asyncio.timeout``, too: a worker runs each job in a task of its own
within a deadline, and most jobs are short.

The rounds of all candidates are short and alternate in random order, and the minimum of each
counts, so that a slow moment of the machine affects all alike. The memory layout changes a ratio by
a tenth between processes, so the median of several processes is published.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from benchmarks.results import Target, circumstances, command, publish, table, target_table

from viralfx.core.clock import SystemClock
from viralfx.resilience.breaker import CircuitBreaker
from viralfx.resilience.deadline import Deadline
from viralfx.resilience.policy import RetryBudget
from viralfx.resilience.retry import retry
from viralfx.runner.process import loop_factory

BARE = "bare await"
LIMITS = {"retry": 3.0, "breaker, CLOSED": 3.0, "retry over breaker": 4.0}
"""Maximum cost of each guard, in bare awaits."""
BLOCK_LIMIT = 0.9
"""Maximum of what a deadline adds to a short task, to that of ``asyncio.timeout``."""
PROCESSES = 7
ROUNDS, CALLS = 400, 500
TASKS = 100
"""Tasks that start together: the default slots of a queue."""

Work = Callable[[], Coroutine[Any, Any, None]]


async def noop() -> None:
    """Do nothing: the guarded operation, and the unit of every ratio."""


async def in_no_block() -> None:
    """Await an operation without a limit."""
    await noop()


async def in_timeout() -> None:
    """Await it in a block of ``asyncio.timeout``."""
    async with asyncio.timeout(60.0):
        await noop()


async def in_deadline() -> None:
    """Await it in a block of a deadline."""
    async with Deadline(60.0, clock=_CLOCK):
        await noop()


_CLOCK = SystemClock()
BARE_TASK, TIMEOUT, DEADLINE = "bare task", "task in asyncio.timeout", "task in a Deadline"


async def measure_tasks() -> dict[str, float]:
    """Return the minimum of each kind of task in nanoseconds per task."""

    async def start_together(work: Work) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(TASKS):
                group.create_task(work())
        await asyncio.sleep(0)  # the loop drops cancelled timers

    candidates = {BARE_TASK: in_no_block, TIMEOUT: in_timeout, DEADLINE: in_deadline}
    return await _minima(candidates, start_together, TASKS)


async def measure_calls() -> dict[str, float]:
    """Return the minimum of each candidate in nanoseconds per call."""

    async def call(candidate: Work) -> None:
        for _ in range(CALLS):
            await candidate()

    candidates = {
        BARE: noop,
        "retry": retry()(noop),
        "breaker, CLOSED": CircuitBreaker()(noop),
        "retry over breaker": retry()(CircuitBreaker()(noop)),
        "retry with a budget": retry(budget=RetryBudget())(noop),
        "retry with a listener": retry(listeners=(lambda _: None,))(noop),
        "breaker over retry": CircuitBreaker()(retry()(noop)),
    }
    return await _minima(candidates, call, CALLS)


async def _minima(
    candidates: Mapping[str, Work], run: Callable[[Work], Awaitable[None]], calls: int
) -> dict[str, float]:
    """Return the minimum of each candidate in nanoseconds for one of the calls of a run."""
    best = dict.fromkeys(candidates, float("inf"))
    names = list(candidates)
    for _ in range(ROUNDS):
        random.shuffle(names)
        for name in names:
            candidate = candidates[name]
            started = time.perf_counter_ns()
            await run(candidate)
            best[name] = min(best[name], (time.perf_counter_ns() - started) / calls)
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-guards", description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--processes", type=int, default=PROCESSES, help=f"default: {PROCESSES}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    add("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            print(json.dumps([asyncio.run(measure_calls()), runner.run(measure_tasks())]))
        return 0
    calls, tasks = zip(*(_in_a_process() for _ in range(options.processes)), strict=True)
    ratios = _in_units_of(BARE, calls)
    targets = [
        Target(what=f"{name}, success", measured=ratios[name], limit=limit, at_least=False)
        for name, limit in LIMITS.items()
    ]
    added = statistics.median(
        (each[DEADLINE] - each[BARE_TASK]) / (each[TIMEOUT] - each[BARE_TASK]) for each in tasks
    )
    what = "added by a Deadline / by asyncio.timeout"
    targets.append(Target(what=what, measured=added, limit=BLOCK_LIMIT, at_least=False))
    lines = [
        *circumstances(
            command("bench-guards"),
            f"{len(calls)} processes of {ROUNDS} interleaved rounds of {CALLS} calls; minima of "
            "each process, medians of the processes; asyncio's own loop",
            f"Tasks: {TASKS} that start together, in as many rounds; the loop of the service",
        ),
        "",
        *_table("success", calls, BARE),
        "",
        *_table("a task that does not wait", tasks, BARE_TASK),
        "",
        *target_table(targets),
    ]
    return publish(
        "resilience/guards.py", lines, targets, check=options.check, record=not options.dry
    )


_Nanoseconds = dict[str, float]


def _in_units_of(bare: str, measured: Sequence[_Nanoseconds]) -> dict[str, float]:
    return {
        name: statistics.median(each[name] / each[bare] for each in measured)
        for name in measured[0]
    }


def _table(what: str, measured: Sequence[_Nanoseconds], bare: str) -> list[str]:
    ratios = _in_units_of(bare, measured)
    middle = {name: statistics.median(each[name] for each in measured) for name in ratios}
    return table(
        (what, "ns", "x bare"),
        ((name, f"{middle[name]:.0f}", f"{ratios[name]:.2f}") for name in middle),
    )


def _in_a_process() -> list[_Nanoseconds]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.resilience.guards", "--one"],
        check=True,
        stdout=subprocess.PIPE,
    )
    calls_and_tasks: list[_Nanoseconds] = json.loads(done.stdout)
    return calls_and_tasks


if __name__ == "__main__":
    sys.exit(main())
