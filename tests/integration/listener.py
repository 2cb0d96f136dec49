"""A process that hears bells with two slots, says so, and never has done with one.

``python -m tests.integration.listener HOST PORT``
"""

import asyncio
import sys

from tests.integration.bells import QUEUE

from viralfx.adapters.redis import RedisClient, RedisConfig
from viralfx.adapters.taskiq import StreamTransport
from viralfx.domain.jobs.transport import Bell


async def hear(bell: Bell) -> None:
    """Hear one for ever."""
    sys.stdout.write("".join(f"{job}\n" for job in bell.ids))
    sys.stdout.flush()
    await asyncio.Event().wait()


async def main(host: str, port: int) -> None:
    """Listen."""
    await StreamTransport(RedisClient(RedisConfig(host=host, port=port))).listen(QUEUE, hear, 2)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
