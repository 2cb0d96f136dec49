"""One line for each request that an application answered."""

import logging
from collections.abc import Callable
from functools import partial
from math import inf
from time import monotonic
from typing import TypeAlias

from viralfx.telemetry.requests import EndedRequest

_LOOK_SECONDS = 0.02
"""After as long, who handles or filters lines of requests from then on gets them as records."""

_logger = logging.getLogger("viralfx.access")


TakeRequest: TypeAlias = Callable[[EndedRequest], None]


class AccessLog:
    """Logs requests: without a record where nobody would see it, by one where somebody would."""

    wanted = staticmethod(partial(_logger.isEnabledFor, logging.INFO))
    """Tells whether requests are to be logged at the moment."""

    def __init__(self) -> None:
        self._take: TakeRequest | None = None
        self._look_again = -inf

    def write(self, request: EndedRequest) -> None:
        """Log a request that is over."""
        # Whether anybody looks costs as much as all else here: it is asked now and then.
        now = monotonic()
        if now >= self._look_again:
            self._take = _short_way()
            self._look_again = now + _LOOK_SECONDS
        if self._take is None:
            _logger.handle(AccessRecord(request))
        else:
            self._take(request)


def _short_way() -> TakeRequest | None:
    """Return who takes lines without a record, if nobody else is to see it."""
    node, root = _logger, logging.root
    while node is not root:
        if node.handlers or node.filters or not node.propagate or node.parent is None:
            return None
        node = node.parent
    if len(root.handlers) != 1:
        return None
    (handler,) = root.handlers
    if handler.filters or handler.level > logging.INFO:
        return None
    take: TakeRequest | None = getattr(handler, "take_request", None)
    return take


class AccessRecord(logging.LogRecord):
    """The record of one request, for any handler and filter."""

    def __init__(self, request: EndedRequest) -> None:
        super().__init__(_logger.name, logging.INFO, "", 0, request.message, (), None)
        vars(self).update(request.fields(), created=request.at, msecs=request.at % 1 * 1000)
