"""Repeats cases that take times, and publishes the times beside their limits."""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.servers import supply

Times: TypeAlias = Mapping[str, float]
"""Seconds, by what takes them."""


class Case(NamedTuple):
    """A situation; ``limits`` has the seconds that each of the times of a run may take."""

    limits: Times
    run: Callable[[], Times]


def on_a_loop(limits: Times, run: Callable[[], Coroutine[Any, Any, Times]]) -> Case:
    """Return a case that runs on an event loop of its own."""
    return Case(limits, lambda: asyncio.run(run()))


async def seconds_of(work: Awaitable[object]) -> float:
    """Await the work, and return how long it took."""
    began = time.monotonic()
    await work
    return time.monotonic() - began


class WrongAnswerError(Exception):
    """A case got another answer than the one whose time it takes."""


def require(met: object, what: str) -> None:
    """Raise :class:`WrongAnswerError` unless it is met: a time counts only with its answer."""
    if not met:
        raise WrongAnswerError(what)


@contextmanager
def refused(*errors: type[BaseException]) -> Iterator[None]:
    """Expect one of the errors, and raise :class:`WrongAnswerError` without it."""
    try:
        yield
    except errors:
        return
    raise WrongAnswerError(f"no error of {errors}")


def main(
    recipe: str,
    section: str,
    description: str | None,
    cases: Mapping[str, Case],
    reading: str,
    *,
    arguments: Sequence[str] | None = None,
    rounds: int = 5,
) -> int:
    """Run the cases of ``--only`` in turn, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog=f"just {recipe}", description=description)
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help=f"of each case; default: {rounds}")
    add("--only", nargs="+", default=[""], metavar="TEXT", help="cases with a text in the name")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    chosen = {
        name: case for name, case in cases.items() if any(text in name for text in options.only)
    }
    seen: dict[str, list[float]] = {what: [] for case in chosen.values() for what in case.limits}
    for number in range(options.rounds):
        for name, case in chosen.items():
            times = case.run()
            require(times.keys() == case.limits.keys(), f"{name} takes the times {[*times]}")
            for what, seconds in times.items():
                seen[what].append(seconds)
            shown = ", ".join(f"{what}: {seconds:.3f} s" for what, seconds in times.items())
            print(f"round {number + 1}, {name}: {shown}", flush=True)
    targets = [
        Target(
            what=f"{what}, at most",
            measured=max(seen[what]),
            limit=limit,
            at_least=False,
            unit=" s",
        )
        for case in chosen.values()
        for what, limit in case.limits.items()
    ]
    lines = [
        *circumstances(
            command(recipe),
            f"Postgres {supply.chosen().postgres}, Redis {supply.chosen().redis}",
            f"{options.rounds} rounds of each case",
        ),
        "",
        *table(
            ("time", "least s", "median s", "longest s"),
            (
                (what, *(f"{each(times):.3f}" for each in (min, statistics.median, max)))
                for what, times in seen.items()
            ),
        ),
        *("", *target_table(targets), "", reading),
    ]
    return publish(section, lines, targets, check=options.check, record=not options.dry)
