"""Facts of log lines in their messages, where another program's formatter renders them."""

import logging
from collections.abc import Callable

from viralfx.settings import Settings
from viralfx.telemetry.logging.redaction import Redaction, secrets_of

_NAMESPACE = "viralfx."
_ACCESS = "viralfx.access"
"""Its messages are whole already."""
_STANDARD = frozenset({*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime"})
_MAX_CHARACTERS = 200
"""Characters of one fact that are shown."""


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
        """Begin with the loggers of this package that exist; a further call adds later ones."""
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if not name.startswith(_NAMESPACE) or name == _ACCESS:
                continue
            if isinstance(logger, logging.Logger) and self not in logger.filters:
                logger.addFilter(self)
                self._loggers.append(logger)

    def remove(self) -> None:
        """End it."""
        for logger in self._loggers:
            logger.removeFilter(self)
        self._loggers.clear()

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the message of a record; return True."""
        facts = [
            f"{name}={self._shown(value)}"
            for name, value in vars(record).items()
            if name not in _STANDARD and value is not None
        ]
        if facts:
            record.msg, record.args = f"{record.getMessage()}: {', '.join(facts)}", ()
        return True

    def _shown(self, value: object) -> str:
        try:
            text = " ".join(str(value).split())
        except Exception:  # noqa: BLE001 - a log line must not fail its caller
            return f"a {type(value).__name__}"
        return self._redact(text)[:_MAX_CHARACTERS]
