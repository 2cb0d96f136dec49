"""The dashboard as Grafana reads it: its queries with the variables filled in."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "deploy/observability/dashboard.json"


@dataclass(frozen=True)
class Target:
    """One query of a panel."""

    panel: str
    row: str
    expression: str
    legend: str

    def __str__(self) -> str:
        return f"{self.row} / {self.panel} / {self.legend}"

    def query(self, *, scraped: float) -> str:
        """Return the query for all values, with a scrape interval of ``scraped`` seconds."""
        # Grafana's minimum for this interval, for any time range.
        values = {"job": ".*", "instance": ".*", "__rate_interval": f"{4 * scraped:g}s"}
        return re.sub(r"\$(\w+)", lambda match: values[match[1]], self.expression)

    def name(self, labels: Mapping[str, str]) -> str:
        """Return the legend of a series; raises ``KeyError`` for a missing label."""
        return re.sub(r"\{\{(\w+)\}\}", lambda match: labels[match[1]], self.legend)


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def targets() -> list[Target]:
    """Return all queries of all panels."""
    found: list[Target] = []
    row = ""
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        found += [
            Target(panel["title"], row, target["expr"], target["legendFormat"])
            for target in panel.get("targets", ())
        ]
    return found
