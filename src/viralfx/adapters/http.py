"""SSRF-safe HTTP client for webhooks and checks, on httpcore: one request for each connection.

It connects only to addresses that were resolved and checked, without a second name lookup.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import httpcore

from viralfx.core.errors import require_positive
from viralfx.core.threads import NameLookups
from viralfx.domain.webhooks.delivery import WebhookResponse
from viralfx.domain.webhooks.url import Destination, WebhookUnavailableError

__all__ = ["HttpWebhookSender", "client_context"]


Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns all addresses of a host, best first. Raises ``OSError`` if there is none."""

SocketOptions: TypeAlias = Iterable[httpcore.SOCKET_OPTION]

MAX_ADDRESSES = 8


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Resolves a name once, checks all its addresses, and connects to one of them.

    There is no second lookup that could return another address (DNS rebinding): the connection is
    made to a checked address, while TLS and the ``Host`` header use the name.
    """

    def __init__(
        self, resolve: Resolver, check: Callable[[Sequence[str]], None], connect_timeout: float
    ) -> None:
        """``connect_timeout``: seconds for all addresses together."""
        self._resolve = resolve
        self._check = check
        self._connect_timeout = connect_timeout
        self._network = httpcore.AnyIOBackend()
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109 - the sender limits the total
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that accepts.

        Raises the errors of ``check``, ``OSError`` if the name has no address, and httpcore's
        errors if no address accepts.
        """
        addresses = await self._resolve(host, port)
        self._check(addresses)
        tried = addresses[:MAX_ADDRESSES]
        # An address that drops packets must not use up the time of the others.
        share = self._connect_timeout / max(1, len(tried))
        refusal: Exception = httpcore.ConnectError("the name has no address")
        for address in tried:
            try:
                self._stream = await self._network.connect_tcp(
                    address, port, share, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                refusal = error
            else:
                return self._stream
        raise refusal

    async def aclose(self) -> None:
        """Close the connection; httpcore leaves it open if the TLS handshake is interrupted."""
        if self._stream is not None:
            await self._stream.aclose()


AddressCheck = Callable[[Destination, Iterable[str]], None]

MAX_RESPONSE_BYTES = 16 * 1024
MAX_RESPONSE_READ_SECONDS = 1.0
CONNECT_SHARE = 0.5
"""Share of the timeout for resolving and connecting."""


def client_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Return a TLS context that verifies against the system's CAs or those in a PEM file.

    Raises ``OSError`` if the file cannot be read or holds no certificates.
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


class HttpWebhookSender:
    """Implements :class:`viralfx.domain.webhooks.delivery.WebhookSender`.

    ``timeout`` limits the seconds from the name lookup to the head of the response. Up to 16 KiB of
    the body are read for at most a second, so that the receiver can finish its response, and
    dropped. There are no proxies, cookies, redirects or persistent connections, so the addresses
    are checked for each request.
    """

    def __init__(
        self,
        check_addresses: AddressCheck,
        *,
        timeout: float = 10.0,
        tls: ssl.SSLContext | None = None,
        resolve: Resolver | None = None,
    ) -> None:
        """``check_addresses`` raises for forbidden addresses.

        Raises ``ValueError`` for a timeout that is not positive.
        """
        require_positive("timeout", timeout)
        self._check = check_addresses
        self._timeout = timeout
        self._tls = tls or client_context()
        self._resolve = resolve or NameLookups().addresses

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> WebhookResponse:
        """Send one POST request; see :class:`viralfx.domain.webhooks.delivery.WebhookSender`."""
        own = {
            "User-Agent": "viralfx-webhooks",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }
        return await self._send(destination, _request("POST", destination, own, headers, body))

    async def get(self, destination: Destination, headers: Mapping[str, str]) -> WebhookResponse:
        """Send one GET request; raises as ``post`` does."""
        own = {"User-Agent": "viralfx-health"}
        return await self._send(destination, _request("GET", destination, own, headers, b""))

    async def _send(self, destination: Destination, request: httpcore.Request) -> WebhookResponse:
        network = self._network(destination)
        connection = httpcore.AsyncHTTPConnection(
            httpcore.Origin(
                destination.scheme.encode(), destination.host.encode(), destination.port
            ),
            self._tls,
            network_backend=network,
        )
        received: WebhookResponse | None = None
        try:
            async with asyncio.timeout(self._timeout):
                response = await connection.handle_async_request(request)
                received = _webhook_response(response)
                await _read_some(response)
        except (TimeoutError, OSError, *_HTTPCORE) as error:
            # After the head of the response, errors of its body do not matter.
            if received is None:
                raise _unavailable(destination.host, error, self._timeout) from error
        finally:
            await network.aclose()
        return received

    def _network(self, destination: Destination) -> CheckedNetwork:
        return CheckedNetwork(
            self._resolve if destination.address is None else _literal_address,
            lambda addresses: self._check(destination, addresses),
            self._timeout * CONNECT_SHARE,
        )


_HTTPCORE = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)


async def _literal_address(host: str, port: int) -> list[str]:  # noqa: ARG001 - a resolver
    return [host]


def _request(
    method: str,
    destination: Destination,
    own: Mapping[str, str],
    given: Mapping[str, str],
    body: bytes,
) -> httpcore.Request:
    always = {"Host": destination.authority, "Accept": "*/*", "Connection": "close"}
    taken = {name.lower() for name in given}
    kept = [(name, value) for name, value in {**always, **own}.items() if name.lower() not in taken]
    url = httpcore.URL(
        scheme=destination.scheme.encode(),
        host=destination.host.encode(),
        port=destination.port,
        target=destination.target.encode(),
    )
    return httpcore.Request(method, url, headers=[*kept, *given.items()], content=body)


def _webhook_response(response: httpcore.Response) -> WebhookResponse:
    delays = [value for name, value in response.headers if name.lower() == b"retry-after"]
    return WebhookResponse(
        status=response.status, retry_after=delays[0].decode("latin-1") if delays else None
    )


async def _read_some(response: httpcore.Response) -> None:
    read = 0
    async with asyncio.timeout(MAX_RESPONSE_READ_SECONDS):
        async for chunk in response.aiter_stream():
            read += len(chunk)
            if read >= MAX_RESPONSE_BYTES:
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
