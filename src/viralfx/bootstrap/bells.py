"""Wires the bells over Redis streams; imported only where jobs are in Postgres and Redis is set."""

from viralfx.adapters.redis import RedisClient
from viralfx.adapters.taskiq import StreamTransport
from viralfx.domain.clock import Clock
from viralfx.domain.jobs.transport import JobTransport


def stream_transport(client: RedisClient, clock: Clock) -> JobTransport:
    """Ring over Redis streams; nothing is connected yet."""
    return StreamTransport(client, clock=clock)
