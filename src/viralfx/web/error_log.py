"""Logs the errors that an application did not handle, with its own logging or without any.

Frameworks are recognized by the names of their exceptions, so that none has to be installed.
"""

import logging

from viralfx.server.interface import ERROR, Scope, mark_logged
from viralfx.telemetry import CLIENT_DISCONNECTED

_logger = logging.getLogger("viralfx.web")

_WRAPPER = ("litestar.exceptions.base_exceptions", "LitestarException")
_INCOMPLETE = ("litestar.exceptions.http_exceptions", "InternalServerException")
_LEFT = {
    ("starlette.requests", "ClientDisconnect"),
    ("starlette.websockets", "WebSocketDisconnect"),
    ("uvicorn.protocols.utils", "ClientDisconnected"),
}
"""The errors of frameworks, and of the server for a message to a closed WebSocket."""
_DISCONNECT_DETAIL = "client disconnected prematurely"
"""The detail of Litestar's error for an incomplete request body; the error has no own type."""


def cause_of(error: BaseException) -> BaseException:
    """Return the error that an application raised, without the wrappers around it.

    Wrappers are Litestar's exception for errors after the start of a response, and an exception
    group with one member.
    """
    while True:
        inner: BaseException | None = None
        if isinstance(error, BaseExceptionGroup):
            inner = error.exceptions[0] if len(error.exceptions) == 1 else None
        elif _name_of(error) == _WRAPPER:
            inner = error.__cause__
        if inner is None:
            return error
        error = inner


def log_error(scope: Scope) -> None:
    """Log the stored error of a request, if there is one. Call it for a response with status 500.

    An error with any other status has been handled by the application.
    """
    if (error := scope.get(ERROR)) is not None:
        log_request_error(error, scope["method"], scope["path"])


def log_escaped(error: Exception, scope: Scope) -> None:
    """Log an error that the application raised instead of responding, and mark it as logged.

    A disconnect of the client is not logged, only recorded in the scope.
    """
    if not note_disconnect(error, scope):
        mark_logged(error)
        log_request_error(cause_of(error), scope["method"], scope["path"])


def note_disconnect(error: Exception, scope: Scope) -> bool:
    """Return whether an error is a disconnect of the client; record one, so that none logs it."""
    if left := is_client_disconnect(error):
        mark_logged(error)
        scope[CLIENT_DISCONNECTED] = True
    return left


def is_client_disconnect(error: Exception) -> bool:
    """Return True for the error of a request, or a WebSocket, whose client disconnected."""
    cause = cause_of(error)
    if _name_of(cause) in _LEFT:
        return True
    return _name_of(cause) == _INCOMPLETE and getattr(cause, "detail", None) == _DISCONNECT_DETAIL


def log_request_error(error: BaseException, method: str, path: str) -> None:
    """Log the error of a request."""
    _logger.error("Request failed", exc_info=error, extra={"method": method, "path": path})


def _name_of(error: BaseException) -> tuple[str, str]:
    return type(error).__module__, type(error).__qualname__
