"""Faults of the fleet and its servers, at random times from a seed."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.chaos.cluster import Cluster
from tests.chaos.fleet import Fleet
from tests.servers.redis import RedisServer

_FROZEN = 1.5
_DOWN = 1.0
"""Seconds that a server stays away."""


class Faults:
    """Injects one fault after the other."""

    def __init__(
        self,
        fleet: Fleet,
        cluster: Cluster,
        redis: RedisServer | None,
        rng: random.Random,
        *,
        lease: float,
    ) -> None:
        """``lease`` is in seconds: a frozen worker loses it. Without Redis, NOTIFY is used."""
        self.happened: Counter[str] = Counter()
        self._rng = rng

        def database(fault: Callable[[], None]) -> Callable[[], Awaitable[None]]:
            return lambda: asyncio.to_thread(fault)

        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "worker killed": (6, lambda: fleet.kill_worker(rng)),
            "worker stopped": (4, lambda: fleet.stop_worker(rng)),
            "worker frozen": (2, lambda: fleet.freeze_worker(rng, 1.5 * lease)),
            "postgres restarted": (2, database(cluster.restart)),
            "postgres killed": (1, database(cluster.kill)),
            "api redeployed": (2, fleet.redeploy),
        }
        if redis is None:
            self._kinds["listeners cut"] = (4, database(cluster.cut_listeners))
        else:
            self._kinds |= {
                "redis emptied": (3, lambda: asyncio.to_thread(redis.flush)),
                "redis restarted": (2, lambda: _restart(redis)),
                "redis frozen": (2, lambda: _freeze(redis)),
            }
        if cluster.has_standby:
            self._kinds |= {
                "failover": (1, database(cluster.fail_over)),
                "failover from silence": (1, database(cluster.fail_over_from_silence)),
            }
        if cluster.pooler is not None:
            self._kinds["pooler restarted"] = (2, database(cluster.restart_pooler))
            self._kinds["pooler paused"] = (2, database(cluster.pause_pooler))
        if cluster.has_disk:
            self._kinds["disk full"] = (1, database(cluster.fill_disk))

    def spared(self) -> list[str]:
        """Return the faults that are possible here and have not happened."""
        return [kind for kind in self._kinds if not self.happened[kind]]

    async def run(self, pause: float) -> None:
        """Run until cancelled, with about ``pause`` seconds between two faults.

        Each kind of fault happens once before one of them repeats.
        """
        first = list(self._kinds)
        self._rng.shuffle(first)
        while True:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * pause)
            kind = first.pop() if first else self._draw()
            began = time.monotonic()
            # Always completed: a frozen server must continue.
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


async def _restart(redis: RedisServer) -> None:
    await asyncio.to_thread(redis.kill)
    await asyncio.sleep(_DOWN)
    await asyncio.to_thread(redis.start)


async def _freeze(redis: RedisServer) -> None:
    await asyncio.to_thread(redis.freeze)
    try:
        await asyncio.sleep(_FROZEN)
    finally:
        await asyncio.to_thread(redis.thaw)
