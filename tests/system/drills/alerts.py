"""The alerts of deploy/observability/rules.yml that fire for a scrape, by promtool."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tests.servers.debian import promtool
from tests.system.service import ROOT

RULES = ROOT / "deploy/observability/rules.yml"
_MINUTES = 30
"""The simulated duration: longer than the wait and the window of any alert."""
_BEGIN = "process_start_time_seconds"
_GROWING = ("_total", "_bucket", "_count", "_sum")


def firing(before: str, now: str, *, job: str = "viralfx-backend") -> set[str]:
    """Return the alerts that fire if the current state continues.

    ``before`` and ``now`` are two scrapes of one process. A gauge keeps its value of ``now``; a
    counter grows each minute by its growth between the scrapes. Raises ``UnavailableError``
    without promtool.
    """
    labels = {"job": job, "instance": "drilled"}
    old = _samples(before)
    series = [{"series": f"up{_text(labels)}", "values": f"1x{_MINUTES}"}]
    for (name, pairs), value in _samples(now).items():
        grown = value - old.get((name, pairs), 0.0) if name.endswith(_GROWING) else 0.0
        series.append(
            {
                "series": name + _text({**dict(pairs), **labels}),
                # The test's time begins at 0, and the process runs by then.
                "values": f"{0.0 if name == _BEGIN else value!r}+{grown!r}x{_MINUTES}",
            }
        )
    asked = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": f"{_MINUTES}m",
        "exp_samples": [{"labels": '{alertname="none"}', "value": 1}],
    }
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}
    tests = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "drill.yml")
        path.write_text(json.dumps(tests), encoding="utf-8")
        done = subprocess.run(
            [promtool(), "test", "rules", str(path)],
            # A quarter of its processor time would go into collecting garbage.
            env={**os.environ, "GOGC": "400"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    # The expectation is impossible, so promtool prints the actual alerts.
    said = done.stdout + done.stderr
    assert "got:" in said, said
    return set(re.findall(r'alertname=\\?"(\w+)', said.partition("got:")[2]))


def _samples(scrape: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(scrape)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def _text(labels: dict[str, str]) -> str:
    return "{" + ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items()) + "}"
