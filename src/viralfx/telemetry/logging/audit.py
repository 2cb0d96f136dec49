"""The log stream of the audit trail, which no level of a logger switches off."""

import logging

from viralfx.domain.audit import AuditEvent, event_fields
from viralfx.telemetry.logging.lines import AUDIT

_logger = logging.getLogger(AUDIT)
# Its own level, so that lines about the trail itself do not depend on that of a parent.
_logger.setLevel(logging.INFO)

_FIELDS = ("actor", "address", "action", "target", "outcome", "before", "after", "detail")
"""Each line has time, correlation id and instance by itself."""


def log_audit(event: AuditEvent) -> None:
    """Write one event as a log line.

    A warning, so that handlers of applications, which often begin there, get it. It goes to the
    handlers directly: a level that an intruder raises must not hide this change and the next ones.
    A filter of the logger still decides, since only code of the application adds one.
    """
    fields = event_fields(event)
    record = _logger.makeRecord(
        AUDIT,
        logging.WARNING,
        "",
        0,
        "Audit event",
        (),
        None,
        extra={name: fields[name] for name in _FIELDS if fields[name] is not None},
    )
    verdict: object = _logger.filter(record)
    if verdict:
        # Since Python 3.12 a filter may return a replacement record.
        _logger.callHandlers(verdict if isinstance(verdict, logging.LogRecord) else record)
