"""Measures the cost of guards: the minimum of interleaved rounds, and its ratio to a bare await.

python -m benchmarks.resilience.bench [rounds] [calls]

The rounds of all candidates alternate in random order, so that a slow moment of the machine affects
all alike. The spread of rounds is wide; only minima and ratios are comparable. Prints Markdown.
"""

import asyncio
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable

from benchmarks.resilience.subjects import BREAKERS, RETRIES, BackendError, ours, ours_window

from viralfx.resilience.breaker import CircuitBreaker
from viralfx.resilience.breaker_states import RollingWindow
from viralfx.resilience.retry import retry

Candidate = Callable[[], Awaitable[object]]


async def noop() -> None:
    """Do nothing: the guarded operation, and the unit of every ratio."""


async def failing() -> None:
    """Fail at once."""
    raise BackendError


def flaky() -> Candidate:
    """Return an operation that fails every other time."""
    failed = False

    async def call() -> None:
        nonlocal failed
        failed = not failed
        if failed:
            raise BackendError

    return call


def swallowing(call: Candidate) -> Candidate:
    """Catch any error of the call."""

    async def swallowed() -> None:
        try:  # noqa: SIM105 - contextlib.suppress would be measured too
            await call()
        except Exception:  # noqa: BLE001, S110 - the cost is measured, not the error
            pass

    return swallowed


async def opened(make: Callable[[float], Callable[[Candidate], Candidate]]) -> Candidate:
    """Return a call that an open breaker rejects."""
    failing_now = True

    async def call() -> None:
        if failing_now:
            raise BackendError

    guarded = make(600.0)(call)
    for _ in range(10):
        await swallowing(guarded)()
    failing_now = False
    return swallowing(guarded)


def happy() -> dict[str, dict[str, Candidate]]:
    """Return the candidates for a successful call."""
    retrier, breaker = retry(), CircuitBreaker()

    async def guarded() -> None:
        with breaker.guard():
            await noop()

    async def loop() -> None:
        async for attempt in retrier:
            with attempt:
                await noop()

    retries = {f"{name}": make(1.0, None)(noop) for name, make in RETRIES.items()}
    retries["viralfx, execute"] = lambda: retrier.execute(noop)
    retries["viralfx, async for"] = loop
    breakers = {f"{name}": make(60.0)(noop) for name, make in BREAKERS.items()}
    breakers["viralfx, execute"] = lambda: breaker.execute(noop)
    breakers["viralfx, with guard()"] = guarded
    slow = RollingWindow(slow_after=1.0)
    breakers["viralfx, window with slow calls"] = CircuitBreaker(window=slow)(noop)
    both = {
        "viralfx": retry()(CircuitBreaker()(noop)),
        "nopanic": RETRIES["nopanic"](1.0, None)(BREAKERS["nopanic"](60.0)(noop)),
        "tenacity + aiobreaker": RETRIES["tenacity"](1.0, None)(BREAKERS["aiobreaker"](60.0)(noop)),
        "stamina + circuitbreaker": RETRIES["stamina"](1.0, None)(
            BREAKERS["circuitbreaker"](60.0)(noop)
        ),
    }
    return {"retry, success": retries, "breaker, CLOSED": breakers, "retry + breaker": both}


async def unhappy() -> dict[str, dict[str, Candidate]]:
    """Return the candidates for a failing call."""
    makers = {**BREAKERS, "viralfx": ours, "viralfx, window": ours_window}
    rejections = {name: await opened(make) for name, make in makers.items()}
    rejections["bare raise and catch"] = swallowing(failing)
    once = {name: make(0.0, None)(flaky()) for name, make in RETRIES.items()}
    return {"breaker, OPEN": rejections, "one failure, then success": once}


async def measure(candidates: dict[str, Candidate], rounds: int, calls: int) -> dict[str, float]:
    """Return the minimum of each, in nanoseconds per call."""
    best = dict.fromkeys(candidates, float("inf"))
    names = list(candidates)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            call = candidates[name]
            started = time.perf_counter_ns()
            for _ in range(calls):
                await call()
            best[name] = min(best[name], (time.perf_counter_ns() - started) / calls)
    return best


async def main(rounds: int, calls: int) -> None:
    """Measure and print each group."""
    logging.disable(logging.CRITICAL)
    for group, candidates in {**happy(), **await unhappy()}.items():
        fewer = calls if group in ("breaker, CLOSED", "breaker, OPEN") else calls // 2
        best = await measure({"bare await": noop, **candidates}, rounds, fewer)
        bare = best["bare await"]
        print(f"| {group} | ns | x bare |\n|---|---:|---:|")
        for name, nanoseconds in sorted(best.items(), key=lambda item: item[1]):
            print(f"| {name} | {nanoseconds:.0f} | {nanoseconds / bare:.1f} |")
        print()


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    asyncio.run(main(*arguments, *(7, 20_000)[len(arguments) :]))
