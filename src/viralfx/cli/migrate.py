"""``viralfx migrate``: applies the database's migrations, or says which are missing."""

import asyncio
import logging
import os
import sys

from viralfx.bootstrap.migration import migrate_schema, schema_state
from viralfx.settings import read_settings
from viralfx.telemetry.logs import configure_logging

EXIT_PENDING = 1


def migrate(*, check: bool) -> int:
    """Apply what is pending; with ``check`` only look. Returns the exit code.

    Raises :class:`ConfigurationError` and :class:`StartupError`.
    """
    settings = read_settings(os.environ)
    # Answers go to standard output; what is logged on the way is for people, beside them.
    configure_logging(level="warn", console=True, stream=sys.stderr)
    logging.getLogger("viralfx.database").addFilter(_is_more_than_the_last_line)
    state = asyncio.run(schema_state(settings) if check else migrate_schema(settings))
    for revision, meaning in state.applied:
        print(f"applied {revision}: {meaning}")
    if state.newer:
        print(f"{state.address} is at {state.revision}, which a later version made; it is usable")
    elif state.pending:
        print(
            f"{state.address} is behind: {', '.join(state.pending)} pending; run `viralfx migrate`",
            file=sys.stderr,
        )
        return EXIT_PENDING
    else:
        print(f"{state.address} is current at {state.revision}")
    return 0


def _is_more_than_the_last_line(record: logging.LogRecord) -> bool:
    # That and why attempts to connect failed is what the last line says; it has no traceback.
    return bool(record.exc_info)
