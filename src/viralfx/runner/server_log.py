"""What uvicorn logs, without what was told already."""

import logging

from viralfx.web.failures import is_told

_LOGGER = "uvicorn.error"


class ServerLog(logging.Filter):
    """A filter of uvicorn's logger."""

    def __init__(self) -> None:
        super().__init__()
        self._logger = logging.getLogger(_LOGGER)

    def install(self) -> None:
        """Begin to filter; again does nothing."""
        self._logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is to be logged."""
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not is_told(error)


SERVER_LOG = ServerLog()
"""The one of this process, as its servers have one logger."""
