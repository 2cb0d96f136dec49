"""Keeps the driver from telling again and again that it cannot refill a pool of ours."""

import logging
from types import TracebackType

_OURS = "viralfx.adapters.postgres.database"


def quiet_refilling() -> None:
    """Leave out the driver's warnings about this; doing it twice is harmless.

    It tries for as long as the database is away. That it is away is the check's to say, once.
    """
    logging.getLogger("asyncpg.pool").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    # An application may have pools beside ours, and its own idea of what is worth a warning.
    told = record.msg == "Failed to restore the pool connection floor; retrying"
    return not (told and record.exc_info and _passes_ours(record.exc_info[2]))


def _passes_ours(traceback: TracebackType | None) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") == _OURS:
            return True
        traceback = traceback.tb_next
    return False
