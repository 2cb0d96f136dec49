"""The processes of the chaos run: one API at a time and several workers, replaced when they end."""

import asyncio
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.chaos.skewed import SKEW, SkewedProcess
from tests.servers.ports import free_port
from tests.system.service import ROOT, clean_environment

EXIT_OK = 0
_SKEWS = (7200, 0, -7200)
"""Seconds by which the clocks of consecutive processes of a kind are wrong."""
_READY_WITHIN = 60.0
_LEFT_WITHIN = 45.0


@dataclass
class Member:
    """One process."""

    name: str
    process: SkewedProcess
    port: int
    log: Path

    @property
    def running(self) -> bool:
        """True until the process has ended."""
        return self.process.returncode is None


class Fleet:
    """Starts, kills, stops and replaces the API and workers; records their problems."""

    def __init__(self, environment: Mapping[str, str], folder: Path, workers: int) -> None:
        self.problems: list[str] = []
        self.ended: Counter[str] = Counter()
        self._environment = {**clean_environment(), **environment}
        self._folder = folder
        self._count = workers
        self._started: Counter[str] = Counter()
        self._workers: list[Member] = []
        self._api: Member | None = None

    @property
    def api(self) -> str:
        """The port of the current API."""
        assert self._api is not None
        return f"http://127.0.0.1:{self._api.port}"

    async def open(self) -> None:
        """Start everything; return once the API is ready."""
        self._api = self._start("serve", "--no-worker")
        self._workers = [self._start("worker") for _ in range(self._count)]
        await self._ready(self._api)

    async def close(self) -> None:
        """Stop everything in order; record processes that do not stop."""
        members = [*self._workers, *([self._api] if self._api else [])]
        await asyncio.gather(*(self._stop(member) for member in members))

    def kill(self) -> None:
        """End all processes at once."""
        for member in (*self._workers, *([self._api] if self._api else [])):
            if member.running:
                member.process.kill()

    async def kill_worker(self, rng: random.Random) -> None:
        """Kill a worker, and start another in its place."""
        victim = rng.choice(self._workers)
        self._workers.remove(victim)
        victim.process.kill()
        code = await victim.process.wait()
        if code != -signal.SIGKILL:
            self.problems.append(f"{victim.name} had ended before it was killed, with {code}")
        self.ended["killed"] += 1
        self._workers.append(self._start("worker"))

    async def freeze_worker(self, rng: random.Random, seconds: float) -> None:
        """Stop a worker's execution for a time, in which others may take its jobs."""
        frozen = rng.choice(self._workers)
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            frozen.process.send_signal(signal.SIGCONT)
        self.ended["frozen"] += 1

    async def stop_worker(self, rng: random.Random) -> None:
        """Stop a worker in order, while another one takes its place."""
        stopping = rng.choice(self._workers)
        self._workers.remove(stopping)
        self._workers.append(self._start("worker"))
        await self._stop(stopping)
        self.ended["terminated"] += 1

    async def redeploy(self) -> None:
        """Start a new API, direct clients to it once it is ready, and stop the old one."""
        old, new = self._api, self._start("serve", "--no-worker")
        assert old is not None
        try:
            await self._ready(new)
        except BaseException:
            new.process.kill()
            raise
        self._api = new
        await self._stop(old)
        self.ended["redeployed"] += 1

    def _start(self, *arguments: str) -> Member:
        program = arguments[0]
        self._started[program] += 1
        name = f"{program}-{self._started[program]}"
        # The first API is right, so that there is no run without.
        skew = _SKEWS[self._started[program] % len(_SKEWS)]
        port, log = free_port(), self._folder / f"{name}.log"
        environ = {
            **self._environment,
            SKEW: str(skew),
            "MANAGEMENT_PORT" if program == "worker" else "PORT": str(port),
        }
        return Member(name, SkewedProcess(arguments, environ, log), port, log)

    async def _ready(self, member: Member) -> None:
        url = f"http://127.0.0.1:{member.port}/health/ready"
        async with asyncio.timeout(_READY_WITHIN), httpx.AsyncClient(timeout=2) as client:
            while member.running:
                try:
                    if (await client.get(url)).is_success:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(1 / 20)
        raise AssertionError(f"{member.name} ended at its start: {last_lines(member.log)}")

    async def _stop(self, member: Member) -> None:
        if member.running:
            member.process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.wait_for(member.process.wait(), _LEFT_WITHIN)
        except TimeoutError:
            member.process.kill()
            self.problems.append(f"{member.name} did not stop: {last_lines(member.log)}")
            return
        # 4: a stage overran because Postgres was restarting. No job may be lost by that, and the
        # verdict checks it.
        if code not in (EXIT_OK, 4):
            self.problems.append(f"{member.name} ended with {code}: {last_lines(member.log)}")


def last_lines(log: Path) -> str:
    """Return the last lines of a log, without the parts that differ between runs."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return re.sub(re.escape(os.fspath(ROOT)), ".", "\n".join(lines))
