"""Webhooks: what is sent is a span, and tells its receiver of the trace."""

from collections.abc import Mapping

from opentelemetry.trace import SpanKind, StatusCode, Tracer

from viralfx.domain.webhooks.delivery import Answer, WebhookSender
from viralfx.domain.webhooks.destinations import Destination
from viralfx.telemetry.tracing.context import headers_of

_FIRST_ERROR = 400


class TracedSender:
    """A :class:`WebhookSender` around another.

    The span names the host only: what a webhook's path holds is often a secret.
    """

    def __init__(self, inner: WebhookSender, tracer: Tracer) -> None:
        self._inner = inner
        self._tracer = tracer

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """See the port."""
        attributes: dict[str, str | int] = {
            "http.request.method": "POST",
            "url.scheme": destination.scheme,
            "url.full": f"{destination.scheme}://{destination.authority}/",
            "server.address": destination.host,
            "server.port": destination.port,
            "http.request.body.size": len(body),
        }
        with self._tracer.start_as_current_span(
            "POST", kind=SpanKind.CLIENT, attributes=attributes
        ) as span:
            told = {**headers, **headers_of(span.get_span_context())}
            try:
                answer = await self._inner.post(destination, told, body)
            except Exception as error:
                span.set_attribute("error.type", type(error).__qualname__)
                raise
            span.set_attribute("http.response.status_code", answer.status)
            if answer.status >= _FIRST_ERROR:
                span.set_attribute("error.type", str(answer.status))
                span.set_status(StatusCode.ERROR)
            return answer
