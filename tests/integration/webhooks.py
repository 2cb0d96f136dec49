"""What the tests of webhooks share: names that lead where a test says, and the wiring."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from tests.servers.certificates import Certificates

from viralfx.adapters.http import HttpWebhookSender, client_context
from viralfx.domain.clock import SystemClock
from viralfx.domain.webhooks.allowed import AllowList
from viralfx.domain.webhooks.delivery import WebhookDelivery
from viralfx.domain.webhooks.hosts import HostCircuits
from viralfx.domain.webhooks.signature import Signer

KEYS = [b"n" * 32, b"o" * 24]
BODY = b'{"type":"order.shipped","data":{"id":7}}'
LOOPBACK = "127.0.0.0/8"


class Names:
    """A resolver: each lookup gets the next answer, the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Answer from the script."""
        assert 0 < port < 65536
        self.asked.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def delivery(
    *allowed: str,
    trust: Certificates | None = None,
    names: Callable[[str, int], Awaitable[Sequence[str]]] | None = None,
    timeout: float = 5.0,
    circuits: HostCircuits | None = None,
) -> WebhookDelivery:
    """Wire a delivery as a worker does, to a test's own hosts."""
    hosts = AllowList(allowed)
    return WebhookDelivery(
        allowed=hosts,
        signer=Signer(KEYS),
        sender=HttpWebhookSender(
            hosts.check_addresses,
            timeout=timeout,
            tls=client_context(str(trust.ca) if trust else None),
            resolve=names,
        ),
        circuits=HostCircuits() if circuits is None else circuits,
        clock=SystemClock(),
    )


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the other end of a connection is to see."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a socket sets no event
            await asyncio.sleep(0.005)


async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Read whatever comes and say nothing, until the client leaves."""
    while await reader.read(65536):
        pass
    raise EOFError
