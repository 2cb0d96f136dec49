"""Puts each library into the situations of docs/resilience-rules.md.

Everything is judged from outside, by the calls that arrive at the backend. Prints two Markdown
tables.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from benchmarks.resilience.subjects import (
    BREAKERS,
    RETRIES,
    UNLIMITED,
    BackendError,
    Guard,
    UnlistedError,
)

OPEN_FOR = 0.05


class Backend:
    """Behaves as the probe sets it, and counts its calls."""

    def __init__(self, guard: Guard) -> None:
        self.reached = 0
        self.outcome: object = "ok"

        async def call() -> object:
            # Not the bound method: some libraries decorate functions only.
            return await self._answer()

        self.call = guard(call)

    async def _answer(self) -> object:
        self.reached += 1
        outcome = self.outcome
        if isinstance(outcome, asyncio.Future):
            return await asyncio.shield(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def ends(self, outcome: object) -> BaseException | None:
        """Make one call with this outcome; return the caller's result."""
        self.outcome = outcome
        try:
            await self.call()
        except Exception as error:  # noqa: BLE001 - any error is the result
            return error
        return None

    async def reaches(self, outcome: object) -> bool:
        """Make one call; return whether it arrived at the backend."""
        before = self.reached
        await self.ends(outcome)
        return self.reached > before

    async def trip(self) -> BaseException | None:
        """Make five failing calls; return the error of the fifth caller."""
        return [await self.ends(BackendError()) for _ in range(5)][-1]

    async def hang(
        self, calls: int = 1
    ) -> tuple[asyncio.Future[object], list[asyncio.Task[object]]]:
        """Start calls that hang until the future is done."""
        self.outcome = ended = asyncio.get_running_loop().create_future()

        async def call() -> object:
            return await self.call()

        tasks = [asyncio.create_task(call()) for _ in range(calls)]
        await asyncio.sleep(0.005)
        return ended, tasks


async def finish(ended: asyncio.Future[object], tasks: list[asyncio.Task[object]]) -> None:
    """Let the calls return."""
    if not ended.done():
        ended.set_result("ok")
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


async def failures_until_rejected(backend: Backend) -> int:
    """Count the failing calls that still arrive at the backend, ten at most."""
    for failures in range(10):
        if not await backend.reaches(BackendError()):
            return failures
    return 10


async def b1(backend: Backend) -> str:
    """Three failures and a cancelled call."""
    for _ in range(3):
        await backend.ends(BackendError())
    ended, tasks = await backend.hang()
    tasks[0].cancel()
    await finish(ended, tasks)
    more = await failures_until_rejected(backend)
    return {2: "ok", 1: "counts as failure"}.get(more, "counts as success")


async def b2(backend: Backend) -> str:
    """Probe: a cancelled probe."""
    await backend.trip()
    await asyncio.sleep(OPEN_FOR * 1.2)
    ended, tasks = await backend.hang()
    tasks[0].cancel()
    await finish(ended, tasks)
    if await backend.reaches(BackendError()):
        return "closed by cancel" if await backend.reaches("ok") else "ok"
    await asyncio.sleep(OPEN_FOR * 1.2)
    return "re-opened" if await backend.reaches("ok") else "stuck"


async def b3(backend: Backend) -> str:
    """Fifty concurrent calls after the open period."""
    await backend.trip()
    await asyncio.sleep(OPEN_FOR * 1.2)
    before = backend.reached
    ended, tasks = await backend.hang(50)
    reached = backend.reached - before
    await finish(ended, tasks)
    return str(reached)


async def b4(backend: Backend) -> str:
    """Probe: the error of the caller that opens the circuit."""
    error = await backend.trip()
    return "original" if isinstance(error, BackendError) else type(error).__name__


async def b5(backend: Backend) -> str:
    """Probe: a success that began before the trip."""
    ended, tasks = await backend.hang()
    await backend.trip()
    await finish(ended, tasks)
    return "re-closes" if await backend.reaches("ok") else "ok"


async def b6(backend: Backend) -> str:
    """Probe: an unlisted error between failures."""
    for _ in range(4):
        await backend.ends(BackendError())
    await backend.ends(UnlistedError())
    more = await failures_until_rejected(backend)
    return {1: "neutral", 0: "failure"}.get(more, "success")


async def b7(backend: Backend) -> str:
    """Ten late failures."""
    ended, tasks = await backend.hang(10)
    await backend.trip()
    await asyncio.sleep(OPEN_FOR * 0.8)
    ended.set_exception(BackendError())
    await finish(ended, tasks)
    await asyncio.sleep(OPEN_FOR * 0.4)
    return "ok" if await backend.reaches("ok") else "extends"


async def b8(backend: Backend) -> str:
    """Probe: a hung probe, four open periods later."""
    await backend.trip()
    await asyncio.sleep(OPEN_FOR * 1.2)
    before = backend.reached
    ended, tasks = await backend.hang(2)
    gated = backend.reached - before == 1
    await asyncio.sleep(OPEN_FOR * 4)
    try:
        async with asyncio.timeout(1.0):
            reached = await backend.reaches("ok")
    except TimeoutError:
        return "waits for it"
    finally:
        await finish(ended, tasks)
    if not gated:
        return "no gate"
    return "probes again" if reached else "rejected"


async def r1(guard: Guard) -> str:
    """Probe: a cancellation during the attempt."""
    backend = Backend(guard)
    ended, tasks = await backend.hang()
    tasks[0].cancel()
    await asyncio.wait(tasks, timeout=1)
    ok = tasks[0].done() and tasks[0].cancelled() and backend.reached == 1
    await finish(ended, tasks)
    return "ok" if ok else "lost"


async def r2(guard: Guard) -> str:
    """Probe: a cancellation during the wait."""
    backend = Backend(guard)
    task = asyncio.create_task(backend.ends(BackendError()))
    await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait([task], timeout=1)
    return "ok" if task.cancelled() and backend.reached == 1 else "lost"


async def r3(guard: Guard) -> str:
    """Twenty concurrent calls of one decorated function."""
    backend = Backend(guard)
    backend.outcome = BackendError()
    await asyncio.wait([asyncio.create_task(backend.ends(BackendError())) for _ in range(20)])
    return "ok" if backend.reached == 60 else f"{backend.reached} of 60"


async def r4(guard: Guard) -> str:
    """Probe: the final error."""
    error = await Backend(guard).ends(BackendError())
    return "original" if isinstance(error, BackendError) else type(error).__name__


async def r6(guard: Guard) -> str:
    """Probe: a limit of 50 ms on an attempt that hangs for 500 ms."""

    async def hang() -> object:
        await asyncio.sleep(0.5)
        raise BackendError

    started = time.perf_counter()
    try:
        await guard(hang)()
    except Exception:  # noqa: BLE001 - only the time counts
        return f"{(time.perf_counter() - started) * 1000:.0f} ms"
    return "succeeded"


BREAKER_ROWS: list[Callable[[Backend], Awaitable[str]]] = [b1, b2, b3, b4, b5, b6, b7, b8]


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in [head, ["---"] * len(head), *rows]:
        print("|", " | ".join(row), "|")


async def main() -> None:
    """Run every probe on every library."""
    logging.disable(logging.CRITICAL)
    rows = []
    for name, make in BREAKERS.items():
        rows.append([name, *[await row(Backend(make(OPEN_FOR))) for row in BREAKER_ROWS]])
    table(["breaker", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8"], rows)
    print()
    rows = []
    for name, policy in RETRIES.items():
        short = [await row(policy(0.02, None)) for row in (r1, r2, r3, r4)]
        limited = "-" if name in UNLIMITED else await r6(policy(0.01, 0.05))
        rows.append([name, *short, limited])
    table(["retry", "R1", "R2", "R3", "R4", "R6"], rows)


if __name__ == "__main__":
    asyncio.run(main())
