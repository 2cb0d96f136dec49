"""A process that listens with two slots, prints the ids, and never finishes a notification.

``python -m tests.integration.listener HOST PORT``
"""

import asyncio
import sys

from tests.integration.notifications import QUEUE

from viralfx.adapters.redis import RedisClient
from viralfx.adapters.taskiq import StreamNotifier
from viralfx.jobs.notifier import JobNotification
from viralfx.settings import RedisSettings


async def on_notification(notification: JobNotification) -> None:
    """Print the ids, and never return."""
    sys.stdout.write("".join(f"{job}\n" for job in notification.ids))
    sys.stdout.flush()
    await asyncio.Event().wait()


async def main(host: str, port: int) -> None:
    """Listen with two slots."""
    await StreamNotifier(RedisClient(RedisSettings(host=host, port=port))).listen(
        QUEUE, on_notification, 2
    )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
