"""Measures calls that each request makes: its metrics, and a log line while no reader takes any."""

import argparse
import os
import sys
import timeit
from collections.abc import Sequence
from time import perf_counter

from benchmarks.results import Target, circumstances, command, publish, target_table

from viralfx.telemetry.logging.writer import LineWriter
from viralfx.telemetry.metrics import Metrics

CALLS, ROUNDS, LINES = 10_000, 20, 20_000
MAX_OBSERVE_US, MAX_WRITE_US = 1.5, 10_000.0
READING = (
    "The metrics are those of one request, the best of the rounds. The lines go into a pipe that is"
    " full, and beyond 100 kB they are dropped and counted."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-costs", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} calls; default: {ROUNDS}")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    writes = _writes()
    targets = [
        Target(
            what="metrics of a request",
            measured=_observe(options.rounds),
            limit=MAX_OBSERVE_US,
            at_least=False,
            unit=" µs",
        ),
        Target(
            what="p99 of a log line, written while no reader takes any",
            measured=1e6 * writes[int(0.99 * len(writes))],
            limit=MAX_WRITE_US,
            at_least=False,
            unit=" µs",
            remark=f"longest: {1e6 * writes[-1]:.0f} µs",
        ),
    ]
    lines = [
        *circumstances(
            command("bench-costs"),
            f"{options.rounds} rounds of {CALLS} observed requests; {LINES} lines",
        ),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("costs.py", lines, targets, check=options.check, record=not options.dry)


def _observe(rounds: int) -> float:
    requests = Metrics().requests

    def observe() -> None:
        requests.observe("GET", "/users/{id}", 200, 0.03)

    return 1e6 * min(timeit.repeat(observe, number=CALLS, repeat=rounds)) / CALLS


def _writes() -> list[float]:
    """Return the seconds of each line, in order of length."""
    reader, full = os.pipe()
    took = []
    writer = LineWriter(
        full, lost_warning=lambda lost: b"lost %d\n" % lost, max_waiting_bytes=100_000
    )
    for number in range(LINES):
        began = perf_counter()
        writer.write(b"line %05d\n" % number)
        took.append(perf_counter() - began)
    os.close(reader)  # the thread of the writer gets an error, and goes on
    writer.close()
    os.close(full)
    return sorted(took)


if __name__ == "__main__":
    sys.exit(main())
