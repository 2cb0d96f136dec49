"""An HTTP server that starts and stops in separate steps, and its listening socket."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from time import monotonic
from typing import Any

import uvicorn

from viralfx.core.errors import StartupError
from viralfx.server.connections import Connections
from viralfx.server.interface import Application, Receive, Scope, Send, ServerMetrics, is_logged
from viralfx.server.lifespan import ApplicationLifespan
from viralfx.server.limits import (
    TICK_SECONDS,
    HttpLimits,
    Rejection,
    stop_handshakes,
)

_lacking = ""
try:
    from uvicorn.server import ServerState

    from viralfx.server.protocol import FIRST_REQUEST_SECONDS, HttpProtocol, protocol_class
    from viralfx.server.response import PROBES, echo, serve_trial
    from viralfx.server.websocket import WebSocketLimits
except ImportError as _error:
    _lacking = str(_error)

BACKLOG = 2048
"""Connections that the kernel completes before the server accepts them."""


def listen(variable: str, host: str, port: int, *, backlog: int = BACKLOG) -> socket.socket:
    """Return a listening socket. Port 0 lets the system choose one.

    Raises :class:`StartupError` with one line that names ``variable`` and the remedy.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Accepted sockets inherit TCP_NODELAY. Without it each keep-alive response waits 40 ms for
        # the client's delayed acknowledgement. asyncio sets it only on sockets with IPPROTO_TCP.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.bind(address)
            listener.listen(backlog)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except socket.gaierror as error:
        raise StartupError(f"HOST: cannot resolve {host!r}: {error.strerror}") from None
    except UnicodeError:
        raise StartupError(f"HOST: cannot resolve {host!r}: not a host name") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = f"port {port} on {host} is in use; stop its process, or set another port"
        elif error.errno == errno.EACCES:
            what = f"no permission for port {port} on {host}; choose one above 1023"
        elif error.errno == errno.EADDRNOTAVAIL:
            what = f"{host} is not an address of this machine; set HOST to one of its addresses"
            variable = "HOST"
        else:
            what = f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
        raise StartupError(f"{variable}: {what}") from None
    # A forked child must not keep the port open after this process has ended.
    os.register_at_fork(after_in_child=listener.close)
    return listener


_ACCEPTS_PER_TURN = 16
"""Connections that are accepted in one turn of the event loop, which takes about 5 ms."""
_MAX_REFUSED = 16
"""Refused connections that stay open until their clients can read the response."""
_REFUSED_SECONDS = 0.5
_DESCRIPTORS_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_logger = logging.getLogger("viralfx.http")


class _Listening:
    _listener: socket.socket

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the listening socket."""
        name = self._listener.getsockname()
        return str(name[0]), int(name[1])


class HttpServer(_Listening):
    """Serves an ASGI application behind a gate on one listening socket.

    Connections are of this project's protocol, which uses private parts of uvicorn: make a server
    by :func:`http_server`, which tests them.
    """

    def __init__(
        self,
        gate: Application,
        listener: socket.socket,
        *,
        lifespan: bool,
        limits: HttpLimits | None = None,
        metrics: ServerMetrics | None = None,
        name: str = "api",
        fast_probes: bool = True,
        websockets: bool = True,
    ) -> None:
        """With ``lifespan`` the server also has the application's start-up and shutdown.

        Without ``websockets`` a handshake is an ordinary request.

        ``name`` labels the server in metrics: ``api`` or ``management``. Without ``fast_probes``
        probes go through ASGI, with the same responses.
        """
        limits = limits or HttpLimits()
        self._config = _configured(gate, limits, http="httptools", websockets=websockets)
        self._config.load()
        self._listener = listener
        self.application = ApplicationLifespan(gate) if lifespan else None
        """The lifespan of the application; None without ``lifespan``."""
        self._state = ServerState()
        self.connections = Connections(limits)
        if metrics is not None:
            self.connections.on_rejected = metrics.add_server(
                name,
                {rejection.reason for rejection in Rejection},
                lambda: self.connections.open,
                self.connections.limits.max_connections,
            )
            self.connections.on_upgrade_ignored = metrics.count_ignored_upgrade
        self._protocol_class = protocol_class(
            self.connections,
            gate.requests,
            gate.probes if fast_probes else {},
            self._config.ws_protocol_class,
            gate,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepting = self._stopped = False
        self._opening: set[asyncio.Task[object]] = set()
        self._refused: deque[tuple[float, socket.socket]] = deque()
        self._ticker: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start accepting connections, before the application's lifespan begins."""
        logging.getLogger("uvicorn.error").addFilter(_is_unlogged_error)
        self._loop = asyncio.get_running_loop()
        self._renew_date()
        self._resume_accepting()
        self._ticker = asyncio.create_task(self._tick(), name="http-tick")

    async def stop_listening(self) -> None:
        """Refuse new connections, close idle ones, and close busy ones after their response.

        Connections that the kernel has already completed are accepted first, because their clients
        may have sent a request. :meth:`settle` waits for these requests.
        """
        if not self._stopped:
            stop_handshakes(self._listener)
            # Enough turns for a full queue, because the kernel may have no socket filters.
            for _ in range(BACKLOG // _ACCEPTS_PER_TURN + 1):
                if not self._accept():
                    break
                await asyncio.sleep(0)
            self._stopped = True
            self._pause_accepting()
            self._listener.close()
        if self._opening:
            await asyncio.wait(self._opening)
        # Data that has arrived on idle connections is read before they are closed. One turn of
        # the loop detects it, the next one parses it.
        for _ in range(2):
            await asyncio.sleep(0)
        self._shut_down_connections()

    async def settle(self) -> None:
        """Wait for the requests that were on their way at :meth:`stop_listening`.

        The wait lasts at most half a second. After it, connections without a request are closed.
        """
        pending = {
            c
            for c in self._state.connections
            if isinstance(c, HttpProtocol) and c.may_have_request()
        }
        deadline = monotonic() + FIRST_REQUEST_SECONDS
        while pending and monotonic() < deadline:
            await asyncio.sleep(0.01)
            pending = {connection for connection in pending if connection.may_have_request()}
        self._shut_down_connections(HttpProtocol)

    def reject_unfinished(self) -> None:
        """End the requests of clients that send or read nothing, before the drain cuts the others.

        An incomplete body is rejected with 408: the application has accepted nothing, so no work is
        lost. A client that reads nothing would not get the rest of its response either.
        """
        for connection in list(self._state.connections):
            if isinstance(connection, (HttpProtocol, WebSocketLimits)):
                connection.reject_unfinished()

    def is_answering(self) -> bool:
        """Return True while a client has not read its response, or a request waits behind one.

        A message of a WebSocket is a response, too.
        """
        for each in self._state.connections:
            if isinstance(each, (HttpProtocol, WebSocketLimits)):
                waits = getattr(each, "pipeline", ()) and not each.transport.is_closing()
                if waits or each.transport.get_write_buffer_size():
                    return True
        return False

    def _shut_down_connections(self, kind: type[object] = object) -> None:
        for connection in list(self._state.connections):
            if not isinstance(connection, kind):
                continue
            try:
                connection.shutdown()
            except Exception:  # one connection must not fail the stage for all
                _logger.exception("Connection could not be shut down")
                if connection.transport is not None:
                    connection.transport.abort()

    async def close(self) -> None:
        """Stop listening and close all remaining connections."""
        if self._ticker is not None:
            self._ticker.cancel()
        await self.stop_listening()
        for connection in list(self._state.connections):
            if connection.transport is not None:
                connection.transport.close()
        self._close_refused(now=True)
        self.connections.close()

    # -- accepting ---------------------------------------------------------------------------

    def _resume_accepting(self) -> None:
        if self._loop is not None and not self._accepting and not self._stopped:
            self._loop.add_reader(self._listener.fileno(), self._accept)
            self._accepting = True

    def _pause_accepting(self) -> None:
        if self._loop is not None and self._accepting:
            self._loop.remove_reader(self._listener.fileno())
            self._accepting = False

    def _accept(self) -> bool:
        """Accept some waiting connections; return False if no more are waiting.

        The server accepts connections itself to enforce its limit. asyncio would accept all waiting
        connections before the first callback, and run out of descriptors.
        """
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if error.errno in _DESCRIPTORS_SHORT:
                    # An immediate retry would use a whole core; the next tick tries again.
                    self.connections.reject(Rejection.CONNECTIONS, None)
                    self._close_refused(now=True)
                    self._pause_accepting()
                    return False
                continue  # the client has disconnected
            accepted.setblocking(False)
            if self.connections.full and not self.connections.make_room():
                self._refuse(accepted)
            else:
                self._open(accepted)
        return True

    def _open(self, accepted: socket.socket) -> None:
        assert self._loop is not None  # noqa: S101 - narrows for the type checker
        self.connections.open += 1
        opening = self._loop.create_task(
            self._loop.connect_accepted_socket(self._make_protocol, accepted)
        )
        self._opening.add(opening)
        opening.add_done_callback(self._opened)

    def _make_protocol(self) -> "HttpProtocol":
        state = self.application.state if self.application is not None else {}
        return self._protocol_class(self._config, self._state, state, self._loop)

    def _opened(self, opening: asyncio.Task[object]) -> None:
        self._opening.discard(opening)
        if opening.cancelled() or opening.exception() is not None:
            self.connections.open -= 1  # the client has disconnected

    def _refuse(self, accepted: socket.socket) -> None:
        """Respond with 503 to a connection above the limit, and close it.

        Closing a connection with unread input resets it, and the client may not see the response.
        So pending input is read first, and the last few connections are closed with a delay.
        """
        rejection = Rejection.CONNECTIONS
        client: str | None = None
        with contextlib.suppress(OSError, IndexError, TypeError):
            client = str(accepted.getpeername()[0])
        self.connections.reject(rejection, client)
        with contextlib.suppress(OSError):
            accepted.send(rejection.head + self.connections.server_head + b"\r\n" + rejection.body)
            accepted.shutdown(socket.SHUT_WR)
            accepted.recv(65536)
        self._refused.append((monotonic() + _REFUSED_SECONDS, accepted))
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popleft()[1].close()

    def _close_refused(self, *, now: bool = False) -> None:
        while self._refused and (now or self._refused[0][0] <= monotonic()):
            self._refused.popleft()[1].close()

    # -- time --------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._renew_date()
            self.connections.advance()
            self._close_refused()
            self._resume_accepting()

    def _renew_date(self) -> None:
        date = formatdate(usegmt=True).encode()
        self._state.default_headers = [(b"date", date)]
        self.connections.server_head = b"date: %s\r\n" % date


def _configured(app: Any, limits: HttpLimits, *, http: str, websockets: bool) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=http,
        interface="asgi3",
        lifespan="off",  # the process runs it
        log_config=None,
        access_log=False,
        ws="auto" if websockets else "none",
        ws_max_size=limits.max_websocket_bytes,
        # A compressed frame of 15 KB could inflate to 15 MB before its size is known.
        ws_per_message_deflate=False,
        timeout_keep_alive=round(limits.keep_alive_timeout),
        server_header=False,
        # The gate reads the headers of trusted proxies; uvicorn would trust those of this machine.
        proxy_headers=False,
    )


def _is_unlogged_error(record: logging.LogRecord) -> bool:
    """Filter uvicorn's records of errors that are logged already or due to invalid text."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not (is_logged(error) or isinstance(error, UnicodeDecodeError))


class UvicornServer(_Listening):
    """Serves as :class:`HttpServer` does, by the public interface of uvicorn alone.

    Probes take the way of all requests. Beyond the longest WebSocket message and the idle time of a
    connection there are no limits for clients, and no metrics of connections.
    """

    def __init__(
        self,
        gate: Application,
        listener: socket.socket,
        *,
        lifespan: bool,
        limits: HttpLimits | None = None,
        websockets: bool = True,
    ) -> None:
        """Create it on the running loop; the parameters are those of :class:`HttpServer`."""
        self._listener, self._gate = listener, gate
        self.application = ApplicationLifespan(gate) if lifespan else None
        self._server = uvicorn.Server(
            _configured(self._serve, limits or HttpLimits(), http="auto", websockets=websockets)
        )
        self._serving: asyncio.Task[None] | None = None

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.application is not None:
            scope["state"] = self.application.state.copy()
        await self._gate(scope, receive, send)

    async def open(self) -> None:
        """Start accepting connections, before the application's lifespan begins."""
        logging.getLogger("uvicorn.error").addFilter(_is_unlogged_error)
        handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        serving = asyncio.create_task(self._server.serve([self._listener]), name="uvicorn")
        self._serving = serving
        await _until(lambda: self._server.started or serving.done())
        for number, handler in handlers.items():  # uvicorn would stop at once, and in its own order
            signal.signal(number, handler)
        if serving.done():
            await serving

    async def stop_listening(self) -> None:
        """Refuse new connections, close idle ones, and close busy ones after their response."""
        self._server.should_exit = True
        await _until(lambda: not self._is_serving() or self._listener.fileno() < 0)

    async def settle(self) -> None:
        """Return: uvicorn does not show requests on their way."""

    def reject_unfinished(self) -> None:
        """Do nothing: uvicorn does not show unfinished requests."""

    def is_answering(self) -> bool:
        """Return True while uvicorn waits for its clients."""
        return self._server.should_exit and self._is_serving()

    async def close(self) -> None:
        """Stop listening and close all remaining connections."""
        self._server.should_exit = self._server.force_exit = True
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=_FORCED_SECONDS)
            self._serving.cancel()
        self._listener.close()

    def _is_serving(self) -> bool:
        return self._serving is not None and not self._serving.done()


_FORCED_SECONDS = 0.5
"""uvicorn looks at its flags ten times a second."""


async def _until(is_true: Callable[[], bool]) -> None:
    while not is_true():  # noqa: ASYNC110 - uvicorn offers no event
        await asyncio.sleep(0.01)


AnyServer = HttpServer | UvicornServer


def http_server(
    gate: Application, listener: socket.socket, *, lacking: str, **options: Any
) -> AnyServer:
    """Return a server with the parameters of :class:`HttpServer`.

    It is a :class:`UvicornServer` if uvicorn lacks a part: :func:`lacking_parts` finds ``lacking``.
    """
    if not lacking:
        return HttpServer(gate, listener, **options)
    known = options.keys() & {"lifespan", "limits", "websockets"}
    return UvicornServer(gate, listener, **{name: options[name] for name in known})


def lacking_parts() -> str:
    """Return the missing private parts of uvicorn that :class:`HttpServer` uses; empty: none.

    It is a self-test without a socket: a connection of the own protocol serves a probe, a request
    and a WebSocket. Call it once, while no event loop runs: its finding is one warning.
    """
    if lacking := _lacking or _test_protocol():
        _logger.warning(
            "uvicorn lacks parts that the HTTP server uses: no limits, no fast probes",
            extra={"uvicorn": uvicorn.__version__, "lacking": lacking},
        )
    return lacking


def _test_protocol() -> str:
    """Return the error of the self-test; empty if there is none."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(_try_protocol())
    except Exception as error:  # noqa: BLE001 - a part may be missing in any way
        return f"{type(error).__name__}: {error}"
    finally:
        loop.close()
    return ""


class _NoRequests:
    stopping = False


async def _try_protocol() -> None:
    connections, requests = Connections(HttpLimits()), _NoRequests()
    config = _configured(echo, connections.limits, http="httptools", websockets=True)
    config.load()
    kind = protocol_class(connections, requests, PROBES, config.ws_protocol_class, echo)
    await serve_trial(kind, config, ServerState())
