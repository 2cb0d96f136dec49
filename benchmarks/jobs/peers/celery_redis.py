"""Celery over Redis, without a result backend, as a pool of threads: one process."""

from benchmarks.jobs.counter import ran
from benchmarks.jobs.peer import redis_url
from celery import Celery

DISTRIBUTIONS = ("celery", "kombu", "redis")
THREADS = 10
"""More threads are slower: they share one interpreter."""
_OPTIONS = f"-P threads -c {THREADS} --loglevel WARNING --without-mingle --without-gossip"
WORKER = (
    *("-m", "celery", "-A", "benchmarks.jobs.peers.celery_redis"),
    *("worker", *_OPTIONS.split()),
)
QUEUE, UNACKED = "celery", "unacked"
"""Keys of Redis."""

app = Celery(broker=redis_url(), task_ignore_result=True, broker_connection_retry_on_startup=True)


@app.task
def do_nothing() -> None:
    """Do nothing."""
    ran()


class Producer:
    """Enqueues by Celery's blocking client."""

    gathers = False

    async def prepare(self) -> None:
        """Connect."""
        self._connection = app.connection_for_write()
        self._redis = self._connection.default_channel.client

    async def enqueue(self) -> None:
        """Publish one message."""
        do_nothing.delay()

    async def unfinished(self) -> int:
        """Count waiting and unacknowledged jobs."""
        return int(self._redis.llen(QUEUE)) + int(self._redis.hlen(UNACKED))

    async def close(self) -> None:
        """Disconnect."""
        self._connection.close()
        app.close()
