"""Facts of log lines in their messages, where another program's formatter renders them."""

import logging
from collections.abc import Callable

from viralfx.settings import Settings
from viralfx.telemetry.logging.redaction import Redaction, secrets_of

LOGGERS = (
    *("alerts", "asgi", "cache", "circuits", "console", "credentials", "database", "events"),
    *("fleet", "health", "heap", "http", "jobs", "lifecycle", "loggers", "loop", "management"),
    *("metrics", "process", "queues", "redis", "requests", "resilience", "serve", "settings"),
    *("shutdown", "state", "taskiq", "tracing", "web"),
)
"""The loggers of this package below ``viralfx``, without ``access``, whose messages are whole."""
_STANDARD = frozenset({*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime"})
_MAX_CHARACTERS = 200
"""Characters of one fact that are shown."""


class _Whole(str):
    """A message that has its facts: of two applications in one process, each has a filter."""

    __slots__ = ()


class FactsInMessages(logging.Filter):
    """Appends the extra fields of a record to its message: ``Health check changed: check=shop``.

    The default formatters of ``logging`` and of servers show the message alone. The fields stay,
    for formatters that show them. Secrets are redacted: no formatter of this package follows.
    """

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        super().__init__()
        self._redact = redact
        self._loggers: list[logging.Logger] = []

    @classmethod
    def from_settings(cls, settings: Settings) -> "FactsInMessages":
        """Return one that redacts the secrets of ``settings``."""
        return cls(Redaction({*secrets_of(settings)}).text)

    def install(self) -> None:
        """Begin with all loggers of this package, also those of modules that are imported later."""
        for name in LOGGERS:
            logger = logging.getLogger(f"viralfx.{name}")
            if self not in logger.filters:
                logger.addFilter(self)
                self._loggers.append(logger)

    def remove(self) -> None:
        """End it."""
        for logger in self._loggers:
            logger.removeFilter(self)
        self._loggers.clear()

    def complete(self, record: logging.LogRecord) -> None:
        """Change the message of a record, if it is one of this package."""
        area, _, name = record.name.partition(".")
        if area == "viralfx" and name in LOGGERS:
            self.filter(record)

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the message of a record; return True."""
        if isinstance(record.msg, _Whole):
            return True
        facts = [
            f"{name}={self._shown(value)}"
            for name, value in vars(record).items()
            if name not in _STANDARD and value is not None
        ]
        if facts:
            record.msg, record.args = _Whole(f"{record.getMessage()}: {', '.join(facts)}"), ()
        return True

    def _shown(self, value: object) -> str:
        try:
            text = " ".join(str(value).split())
        except Exception:  # noqa: BLE001 - a log line must not fail its caller
            return f"a {type(value).__name__}"
        return self._redact(text)[:_MAX_CHARACTERS]
