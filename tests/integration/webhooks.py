"""Helpers for tests of webhooks: scripted name resolution, and the wiring."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence

from tests.servers.certificates import Certificates

from viralfx.adapters.http import HttpWebhookSender, client_context
from viralfx.core.clock import SystemClock
from viralfx.domain.webhooks.delivery import HostCircuits, WebhookDelivery
from viralfx.domain.webhooks.signature import WebhookKeys
from viralfx.domain.webhooks.url import AllowList

KEYS = [b"n" * 32, b"o" * 24]
BODY = b'{"type":"order.shipped","data":{"id":7}}'
LOOPBACK = "127.0.0.0/8"


def receiver_key(secret: bytes, origin: str, *, purpose: str = "webhook") -> bytes:
    """Derive the key of a receiver as docs/webhooks.md describes it, without the project's code."""
    return hmac.new(secret, f"viralfx {purpose} key 1\n{origin}".encode(), "sha256").digest()


class Names:
    """A resolver with scripted answers; the last one repeats."""

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
    keys: WebhookKeys | None = None,
) -> WebhookDelivery:
    """Wire a delivery as a worker does, to the hosts of a test."""
    hosts = AllowList(allowed)
    return WebhookDelivery(
        allowed=hosts,
        keys=keys or WebhookKeys(KEYS),
        sender=HttpWebhookSender(
            hosts.check_addresses,
            timeout=timeout,
            tls=client_context(str(trust.ca) if trust else None),
            resolve=names,
        ),
        circuits=HostCircuits() if circuits is None else circuits,
        clock=SystemClock(),
    )


async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Read without responding until the client disconnects."""
    while await reader.read(65536):
        pass
    raise EOFError
