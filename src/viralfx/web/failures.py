"""The log of errors that nobody handled, whatever an application's own logging does.

Litestar logs them only in debug mode unless it is told otherwise: a 500 that no line explains.
"""

import logging

from litestar import Litestar
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException, WebSocketException
from litestar.types import Scope as LitestarScope

from viralfx.web.asgi import Scope

_logger = logging.getLogger("viralfx.web")

_KEPT = "viralfx.error"


async def keep_error(error: Exception, scope: LitestarScope) -> None:
    """Keep what was raised until it is known what the answer is; a hook of Litestar.

    A WebSocket has no answer, so its error is logged at once.
    """
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


def _log(error: Exception, method: str, path: str) -> None:
    _logger.error("Request failed", exc_info=error, extra={"method": method, "path": path})


def _logs_itself(app: Litestar) -> bool:
    config = app.logging_config
    when = None if config is None or app.logger is None else config.log_exceptions
    return when == "always" or (when == "debug" and app.debug)
