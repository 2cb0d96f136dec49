"""Sending one webhook: allowed, signed, guarded by the host's breaker, and judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from viralfx.domain.clock import Clock
from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.webhooks.allowed import AllowList
from viralfx.domain.webhooks.destinations import Destination
from viralfx.domain.webhooks.errors import WebhookRefusedError
from viralfx.domain.webhooks.hosts import HostCircuits
from viralfx.domain.webhooks.responses import failure_of, is_host_failing
from viralfx.domain.webhooks.signature import Signer, webhook_headers

CORRELATION = "X-Correlation-ID"
"""The header that tells a receiver which conversation a webhook belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a receiver answered."""

    status: int
    retry_after: str | None = None
    """The header of that name, as it came."""


class WebhookSender(Protocol):
    """Port: posts to a destination, and connects to no address that is not allowed."""

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """Post JSON and return the answer, a redirect as it is.

        Every address that the host has is put to :meth:`AllowList.check_addresses` before one of
        just these is connected to. Raises :class:`WebhookRefusedError` and, when there was no
        answer in time, :class:`WebhookUnavailableError`.
        """
        ...


class WebhookDelivery:
    """Sends webhooks. Several may be under way."""

    def __init__(
        self,
        *,
        allowed: AllowList,
        signer: Signer | None,
        sender: WebhookSender,
        circuits: HostCircuits,
        clock: Clock,
    ) -> None:
        self._allowed = allowed
        self._signer = signer
        self._sender = sender
        self._circuits = circuits
        self._clock = clock

    async def deliver(
        self, url: str, *, message_id: str, body: bytes, unsigned: bool = False
    ) -> int:
        """Deliver ``body`` and return the status of the answer, some 2xx.

        ``message_id`` tells the receiver that it has had this one already. With ``unsigned`` a
        missing secret is no obstacle. Raises a :class:`WebhookError`, or ``CircuitOpenError``
        while the host is given a rest.
        """
        destination = self._allowed.admit(url)
        if self._signer is None and not unsigned:
            raise WebhookRefusedError("WEBHOOK_SECRET is not set: the webhook cannot be signed")
        seconds = int(self._clock.now().timestamp())
        headers = dict(webhook_headers(self._signer, message_id, seconds, body))
        if (correlation_id := current_correlation_id()) is not None:
            headers[CORRELATION] = correlation_id
        answer = await self._exchange(destination, headers, body)
        if HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
            return answer.status
        raise failure_of(destination.host, answer.status, answer.retry_after, self._clock.now())

    async def _exchange(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        breaker = self._circuits[destination.authority]
        with breaker.guard("webhook"):
            answer = await self._sender.post(destination, headers, body)
            if is_host_failing(answer.status):
                # Any other answer, a refusal included, says that the host is there.
                raise failure_of(
                    destination.host, answer.status, answer.retry_after, self._clock.now()
                )
        return answer
