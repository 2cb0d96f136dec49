"""Sends a webhook by httpcore: one connection, one request, one limit for all of it."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping

import httpcore

from viralfx.adapters.http.network import CheckedNetwork, Resolver, SystemResolver
from viralfx.domain.resilience.quantities import require_positive
from viralfx.domain.webhooks.delivery import Answer
from viralfx.domain.webhooks.destinations import Destination
from viralfx.domain.webhooks.errors import WebhookUnavailableError

AddressCheck = Callable[[Destination, Iterable[str]], None]

_MOST_READ = 16 * 1024
_COURTESY = 1.0
_CONNECTING = 0.5


def client_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Return TLS that verifies, by the system's trust or by the authorities in a PEM file.

    Raises ``OSError`` when the file cannot be read or holds none.
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


class HttpWebhookSender:
    """Implements :class:`viralfx.domain.webhooks.delivery.WebhookSender`.

    ``timeout`` seconds bound everything from the lookup of the name to the head of the answer. Of
    its body at most 16 KiB are read, for at most a second, and nothing is kept: it is read so that
    the receiver sees its answer taken. There are no proxies, cookies or redirects, and no
    connection is kept, so that the addresses are looked at each time.
    """

    def __init__(
        self,
        check_addresses: AddressCheck,
        *,
        timeout: float = 10.0,
        tls: ssl.SSLContext | None = None,
        resolve: Resolver | None = None,
    ) -> None:
        """``check_addresses`` refuses; raises ``ValueError`` for a timeout that is not positive."""
        require_positive("timeout", timeout)
        self._check = check_addresses
        self._timeout = timeout
        self._tls = tls or client_context()
        self._resolve = resolve or SystemResolver()

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """See the port."""
        network = self._network(destination)
        connection = httpcore.AsyncHTTPConnection(
            httpcore.Origin(
                destination.scheme.encode(), destination.host.encode(), destination.port
            ),
            self._tls,
            network_backend=network,
        )
        request = _request(destination, headers, body)
        answer: Answer | None = None
        try:
            async with asyncio.timeout(self._timeout):
                response = await connection.handle_async_request(request)
                answer = _answer(response)
                await _read_some(response)
        except (TimeoutError, OSError, *_HTTPCORE) as error:
            # Once there is an answer, nothing that happens to its body changes it.
            if answer is None:
                raise _unavailable(destination.host, error, self._timeout) from error
        finally:
            await network.aclose()
        return answer

    def _network(self, destination: Destination) -> CheckedNetwork:
        return CheckedNetwork(
            self._resolve if destination.address is None else _itself,
            lambda addresses: self._check(destination, addresses),
            self._timeout * _CONNECTING,
        )


_HTTPCORE = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)


async def _itself(host: str, port: int) -> list[str]:  # noqa: ARG001 - a resolver
    return [host]


def _request(destination: Destination, headers: Mapping[str, str], body: bytes) -> httpcore.Request:
    ours = {
        "Host": destination.authority,
        "User-Agent": "viralfx-webhooks",
        "Accept": "*/*",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    url = httpcore.URL(
        scheme=destination.scheme.encode(),
        host=destination.host.encode(),
        port=destination.port,
        target=destination.target.encode(),
    )
    return httpcore.Request("POST", url, headers=[*ours.items(), *headers.items()], content=body)


def _answer(response: httpcore.Response) -> Answer:
    asked = [value for name, value in response.headers if name.lower() == b"retry-after"]
    return Answer(status=response.status, retry_after=asked[0].decode("latin-1") if asked else None)


async def _read_some(response: httpcore.Response) -> None:
    read = 0
    async with asyncio.timeout(_COURTESY):
        async for chunk in response.aiter_stream():
            read += len(chunk)
            if read >= _MOST_READ:
                return


def _unavailable(host: str, error: Exception, limit: float) -> WebhookUnavailableError:
    cause = error.__cause__ or error
    if isinstance(error, TimeoutError | httpcore.ConnectTimeout):
        return WebhookUnavailableError(f"{host} did not answer within {limit:g} s")
    if isinstance(error, socket.gaierror):
        what = "its name has no address"
    elif isinstance(cause, ssl.SSLCertVerificationError):
        what = f"its certificate is not accepted: {cause.verify_message}"
    elif isinstance(cause, ssl.SSLError):
        what = "TLS failed"
    elif isinstance(error, httpcore.ConnectError):
        what = "it cannot be connected to"
    elif isinstance(error, httpcore.ProtocolError):
        what = "it broke off, or did not speak HTTP"
    else:
        what = "the connection broke off"
    return WebhookUnavailableError(f"{host} did not answer: {what}")
