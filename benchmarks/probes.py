"""Measures probes and ordinary requests under ``viralfx serve``, compared with bare servers.

Go's net/http is included if a Go compiler is installed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import publish, target_table
from benchmarks.rounds import (
    READING,
    ROUNDS,
    Round,
    Subject,
    how,
    measure,
    ratios,
    subject_table,
    target,
)
from benchmarks.servers import BACKEND, BARE_ASGI, BARE_LITESTAR, MOUNTED, net_http

ASGI_LIVE = Subject(BARE_ASGI, "/health/live")
ASGI_DETAILED = Subject(BARE_ASGI, "/health/detailed")
LITESTAR_LIVE = Subject(BARE_LITESTAR, "/health/live")
LITESTAR_WORK = Subject(BARE_LITESTAR, "/work")
LIVE = Subject(BACKEND, "/health/live")
READY = Subject(BACKEND, "/health/ready")
DETAILED = Subject(BACKEND, "/health/detailed")
MOUNTED_WORK = Subject(MOUNTED, "/work")

SUBJECTS = (
    LITESTAR_LIVE,
    ASGI_LIVE,
    LIVE,
    READY,
    DETAILED,
    ASGI_DETAILED,
    LITESTAR_WORK,
    MOUNTED_WORK,
)
COMPARISONS = (
    (LIVE, ASGI_LIVE, 1.5),
    (READY, ASGI_LIVE, 1.5),
    (DETAILED, ASGI_DETAILED, 1.5),
    (MOUNTED_WORK, LITESTAR_WORK, 0.85),
)
FOR_ORIENTATION = ((LITESTAR_LIVE, ASGI_LIVE), (ASGI_DETAILED, ASGI_LIVE))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    options = parser.parse_args(arguments)
    go = net_http()
    go_live = () if go is None else (Subject(go, "/health/live"),)
    rounds = measure((*SUBJECTS, *go_live), options.rounds)
    targets = [target(rounds, *comparison) for comparison in COMPARISONS]
    lines = [
        *how(rounds, "python benchmarks/probes.py"),
        "",
        *subject_table(rounds, (*SUBJECTS, *go_live)),
        "",
        *target_table(targets),
        "",
        READING,
        "",
        *(f"- For orientation: {_orientation(rounds, *pair)}" for pair in FOR_ORIENTATION),
        *(f"- For orientation: {_orientation(rounds, LIVE, peer)}" for peer in go_live),
    ]
    return publish("probes.py", lines, targets, check=options.check)


def _orientation(rounds: Sequence[Round], ours: Subject, theirs: Subject) -> str:
    by_rate, by_cost = ratios(rounds, ours, theirs)
    return f"{ours} / {theirs} is {by_rate:.2f} ({by_cost:.2f} by CPU)."


if __name__ == "__main__":
    sys.exit(main())
