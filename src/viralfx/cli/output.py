"""The output of commands, tables and JSON that cannot control a terminal, and their questions."""

import re
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from viralfx.core.clock import timestamp
from viralfx.jobs.model import Job

_MIN_WIDTH = 40


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells below each other; in a terminal a line is cut at its width."""
    cleaned = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cleaned) for column in range(len(cleaned[0]) - 1)]
    limit = None
    if sys.stdout is not None and sys.stdout.isatty():
        limit = max(_MIN_WIDTH, shutil.get_terminal_size().columns)
    for row in cleaned:
        cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        line = "  ".join(cells).rstrip()
        print(line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…")


def print_jobs(jobs: Sequence[Job]) -> None:
    """Print a table of jobs."""
    header = ("id", "task", "queue", "state", "attempts", "run at", "error")
    print_table([header, *map(_row, jobs)])


def _row(job: Job) -> Sequence[str]:
    error = "" if job.error is None else f"{job.error.code}: {job.error.message}"
    return (
        job.id,
        job.task,
        job.queue,
        str(job.state),
        str(job.attempts_made),
        timestamp(job.run_at),
        error,
    )


def print_changed(jobs: Sequence[Job]) -> None:
    """Print jobs that a command has changed, one a line."""
    for job in jobs:
        requested = ", cancellation requested" if job.cancel_requested else ""
        print(f"{job.id}  {job.state}{requested}")


def print_json(value: object) -> None:
    """Print a value as JSON in ASCII, with indentation unless it is too deep for that."""
    document = msgspec.json.encode(value)
    with suppress(RecursionError):  # SQL accepts payloads that are deeper than those of Python
        document = msgspec.json.format(document, indent=2)
    # Every other character is in a string, where an escape means the same.
    print(_NOT_PRINTABLE_ASCII.sub(_escape_in_json, document.decode()))


_NOT_PRINTABLE_ASCII = re.compile(r"[^\x20-\x7e\n]")


def _escape_in_json(found: re.Match[str]) -> str:
    units = found.group().encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def readable(document: bytes) -> str:
    """Return JSON as text; bytes that are no UTF-8 are escaped."""
    return document.decode("utf-8", "backslashreplace")


def plain(text: str) -> str:
    """Return a text in one line that cannot control a terminal."""
    # Without standard output what is printed is lost.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    visible = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
    return visible.encode(encoding, "backslashreplace").decode(encoding)


def hint_of(payload: bytes) -> str:
    """Return how to write a payload that is no JSON; nothing for one that is."""
    try:
        msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return """; the payload is JSON, such as '{"name": "Ada"}', '"Ada"' or null"""
    except RecursionError:  # it is JSON as far as Python reads it
        pass
    return ""


def agrees(question: str) -> bool:
    """Ask an operator; return True for a yes. Call it in the main thread."""
    # An event loop handles the signal by the end of its task, which waits for the answer.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in {"y", "yes"}
    except (OSError, UnicodeDecodeError):  # the terminal was closed, or the answer is no text
        return False
    finally:
        signal.signal(signal.SIGINT, handler)
