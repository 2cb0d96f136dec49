"""The clients of the chaos run: each repeats a job until it is acknowledged."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httpx
from tests.chaos.fleet import Fleet
from tests.chaos.verdict import KEY

_ANSWERED = (HTTPStatus.OK, HTTPStatus.ACCEPTED)
_MAY_COME_AGAIN = frozenset({500, 502, 503, 504, 429})
_TIMEOUT = 15.0


class Clients:
    """Submit jobs over HTTP, each with its own idempotency key."""

    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self.acknowledged: dict[int, set[str]] = {}
        """The ids that were answered for each job's number: one each, if all is well."""
        self.refused: Counter[str] = Counter()
        """Answers and failures after which the client asked again."""
        self.problems: list[str] = []
        self._fleet, self._rng = fleet, rng

    async def run(
        self, jobs: int, rate: float, enough: Callable[[], bool], together: int = 16
    ) -> None:
        """Submit ``jobs`` jobs, and more until ``enough``, about ``rate`` a second.

        Return when all are acknowledged.
        """
        numbers = itertools.takewhile(
            lambda number: number < jobs or not enough(), itertools.count()
        )
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def user() -> None:
            async with httpx.AsyncClient(timeout=_TIMEOUT) as client:
                for number in numbers:
                    await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
                    await self._ask(client, number)

        await asyncio.gather(*(user() for _ in range(together)))

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        job, key = self._job(number), {"Idempotency-Key": f"{KEY}{number}"}
        self.acknowledged[number] = set()
        repeat = self._rng.random() < 0.02
        while True:
            try:
                url = f"{self._fleet.api}/api/v1/jobs"
                answer = await client.post(url, json=job, headers=key)
            except httpx.TransportError as error:
                self.refused[type(error).__name__] += 1
                await asyncio.sleep(self._rng.uniform(0.05, 0.3))
                continue
            if answer.status_code in _ANSWERED:
                self.acknowledged[number].add(answer.json()["id"])
                if not repeat:
                    return
                repeat = False
            elif answer.status_code in _MAY_COME_AGAIN:
                self.refused[str(answer.status_code)] += 1
                await asyncio.sleep(self._rng.uniform(0.05, 0.3))
            else:
                self.problems.append(f"job {number}: {answer.status_code} {answer.text}")
                return

    def _job(self, number: int) -> dict[str, Any]:
        rng = random.Random(number)  # noqa: S311 - the same job, asked for again
        task = rng.choice(["chaos.transactional", "chaos.external"])
        # Most are short; some are long enough to be running when their worker dies.
        pause = rng.choice([0.0] * 8 + [0.2, 1.5])
        failures = rng.choice([0] * 19 + [1])
        return {"task": task, "payload": {"number": number, "pause": pause, "failures": failures}}
