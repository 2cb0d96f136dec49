"""A stream of jobs through one API and one worker, with samples of both."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import asyncpg
from benchmarks.jobs.empty_task import TASK
from benchmarks.jobs.testbed import CONCURRENCY
from benchmarks.servers import Server
from tests.servers.redis import RedisServer

CLIENTS = 16
MIB = 2**20
SAMPLE_SECONDS = 1.0
POLL_SECONDS = 0.02
STALLED_SECONDS = 60.0
BODY = json.dumps({"task": TASK, "payload": None}).encode()
REQUEST = (
    b"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
UNFINISHED = """
SELECT (SELECT count(*) FROM viralfx_ops.viralfx_jobs WHERE state = 'waiting')
    + (SELECT count(*) FROM viralfx_ops.viralfx_jobs WHERE state = 'active')
"""


class FlowError(Exception):
    """A job was not accepted, or none has finished for a long time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The state at one moment. Memory is in MiB."""

    seconds: float
    finished: int
    unfinished: int
    entries: int
    """In all streams."""
    excess: int
    """Stream entries beyond the number of unfinished jobs."""
    worker: float
    api: float
    redis: float


class Flow:
    """Posts jobs and takes samples; about ``most_waiting`` jobs at most are unfinished."""

    def __init__(
        self, api: Server, worker: Server, redis: RedisServer, *, jobs: int, most_waiting: int
    ) -> None:
        self.samples: list[Sample] = []
        self._api, self._worker, self._redis = api, worker, redis
        self._jobs, self._most_waiting = jobs, most_waiting
        self._accepted = 0
        self._unfinished = 0
        self._room = asyncio.Event()
        self._began = time.monotonic()

    async def run(self, database_url: str) -> None:
        """Return when every job is finished. Raises :class:`FlowError`."""
        numbers = iter(range(self._jobs))
        self._connection = await asyncpg.connect(database_url)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(self._post(numbers))
                await self._poll()
        finally:
            await self._connection.close()

    async def _post(self, numbers: Iterator[int]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._api.port)
        try:
            for _ in numbers:
                await self._room.wait()
                writer.write(REQUEST)
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                body = await reader.readexactly(int(length))
                if not head.startswith(b"HTTP/1.1 202"):
                    raise FlowError(f"{head.decode()}{body.decode()}")
                self._accepted += 1
        finally:
            writer.close()

    async def _poll(self) -> None:
        """Count unfinished jobs often, and take a sample at intervals."""
        finished, progress, sampled = -1, time.monotonic(), 0.0
        while finished < self._jobs:
            accepted = (
                self._accepted
            )  # before: a job that is accepted during the count may be in neither
            await self._count()
            now = time.monotonic()
            if accepted - self._unfinished > finished:
                finished, progress = accepted - self._unfinished, now
            if now > progress + STALLED_SECONDS:
                raise FlowError(f"stalled with {self._unfinished} jobs unfinished")
            if now > sampled + SAMPLE_SECONDS or finished == self._jobs:
                sampled = now
                await self._sample(finished)
            await asyncio.sleep(POLL_SECONDS)

    async def _count(self) -> None:
        self._unfinished = await self._connection.fetchval(UNFINISHED)
        if self._unfinished < self._most_waiting:
            self._room.set()
        else:
            self._room.clear()

    async def _sample(self, finished: int) -> None:
        before, unfinished = self._accepted, self._unfinished
        entries = await asyncio.to_thread(self._entries)
        # All jobs that were unfinished at some time since: each may have had an entry.
        most = unfinished + self._accepted - before + CLIENTS + CONCURRENCY
        memory = await asyncio.to_thread(self._redis.command, "INFO", "memory")
        self.samples.append(
            Sample(
                seconds=time.monotonic() - self._began,
                finished=finished,
                unfinished=unfinished,
                entries=entries,
                excess=max(0, entries - most),
                worker=self._worker.rss() / MIB,
                api=self._api.rss() / MIB,
                redis=memory["used_memory"] / MIB,
            )
        )

    def _entries(self) -> int:
        _, keys = self._redis.command("SCAN", 0, "COUNT", 10_000, "TYPE", "stream")
        return sum(self._redis.command("XLEN", key) for key in keys)
