"""The processes of the ordeal: one API at a time, several workers, replaced when they end."""

import asyncio
import os
import random
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.servers.ports import free_port
from tests.system.service import ROOT, clean_environment

EXIT_OK = 0
_READY_WITHIN = 60.0
_LEFT_WITHIN = 45.0


@dataclass
class Member:
    """One process."""

    name: str
    process: asyncio.subprocess.Process
    port: int
    log: Path

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.returncode is None


class Fleet:
    """Starts, kills, stops and replaces API and workers; collects what went wrong with them."""

    def __init__(self, environment: Mapping[str, str], folder: Path, workers: int) -> None:
        self.problems: list[str] = []
        self.ended: dict[str, int] = {"killed": 0, "terminated": 0, "redeployed": 0}
        self._environment = {**clean_environment(), **environment}
        self._folder = folder
        self._count = workers
        self._started = 0
        self._workers: list[Member] = []
        self._api: Member | None = None

    @property
    def api(self) -> str:
        """Where the API listens now."""
        assert self._api is not None
        return f"http://127.0.0.1:{self._api.port}"

    async def open(self) -> None:
        """Start everything; returns once the API is ready."""
        self._api = await self._start("serve", "--no-worker")
        self._workers = [await self._start("worker") for _ in range(self._count)]
        await self._ready(self._api)

    async def close(self) -> None:
        """Stop everything in order; what does not is a problem."""
        members = [*self._workers, *([self._api] if self._api else [])]
        await asyncio.gather(*(self._leave(member) for member in members))

    def kill(self) -> None:
        """End everything at once, whatever happened before."""
        for member in (*self._workers, *([self._api] if self._api else [])):
            if member.running:
                member.process.kill()

    async def kill_worker(self, rng: random.Random) -> None:
        """Have a worker die without a word, and put another one in its place."""
        victim = rng.choice(self._workers)
        self._workers.remove(victim)
        victim.process.kill()
        code = await victim.process.wait()
        if code != -signal.SIGKILL:
            self.problems.append(f"{victim.name} had ended before it was killed, with {code}")
        self.ended["killed"] += 1
        self._workers.append(await self._start("worker"))

    async def stop_worker(self, rng: random.Random) -> None:
        """Have a worker leave in order, while another one takes its place."""
        leaving = rng.choice(self._workers)
        self._workers.remove(leaving)
        self._workers.append(await self._start("worker"))
        await self._leave(leaving)
        self.ended["terminated"] += 1

    async def redeploy(self) -> None:
        """Start a new API, send clients there once it is ready, and have the old one leave."""
        old, new = self._api, await self._start("serve", "--no-worker")
        assert old is not None
        try:
            await self._ready(new)
        except BaseException:
            new.process.kill()
            raise
        self._api = new
        await self._leave(old)
        self.ended["redeployed"] += 1

    async def _start(self, *arguments: str) -> Member:
        self._started += 1
        name = f"{arguments[0]}-{self._started}"
        port, log = free_port(), self._folder / f"{name}.log"
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "viralfx",
                *arguments,
                cwd=ROOT,
                env={
                    **self._environment,
                    "MANAGEMENT_PORT" if arguments[0] == "worker" else "PORT": str(port),
                },
                stdout=file,
                stderr=file,
            )
        return Member(name, process, port, log)

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
        raise AssertionError(f"{member.name} ended at its start: {said(member.log)}")

    async def _leave(self, member: Member) -> None:
        if member.running:
            member.process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.wait_for(member.process.wait(), _LEFT_WITHIN)
        except TimeoutError:
            member.process.kill()
            self.problems.append(f"{member.name} did not leave: {said(member.log)}")
            return
        # 4: a stage overran because Postgres was just then restarted; nothing may be lost by it,
        # and the verdict looks at just that.
        if code not in (EXIT_OK, 4):
            self.problems.append(f"{member.name} ended with {code}: {said(member.log)}")


def said(log: Path) -> str:
    """Return the last lines of a log, without what changes from run to run."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return re.sub(re.escape(os.fspath(ROOT)), ".", "\n".join(lines))
