"""What uvicorn logs, without what was told already, and without what any client can repeat."""

import logging
from time import monotonic

from viralfx.web.failures import is_told

_PERIOD = 60.0
_LOGGER = "uvicorn.error"
_OF_CLIENTS = ("Invalid HTTP request received.", "Unsupported upgrade request.")
"""What uvicorn says of bytes that are no request. Applications may log here, too."""


class ServerLog(logging.Filter):
    """A filter of uvicorn's logger, for the event loop's thread."""

    def __init__(self, period: float = _PERIOD) -> None:
        """Take the seconds from one line of a kind to the next."""
        super().__init__()
        self._period = period
        self._logger = logging.getLogger(_LOGGER)
        self._next = dict.fromkeys(_OF_CLIENTS, 0.0)
        self._untold = dict.fromkeys(_OF_CLIENTS, 0)

    def install(self) -> None:
        """Begin to filter; again does nothing."""
        self._logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is to be logged."""
        if record.exc_info and (error := record.exc_info[1]) is not None and is_told(error):
            return False
        message = record.msg
        if message not in _OF_CLIENTS or hasattr(record, "others"):
            return True
        if self._untold[message] or monotonic() < self._next[message]:
            self._untold[message] += 1
            return False
        self._next[message] = monotonic() + self._period
        record.others = 0
        return True

    def tell_rest(self, *, now: bool = False) -> None:
        """Log how often something was said again since its last line, once a minute.

        ``now`` is for the end, after which nobody would.
        """
        for message, count in self._untold.items():
            if count and (now or monotonic() >= self._next[message]):
                self._next[message] = monotonic() + self._period
                self._untold[message] = 0
                self._logger.warning(message, extra={"others": count - 1})


SERVER_LOG = ServerLog()
"""The one of this process, as its servers have one logger."""
