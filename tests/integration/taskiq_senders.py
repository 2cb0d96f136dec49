"""Sends messages of a broker from threads at once, each on an event loop that ends afterwards.

Run it as a program: it prints the task ids as JSON. The connections of the loops are left open, so
it is a process of its own.
"""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from viralfx.taskiq import LedgerBroker

SENDERS = 8

broker = LedgerBroker()


@broker.task
async def double(value: int) -> int:
    """Return twice the value."""
    return value * 2


def send(value: int) -> str:
    """Send a message, on an event loop of this thread."""
    return asyncio.run(double.kiq(value)).task_id


def send_from_threads() -> list[str]:
    """Send a message from each of several threads; return their task ids."""
    with ThreadPoolExecutor(SENDERS) as threads:
        return list(threads.map(send, range(SENDERS)))


if __name__ == "__main__":
    json.dump(send_from_threads(), sys.stdout)
