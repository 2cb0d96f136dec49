"""What OpenTelemetry logs of our own spans is heard here, and all else goes where it always went.

Its loggers are those of the application as well, which may send logs, metrics or spans of its own.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_PROCESSING = "opentelemetry.sdk._shared_internal"
_EXPORTING = "opentelemetry.exporter."
_ATTRIBUTES = "opentelemetry.attributes"

_mine: ContextVar["Ear | None"] = ContextVar("viralfx_mine", default=None)


class Ear(logging.Filter):
    """Takes in what a library logs within :meth:`open`, instead of everybody else."""

    def __init__(self, hear: Callable[[str], object], cuts: Collection[int] = ()) -> None:
        """Have ``hear`` told of warnings and errors, and nobody of anything.

        ``cuts`` are lengths at which attributes are cut on purpose, of which the library would tell
        each time.
        """
        super().__init__()
        self._hear = hear
        self._cuts = cuts
        known = [_PROCESSING, _ATTRIBUTES, *logging.root.manager.loggerDict]
        self._loggers = [
            logging.getLogger(name)
            for name in dict.fromkeys(known)
            if name in {_PROCESSING, _ATTRIBUTES} or name.startswith(_EXPORTING)
        ]
        for logger in self._loggers:
            # Ahead of the library's own, which drops what it has said within 20 s: spans that are
            # lost all the time would seem to be lost now and then.
            logger.filters.insert(0, self)

    def close(self) -> None:
        """Hear nothing any more."""
        for logger in self._loggers:
            logger.removeFilter(self)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hear what is logged within the block, and nothing that others do meanwhile."""
        token = _mine.set(self)
        try:
            yield
        finally:
            _mine.reset(token)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is for everybody."""
        if record.name == _ATTRIBUTES:
            arguments = record.args
            return not (isinstance(arguments, tuple) and arguments and arguments[0] in self._cuts)
        if _mine.get() is not self:
            return True
        if record.levelno >= logging.WARNING:
            self._hear(record.getMessage())
        return False


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if threading.get_ident() == self._thread:
            self.heard.append(record.getMessage())
        else:
            logging.root.handle(record)


@contextmanager
def complaints(name: str) -> Iterator[list[str]]:
    """Gather what a library complains of in this thread within the block; it is logged nowhere."""
    logger, handler = logging.getLogger(name), _Complaints()
    propagate, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    if not logger.isEnabledFor(logging.WARNING):
        logger.setLevel(logging.WARNING)
    try:
        yield handler.heard
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
