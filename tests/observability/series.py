"""The files of deploy/observability, and the series that their queries may use."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tests.observability.promql import asked
from tests.observability.wired import described, wired

FOLDER = Path(__file__).parents[2] / "deploy/observability"
SCRAPED = {"job", "instance", "namespace"}
"""Labels that a scrape adds; the last one in a cluster."""
OF_PROMETHEUS = {"up"}
"""Series that a scrape adds."""


def load(name: str) -> Any:
    """Read one of the files."""
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@cache
def known() -> dict[str, frozenset[str]]:
    """Return the labels of each series that the program exports or a scrape adds."""
    found = {name: metric.series_labels for metric in described(wired()) for name in metric.series}
    return found | dict.fromkeys(OF_PROMETHEUS, frozenset[str]())


def unknown(expression: str) -> list[str]:
    """Return the series and labels of an expression that do not exist."""
    query = asked(expression)
    found = [name for name in query.series if name not in known()]
    available = SCRAPED.union(*(known().get(name, frozenset()) for name in query.series))
    for name, labels in query.series.items():
        more = labels - known().get(name, frozenset()) - SCRAPED
        found += sorted(f"{name}{{{each}}}" for each in more)
    return found + sorted(query.grouped - available)
