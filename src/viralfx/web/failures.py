"""The log of errors that nobody handled, whatever an application's own logging does.

Litestar logs them only in debug mode unless it is told otherwise: a 500 that no line explains.
"""

import logging

from litestar import Litestar
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException, InternalServerException, WebSocketException
from litestar.types import Scope as LitestarScope

from viralfx.telemetry.requests import CLIENT_LEFT, cause_of
from viralfx.web.asgi import Scope

_logger = logging.getLogger("viralfx.web")

_KEPT = "viralfx.error"
_TOLD = "viralfx_told"
_LEFT = "client disconnected prematurely"
"""What Litestar says where the client left before the whole body had come; it has no other word."""


async def keep_error(error: Exception, scope: LitestarScope) -> None:
    """Keep what was raised until it is known what the answer is; a hook of Litestar.

    A WebSocket has no answer, so its error is logged at once.
    """
    if _says_client_left(error):
        scope[CLIENT_LEFT] = True  # type: ignore[literal-required]
        return
    if _logs_itself(scope["litestar_app"]):
        return
    if scope["type"] == ScopeType.WEBSOCKET:
        if not isinstance(error, HTTPException | WebSocketException):
            _log(error, "WEBSOCKET", scope["path"])
        return
    scope[_KEPT] = error  # type: ignore[literal-required]  # a server's own keys are allowed


def log_error(scope: Scope) -> None:
    """Log what was raised, if something was. For an answer that is a 500, and no other.

    What an application answers otherwise, it has handled.
    """
    if (error := scope.get(_KEPT)) is not None:
        _log(error, scope["method"], scope["path"])


def log_escaped(error: Exception, scope: Scope) -> None:
    """Log what was raised where no answer tells of it, and mark it so that no server logs it, too.

    Unless it only says that the client left.
    """
    tell_no_more(error)
    if _says_client_left(error):
        scope[CLIENT_LEFT] = True
    else:
        _log(cause_of(error), scope["method"], scope["path"])


def tell_no_more(error: BaseException) -> None:
    """Mark an error that nobody is to log any more."""
    vars(error)[_TOLD] = True


def is_told(error: BaseException) -> bool:
    """Tell whether an error is marked so."""
    return _TOLD in vars(error)


def _says_client_left(error: Exception) -> bool:
    cause = cause_of(error)
    return isinstance(cause, InternalServerException) and cause.detail == _LEFT


def _log(error: BaseException, method: str, path: str) -> None:
    _logger.error("Request failed", exc_info=error, extra={"method": method, "path": path})


def _logs_itself(app: Litestar) -> bool:
    config = app.logging_config
    when = None if config is None or app.logger is None else config.log_exceptions
    return when == "always" or (when == "debug" and app.debug)
