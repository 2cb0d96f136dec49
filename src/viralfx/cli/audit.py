"""``viralfx audit``: shows the audit trail in the database of DATABASE_URL."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from viralfx.bootstrap.postgres import opened_audit_store
from viralfx.cli import note
from viralfx.cli.output import plain, print_json, print_table
from viralfx.core.clock import timestamp
from viralfx.core.errors import ConfigurationError, StartupError
from viralfx.domain.audit import AuditEvent, AuditFilter, AuditUnavailableError, event_fields
from viralfx.settings import Settings, read_settings
from viralfx.telemetry.logging.events import log_settings
from viralfx.telemetry.logging.handler import configure_logging


def audit(options: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises :class:`ConfigurationError` for invalid settings, and :class:`StartupError` if the
    database cannot be reached or has no audit trail.
    """
    settings = read_settings(os.environ, strict=True)
    if settings.database_url is None:
        problem = (
            "DATABASE_URL: not set, so each process keeps its last events in its own memory;"
            " set it, or read the log"
        )
        raise ConfigurationError([problem])
    # The result goes to standard output, log lines for people to standard error.
    configure_logging(level="error", console=True, stream=sys.stderr)
    log_settings(settings)
    wanted = AuditFilter(since=options.since, actor=options.actor, action=options.action)
    try:
        # One more than asked for shows whether there are older ones.
        found = asyncio.run(_read(settings, wanted, options.cursor, options.limit + 1))
    except AuditUnavailableError as error:
        raise StartupError(plain(f"DATABASE_URL: {error}")) from None
    events, more = found[: options.limit], len(found) > options.limit
    if options.json:
        cursor = events[-1].id if more else None
        print_json({"items": [event_fields(each) for each in events], "nextCursor": cursor})
        return 0
    header = ("at", "actor", "address", "action", "outcome", "target", "change", "detail")
    print_table([header, *map(_row, events)])
    if not events:
        note("no event matches")
    if more:
        note(f"older events: --cursor {events[-1].id}")
    return 0


async def _read(
    settings: Settings, wanted: AuditFilter, cursor: str | None, limit: int
) -> Sequence[AuditEvent]:
    async with opened_audit_store(settings) as store:
        return await store.read(wanted, before=cursor, limit=limit)


def _row(event: AuditEvent) -> Sequence[str]:
    change = "-"
    if event.after is not None:
        change = event.after if event.before is None else f"{event.before} -> {event.after}"
    return (
        timestamp(event.at),
        event.actor,
        event.address or "-",
        event.action,
        event.outcome,
        event.target,
        change,
        event.detail or "",
    )
