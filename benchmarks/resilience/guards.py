"""Measures retry, breaker and both for a call that succeeds, as multiples of a bare await.

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
from collections.abc import Awaitable, Callable, Sequence

from benchmarks.results import Target, circumstances, command, publish, table, target_table

from viralfx.domain.resilience.breaker import CircuitBreaker
from viralfx.domain.resilience.policy import RetryBudget
from viralfx.domain.resilience.retry import retry

BARE = "bare await"
LIMITS = {"retry": 3.0, "breaker, CLOSED": 3.0, "retry over breaker": 4.0}
"""Maximum cost of each guard, in bare awaits."""
PROCESSES = 7
ROUNDS, CALLS = 400, 500


async def noop() -> None:
    """Do nothing: the guarded operation, and the unit of every ratio."""


async def measure() -> dict[str, float]:
    """Return the minimum of each candidate in nanoseconds per call."""
    candidates: dict[str, Callable[[], Awaitable[object]]] = {
        BARE: noop,
        "retry": retry()(noop),
        "breaker, CLOSED": CircuitBreaker()(noop),
        "retry over breaker": retry()(CircuitBreaker()(noop)),
        "retry with a budget": retry(budget=RetryBudget())(noop),
        "retry with a listener": retry(listeners=(lambda _: None,))(noop),
        "breaker over retry": CircuitBreaker()(retry()(noop)),
    }
    best = dict.fromkeys(candidates, float("inf"))
    names = list(candidates)
    for _ in range(ROUNDS):
        random.shuffle(names)
        for name in names:
            call = candidates[name]
            started = time.perf_counter_ns()
            for _ in range(CALLS):
                await call()
            best[name] = min(best[name], (time.perf_counter_ns() - started) / CALLS)
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
        print(json.dumps(asyncio.run(measure())))
        return 0
    measured = [_in_a_process() for _ in range(options.processes)]
    middle = {name: statistics.median(each[name] for each in measured) for name in measured[0]}
    ratios = {
        name: statistics.median(each[name] / each[BARE] for each in measured) for name in middle
    }
    targets = [
        Target(what=f"{name}, success", measured=ratios[name], limit=limit, at_least=False)
        for name, limit in LIMITS.items()
    ]
    lines = [
        *circumstances(
            command("bench-guards"),
            f"{len(measured)} processes of {ROUNDS} interleaved rounds of {CALLS} calls; minima of "
            "each process, medians of the processes; asyncio's own loop",
        ),
        "",
        *table(
            ("success", "ns", "x bare"),
            ((name, f"{middle[name]:.0f}", f"{ratios[name]:.2f}") for name in middle),
        ),
        "",
        *target_table(targets),
    ]
    return publish(
        "resilience/guards.py", lines, targets, check=options.check, record=not options.dry
    )


def _in_a_process() -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.resilience.guards", "--one"],
        check=True,
        stdout=subprocess.PIPE,
    )
    nanoseconds: dict[str, float] = json.loads(done.stdout)
    return nanoseconds


if __name__ == "__main__":
    sys.exit(main())
