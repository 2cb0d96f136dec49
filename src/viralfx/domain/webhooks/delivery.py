"""Webhook delivery: message, circuit breaker for each host, retry policy."""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Protocol

from viralfx.core.clock import Clock, timestamp
from viralfx.core.correlation import current_correlation_id
from viralfx.core.errors import require_count
from viralfx.core.events import Listener
from viralfx.domain.webhooks.signature import Signer, WebhookKeys, webhook_headers
from viralfx.domain.webhooks.url import (
    AllowList,
    Destination,
    WebhookError,
    WebhookRefusedError,
    WebhookRejectedError,
    WebhookUnavailableError,
    parse_destination,
)
from viralfx.resilience._callables import CallRejectedError
from viralfx.resilience.breaker import CircuitBreaker, CircuitEvent
from viralfx.resilience.breaker_states import CircuitState
from viralfx.resilience.policy import Backoff, BackoffPolicy, Jitter


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookMessage:
    """The payload of the task ``notifications.webhook``.

    With ``alert`` the webhook goes to ``ALERT_WEBHOOK_URL`` of the worker. The job does not
    contain that URL, so readers of jobs cannot see it. ``proof`` is that of
    :meth:`WebhookKeys.prove`: without it an alert is not signed.
    """

    type: str
    """Type of the event, such as ``order.shipped``."""
    data: dict[str, Any]
    url: str | None = None
    alert: bool = False
    proof: str | None = None

    def __post_init__(self) -> None:
        """Reject a message that cannot be sent, before a job is accepted. Raises ``ValueError``."""
        if not self.type:
            raise ValueError("type must name the event, such as order.shipped")
        if (self.url is None) != self.alert:
            raise ValueError("the message must have either a url or alert: true")
        if self.url is not None:
            try:
                parse_destination(self.url)
            except WebhookRefusedError as error:
                raise ValueError(str(error)) from None

    def body(self, at: datetime) -> bytes:
        """Return the JSON body in ASCII; the same ``at`` gives the same bytes."""
        content = {"type": self.type, "timestamp": timestamp(at), "data": self.data}
        return json.dumps(content, separators=(",", ":")).encode()


class HostCircuits:
    """One circuit breaker for each host, created on first use, for at most ``max_hosts`` hosts.

    They are not in the breaker registry of the process: a receiver that is down does not degrade
    this service. Beyond ``max_hosts``, the least recently used breaker is removed. Closed breakers
    are removed first, because removing an open one would let calls through.
    """

    def __init__(
        self,
        *,
        failure_threshold: int = 5,
        open_for: float = 60.0,
        probe_lease: float = 60.0,
        max_hosts: int = 256,
        listeners: tuple[Listener[CircuitEvent], ...] = (),
        clock: Clock | None = None,
    ) -> None:
        """Create breakers with these arguments of :class:`CircuitBreaker`.

        Raises ``ValueError`` for an invalid argument.
        """
        require_count("max_hosts", max_hosts)
        self._max_hosts = max_hosts
        self._breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()
        self._make: Callable[[str], CircuitBreaker] = lambda host: CircuitBreaker(
            failure_threshold,
            open_for,
            name=host,
            probe_lease=probe_lease,
            failure_on=WebhookUnavailableError,
            listeners=listeners,
            clock=clock,
        )
        self._make("")  # validates the arguments now instead of at the first delivery

    def __getitem__(self, host: str) -> CircuitBreaker:
        """Return the breaker of a host; create it if there is none."""
        breaker = self._breakers.get(host)
        if breaker is None:
            if len(self._breakers) >= self._max_hosts:
                self._remove_one()
            breaker = self._breakers[host] = self._make(host)
        else:
            self._breakers.move_to_end(host)
        return breaker

    def __len__(self) -> int:
        """Return the number of hosts that have a breaker."""
        return len(self._breakers)

    def _remove_one(self) -> None:
        closed = (h for h, b in self._breakers.items() if b.state is CircuitState.CLOSED)
        del self._breakers[next(closed, next(iter(self._breakers)))]


MAX_RETRY_AFTER_SECONDS = 6 * 3600.0
"""A longer ``Retry-After`` counts as this one."""

_RETRYABLE_STATUSES = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)
_DIGITS = re.compile(r"[0-9]+").fullmatch


def is_host_failing(status: int) -> bool:
    """Return whether a status shows a failure of the host, not only of this request."""
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR


def failure_of(host: str, status: int, retry_after: str | None, now: datetime) -> WebhookError:
    """Return the error for a response that is not 2xx.

    408, 425, 429 and 5xx can be retried. A redirect is a rejection like 4xx: its target is not
    checked against the allow list.
    """
    if status in _RETRYABLE_STATUSES or is_host_failing(status):
        asked = None if retry_after is None else parse_retry_after(retry_after, now)
        return WebhookUnavailableError(f"{host} answered {status}", asked)
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        message = f"{host} answered {status}; redirects are not followed"
        return WebhookRejectedError(message, status)
    return WebhookRejectedError(f"{host} answered {status}", status)


def parse_retry_after(text: str, now: datetime) -> float | None:
    """Parse ``Retry-After``, a number of seconds or a date; None if it is neither.

    The result is in seconds, from 0 to :data:`MAX_RETRY_AFTER_SECONDS`.
    """
    text = text.strip()
    if _DIGITS(text):
        # float(), because int() raises for more than 4300 digits.
        seconds = float(text)
    else:
        try:
            date = parsedate_to_datetime(text)
            # A date without a zone, or with -0000, is UTC by RFC 9110.
            aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
            seconds = (aware - now).total_seconds()
        except (ValueError, OverflowError, IndexError):
            return None
    return max(0.0, min(seconds, MAX_RETRY_AFTER_SECONDS)) if not math.isnan(seconds) else None


class WebhookRetryPolicy:
    """Retry policy of webhooks: 10 attempts in 20 hours; ``Retry-After`` can prolong a wait.

    The waits are 5 s, 20 s, 80 s, 5 min, 21 min, 85 min and then 6 h. Jitter shortens each by up
    to a half, so that webhooks that failed together are not retried together.

    A rejection by the host's breaker says nothing about the webhook. So it is never the last
    attempt, unless there were twice as many attempts as allowed.
    """

    def __init__(self, attempts: int = 10) -> None:
        """Allow ``attempts`` attempts. Raises ``ValueError`` if there are fewer than two."""
        require_count("attempts - 1", attempts - 1)
        self._attempts = attempts
        self._policy = BackoffPolicy(
            attempts=attempts,
            backoff=Backoff(base=5.0, factor=4.0, cap=MAX_RETRY_AFTER_SECONDS, jitter=Jitter.EQUAL),
            retry_on=_is_retryable,
        )

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """See :meth:`viralfx.resilience.policy.RetryPolicy.next_delay`."""
        if isinstance(error, CallRejectedError) and attempt < 2 * self._attempts:
            attempt = min(attempt, self._attempts - 1)
        return self._policy.next_delay(attempt, error)


def _is_retryable(error: Exception) -> bool:
    # Unexpected errors are retried as well.
    return not isinstance(error, WebhookRefusedError | WebhookRejectedError)


CORRELATION_HEADER = "X-Correlation-ID"
"""Header with the correlation id of the request or job that caused the webhook."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookResponse:
    """The response of a receiver."""

    status: int
    retry_after: str | None = None
    """Value of the ``Retry-After`` header."""


class WebhookSender(Protocol):
    """Port: sends an HTTP POST to a destination, and connects to allowed addresses only."""

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> WebhookResponse:
        """Post JSON and return the response. Redirects are not followed.

        Resolves the host once, passes all its addresses to :meth:`AllowList.check_addresses`, and
        connects to one of them. Raises :class:`WebhookRefusedError` for an address that is not
        allowed, and :class:`WebhookUnavailableError` if there is no response in time.
        """
        ...


class WebhookDelivery:
    """Delivers webhooks. Concurrent deliveries are safe."""

    def __init__(
        self,
        *,
        allowed: AllowList,
        keys: WebhookKeys,
        sender: WebhookSender,
        circuits: HostCircuits,
        clock: Clock,
    ) -> None:
        self._allowed = allowed
        self._keys = keys
        self._sender = sender
        self._circuits = circuits
        self._clock = clock

    async def deliver(self, url: str, *, message_id: str, body: bytes) -> int:
        """Deliver ``body``, signed for its receiver, and return the 2xx status of the response.

        ``message_id`` lets the receiver recognize a repeated delivery. Raises a
        :class:`WebhookError`, or ``CircuitOpenError`` while the circuit of the host is open.
        """
        destination = self._allowed.admit(url)
        signer = self._keys.webhook_signer(destination)
        if signer is None:
            raise WebhookRefusedError("WEBHOOK_SECRET is not set: the webhook cannot be signed")
        return await self._deliver(destination, signer, message_id, body)

    async def deliver_alert(self, url: str, *, message_id: str, body: bytes, proven: bool) -> int:
        """Deliver an alert as :meth:`deliver` does; it is unsigned if there is no key for it.

        ``proven``: whether the alert has a valid proof.
        """
        destination = self._allowed.admit(url)
        signer = self._keys.alert_signer(destination, proven=proven)
        return await self._deliver(destination, signer, message_id, body)

    def is_proven(self, message: WebhookMessage, job_id: str) -> bool:
        """Return whether this service made an alert, in this job."""
        return self._keys.proves(message.proof, job_id, message.type, message.data)

    async def _deliver(
        self, destination: Destination, signer: Signer | None, message_id: str, body: bytes
    ) -> int:
        seconds = int(self._clock.now().timestamp())
        headers = dict(webhook_headers(signer, message_id, seconds, body))
        if (correlation_id := current_correlation_id()) is not None:
            headers[CORRELATION_HEADER] = correlation_id
        response = await self._post(destination, headers, body)
        if HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
            return response.status
        raise failure_of(destination.host, response.status, response.retry_after, self._clock.now())

    async def _post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> WebhookResponse:
        breaker = self._circuits[destination.authority]
        with breaker.guard("webhook"):
            response = await self._sender.post(destination, headers, body)
            if is_host_failing(response.status):
                # Any other response, even a rejection, shows that the host is available.
                raise failure_of(
                    destination.host, response.status, response.retry_after, self._clock.now()
                )
        return response
