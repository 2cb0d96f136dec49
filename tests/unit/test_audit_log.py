"""The log stream of the audit trail, which no level switches off."""

import logging
import logging.config
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from viralfx.domain.audit import AuditEvent
from viralfx.telemetry.logging.audit import log_audit
from viralfx.telemetry.logging.lines import AUDIT, FixedLevelError, LoggerLevels

EVENT = AuditEvent(
    id="1",
    at=datetime(2026, 1, 6, 12, tzinfo=UTC),
    actor="management",
    address="192.0.2.7",
    action="process.stop",
    target="pod-1",
    outcome="done",
)
LOGGERS = ("root", "viralfx", AUDIT)


@pytest.fixture
def levels() -> Iterator[LoggerLevels]:
    """Return the levels; those of the loggers here are restored."""
    loggers = [logging.getLogger(name if name != "root" else None) for name in LOGGERS]
    before = [(logger.level, logger.disabled) for logger in loggers]
    yield LoggerLevels()
    for logger, (level, disabled) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.disabled = disabled


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the targets of the logged events."""
    return [vars(each)["target"] for each in caplog.records if each.msg == "Audit event"]


def test_no_level_hides_an_event(levels: LoggerLevels, caplog: pytest.LogCaptureFixture) -> None:
    """Neither that of a parent, nor one that code has set, nor a configuration of logging."""
    for name in ("root", "viralfx"):
        levels.set(name, "error")
    log_audit(EVENT)
    logging.getLogger(AUDIT).setLevel(logging.CRITICAL)
    log_audit(EVENT)
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})
    logging.getLogger(AUDIT).disabled = True
    log_audit(EVENT)
    logging.disable(logging.CRITICAL)
    try:
        log_audit(EVENT)
    finally:
        logging.disable(logging.NOTSET)

    assert lines(caplog) == ["pod-1"] * 4


def test_its_level_is_refused(levels: LoggerLevels) -> None:
    """A line about the trail itself does not depend on a level either."""
    for level in ("error", "debug", None):
        with pytest.raises(FixedLevelError):
            levels.set(AUDIT, level)
    levels.set("viralfx", "error")
    assert logging.getLogger(AUDIT).isEnabledFor(logging.WARNING)


def test_a_filter_of_the_application_decides(caplog: pytest.LogCaptureFixture) -> None:
    """Only code adds one, such as the one that completes messages for other formatters."""
    logger = logging.getLogger(AUDIT)

    def refuse(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(refuse)
    try:
        log_audit(EVENT)
    finally:
        logger.removeFilter(refuse)
    assert lines(caplog) == []


def test_a_line_has_the_fields_that_are_set(caplog: pytest.LogCaptureFixture) -> None:
    """At a level that handlers of other programs let through."""
    log_audit(EVENT)
    (record,) = [each for each in caplog.records if each.msg == "Audit event"]
    names = ("actor", "address", "action", "target", "outcome")

    assert [vars(record)[name] for name in names] == [getattr(EVENT, name) for name in names]
    assert not {"before", "after", "detail"} & {*vars(record)}
    assert (record.levelno, record.name) == (logging.WARNING, AUDIT)
