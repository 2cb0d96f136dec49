"""The guide's words for levels of logging, and changing them while the process runs."""

import logging
from dataclasses import dataclass

VERBOSE = 5
"""Below DEBUG: very detailed tracing."""

LEVELS = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "log": logging.INFO,
    "debug": logging.DEBUG,
    "verbose": VERBOSE,
}
"""The words that LOG_LEVEL accepts."""

ROOT = "root"
"""The name of the logger that all others are below."""

_OURS = "viralfx."
_logger = logging.getLogger("viralfx.loggers")


def word(level: int) -> str:
    """Return the word that a line has for a level of ``logging``."""
    return "info" if (setting := setting_of(level)) == "log" else setting


def setting_of(level: int) -> str:
    """Return the word that LOG_LEVEL has for a level of ``logging``."""
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warn"
    if level >= logging.INFO:
        return "log"
    return "debug" if level >= logging.DEBUG else "verbose"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerLevel:
    """The level of one logger, in words of LOG_LEVEL."""

    level: str | None
    """Its own; None where it takes that of the logger above it."""
    effective: str
    """What holds for it."""


class LoggerLevels:
    """Shows and changes the levels of the loggers that there are; it makes none."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def all(self) -> dict[str, LoggerLevel]:
        """Return every logger by its name, the root first."""
        names = sorted(
            name
            for name, logger in list(logging.root.manager.loggerDict.items())
            if isinstance(logger, logging.Logger)
        )
        return {name: _level(_logger_of(name)) for name in (ROOT, *names)}

    def find(self, name: str) -> str | None:
        """Return the whole name of a logger; None when there is none.

        Ours are also found by what log lines call their context, without ``viralfx.``. A name that
        only has loggers below it is one, too.
        """
        known = logging.root.manager.loggerDict
        return next((n for n in (name, _OURS + name) if n == ROOT or n in known), None)

    def get(self, name: str) -> LoggerLevel:
        """Return the level of a logger that was found."""
        return _level(_logger_of(name))

    def set(self, name: str, level: str | None) -> LoggerLevel:
        """Change the level of a logger that was found; None is what it was before all changes.

        Raises ``KeyError`` for a word that is no level.
        """
        logger = _logger_of(name)
        number = None if level is None else LEVELS[level]
        if number is not None:
            self._before.setdefault(name, logger.level)
            logger.setLevel(number)
        elif name in self._before:
            logger.setLevel(self._before.pop(name))
        now = _level(logger)
        # A warning, so that it is written whatever the levels are now, but for the highest.
        _logger.warning(
            "Logger level changed",
            extra={"logger": name, "loggerLevel": now.level, "effectiveLevel": now.effective},
        )
        return now


def _logger_of(name: str) -> logging.Logger:
    return logging.getLogger(None if name == ROOT else name)


def _level(logger: logging.Logger) -> LoggerLevel:
    return LoggerLevel(
        level=setting_of(logger.level) if logger.level else None,
        effective=setting_of(logger.getEffectiveLevel()),
    )
