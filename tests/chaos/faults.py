"""What befalls the fleet and its servers, at random times from a seed."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.chaos.fleet import Fleet
from tests.servers.postgres import PostgresServer
from tests.servers.redis import RedisServer

_FROZEN = 1.5
_DOWN = 1.0
"""Seconds that a server stays away."""


class Faults:
    """Lets one thing after another happen."""

    def __init__(
        self, fleet: Fleet, postgres: PostgresServer, redis: RedisServer, rng: random.Random
    ) -> None:
        self.happened: Counter[str] = Counter()
        self._fleet, self._postgres, self._redis, self._rng = fleet, postgres, redis, rng
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "worker killed": (6, lambda: fleet.kill_worker(rng)),
            "worker stopped": (4, lambda: fleet.stop_worker(rng)),
            "redis emptied": (3, lambda: asyncio.to_thread(redis.flush)),
            "redis restarted": (2, self._restart_redis),
            "redis frozen": (2, self._freeze_redis),
            "postgres restarted": (2, self._restart_postgres),
            "postgres killed": (1, self._kill_postgres),
            "api redeployed": (2, fleet.redeploy),
        }

    async def run(self, pause: float) -> None:
        """Go on until cancelled, with about ``pause`` seconds between two faults.

        Each kind happens once before any happens again by chance.
        """
        first = list(self._kinds)
        self._rng.shuffle(first)
        while True:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * pause)
            kind = first.pop() if first else self._draw()
            began = time.monotonic()
            # Never left half done: what is frozen has to thaw.
            step = asyncio.ensure_future(self._kinds[kind][1]())
            try:
                await asyncio.shield(step)
            except asyncio.CancelledError:
                await step
                raise
            self.happened[kind] += 1
            print(f"  {kind} ({time.monotonic() - began:.1f} s)", flush=True)

    def _draw(self) -> str:
        weights = [weight for weight, _ in self._kinds.values()]
        return self._rng.choices(list(self._kinds), weights)[0]

    async def _restart_redis(self) -> None:
        await asyncio.to_thread(self._redis.kill)
        await asyncio.sleep(_DOWN)
        await asyncio.to_thread(self._redis.start)

    async def _freeze_redis(self) -> None:
        await asyncio.to_thread(self._redis.freeze)
        try:
            await asyncio.sleep(_FROZEN)
        finally:
            await asyncio.to_thread(self._redis.thaw)

    async def _restart_postgres(self) -> None:
        await asyncio.to_thread(self._postgres.stop)
        await asyncio.sleep(_DOWN)
        await asyncio.to_thread(self._postgres.start)

    async def _kill_postgres(self) -> None:
        await asyncio.to_thread(self._postgres.kill)
        await asyncio.to_thread(self._postgres.start)
