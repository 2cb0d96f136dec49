"""The examples of docs/jobs.md, for tests that run them as they are shown."""

import asyncio
import json
import logging
import subprocess
import sys
from time import monotonic
from typing import Any, TypedDict

from tests.architecture.claims import ROOT, blocks

import viralfx

GUIDE = (ROOT / "docs/jobs.md").read_text(encoding="utf-8")

_IMPORTED: dict[str, object] = {
    **{name: getattr(viralfx, name) for name in viralfx.__all__},
    "Any": Any,
    "TypedDict": TypedDict,
    "asyncio": asyncio,
    "json": json,
    "logger": logging.getLogger(__name__),
    "monotonic": monotonic,
    "subprocess": subprocess,
    "sys": sys,
}
"""The names that an application has imported before an example."""


def section(heading: str) -> str:
    """Return the text below a heading, up to the next one."""
    found = GUIDE.partition(f"\n{heading}\n")[2]
    assert found, heading
    return found.partition("\n#")[0]


def shown(*headings: str, **others: object) -> dict[str, Any]:
    """Return the names that the Python blocks below some headings define together.

    ``others`` are further names that they may use.
    """
    names: dict[str, Any] = {"__name__": __name__, **_IMPORTED, **others}
    for heading in headings:
        for block in blocks(section(heading), "python"):
            exec(block, names)  # noqa: S102 - the text of this repository
    return names
