"""Sending one webhook: allowed, signed, guarded by the host's breaker, and judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from viralfx.domain.clock import Clock
from viralfx.domain.resilience.backoff import Backoff, Jitter
from viralfx.domain.resilience.retry_policy import BackoffPolicy
from viralfx.domain.webhooks.allowed import AllowList
from viralfx.domain.webhooks.destinations import Destination
from viralfx.domain.webhooks.errors import WebhookRefusedError, WebhookRejectedError
from viralfx.domain.webhooks.hosts import HostCircuits
from viralfx.domain.webhooks.responses import LONGEST_RETRY_AFTER, failure_of, is_host_failing
from viralfx.domain.webhooks.signature import Signer


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


def webhook_retries(attempts: int = 10) -> BackoffPolicy:
    """Return the policy of webhooks: 10 attempts within 20 hours, or when the receiver asks.

    They are 5 s, 20 s, 80 s, 5 min, 21 min, 85 min and then 6 h apart, each shortened by up to a
    half, so that those who failed together do not return together.
    """
    return BackoffPolicy(
        attempts=attempts,
        backoff=Backoff(base=5.0, factor=4.0, cap=LONGEST_RETRY_AFTER, jitter=Jitter.EQUAL),
        retry_on=_may_pass,
    )


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, WebhookRefusedError | WebhookRejectedError)


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

    async def deliver(self, url: str, *, message_id: str, body: bytes) -> int:
        """Deliver ``body`` and return the status of the answer, some 2xx.

        ``message_id`` tells the receiver that it has had this one already. Raises a
        :class:`WebhookError`, or ``CircuitOpenError`` while the host is given a rest.
        """
        destination = self._allowed.admit(url)
        if self._signer is None:
            raise WebhookRefusedError("WEBHOOK_SECRET is not set: the webhook cannot be signed")
        seconds = int(self._clock.now().timestamp())
        signed = self._signer.headers(message_id, seconds, body)
        answer = await self._exchange(destination, signed, body)
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
