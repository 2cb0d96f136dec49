"""The texts of errors without what they quote: rows of Postgres, arguments of commands."""

import re
import sys

_REST = (
    r"(?=\n[ |]*\n[ |]*(?:The above exception was|During handling of the above)"
    r"|\n[ |]*(?:\+-)?\+-{16}(?: (?:\d+|\.\.\.) -{16}|-{20})(?:\n|\Z)|\Z)"
)
"""What follows an error's text in a traceback: another one, a member of a group, or nothing."""
_END = re.compile(_REST)
_DETAIL = re.compile(rf"((?:\b|(?<=\\n))DETAIL:).*?{_REST}", re.DOTALL)
"""Where an error is shown as Python writes it, the line before ends with ``\\n``."""
_SAID = re.compile(
    # What the driver itself says of its connections holds no values.
    rf"^([ |]*asyncpg\.exceptions\.(?!_base\.InterfaceError:)[\w.]+): .*?{_REST}",
    re.DOTALL | re.MULTILINE,
)
_QUOTED = re.compile(
    rf"(<class 'asyncpg\.exceptions\.[\w.]+'>:|\[(?:SQL|parameters):) .*?{_REST}", re.DOTALL
)
"""How SQLAlchemy tells of what the driver raised, and what of."""
_SHOWN = re.compile(r"\b(\w+Error)\((?=['\"])")
_INVALID = re.compile(
    rf"(invalid input (?:syntax|value|for query argument)[^:\n]{{0,200}}:).*?{_REST}", re.DOTALL
)
"""What Postgres and its driver say of a value, where others tell of it in words of their own."""
_IN_PIPELINE = re.compile(
    r"(Command # \d+ \(\S+) .{0,500}?(\) of pipeline caused error)", re.DOTALL
)
_UNKNOWN_COMMAND = re.compile(r"(, with args beginning with:).*")


def is_said_by_postgres(kind: str) -> bool:
    """Tell whether an error, called with its module, is one whose text quotes values.

    It may be about them, as the one of a key that exists, or be a procedure's own words.
    """
    module, _, name = kind.rpartition(".")
    return module.partition(".")[0] == "asyncpg" and _quotes(name)


def without_values(text: str) -> str:
    """Return the text of an error, or of a traceback, without the values in it."""
    text = _SAID.sub(r"\1", text)
    text = _QUOTED.sub(r"\1 ...", text)
    text = _without_shown(text)
    text = _DETAIL.sub(r"\1 ...", text)
    text = _INVALID.sub(r"\1 ...", text)
    text = _IN_PIPELINE.sub(r"\1 ...\2", text)
    return _UNKNOWN_COMMAND.sub(r"\1 ...", text)


def description_without_values(description: str, kind: str | None = None) -> str:
    """Return the description of a status: that of an exception begins with what it is called.

    ``kind`` is that of the exception, called with its module, if the span tells of one.
    """
    name = description.partition(":")[0]
    known = kind is not None and kind.rpartition(".")[2] == name
    if is_said_by_postgres(str(kind)) if known else _quotes(name):
        return name
    return without_values(description)


def _without_shown(text: str) -> str:
    """Return a text in which no error of Postgres is shown as Python writes one."""
    kept, at = [], 0
    for found in _SHOWN.finditer(text):
        if found.start() >= at and _quotes(found[1]):
            kept.append(text[at : found.end()] + "...")
            end = _END.search(text, found.end())
            at = end.start() if end is not None else len(text)
    return "".join([*kept, text[at:]])


def _quotes(name: str) -> bool:
    exceptions = sys.modules.get("asyncpg.exceptions")
    return name.endswith("Error") and name != "InterfaceError" and hasattr(exceptions, name)
