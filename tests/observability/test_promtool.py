"""Checks of metrics, rules and configuration by Prometheus's own promtool."""

import json
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.observability.dashboards import targets
from tests.observability.wired import wired
from tests.servers.debian import promtool
from tests.servers.fixtures import or_skip
from tests.system.service import running

from viralfx.jobs.ledger import QueueCounts
from viralfx.telemetry.metrics.jobs import QueueMetrics

FOLDER = Path(__file__).parents[2] / "deploy/observability"

# The first test may download promtool.
pytestmark = pytest.mark.timeout(600)


def judged(*arguments: str, given: str | None = None) -> str:
    """Run promtool in the folder; fail with its output unless it succeeds."""
    with or_skip():  # without promtool and without Debian
        program = promtool()
    result = subprocess.run(
        [program, *arguments],
        cwd=FOLDER,
        input=given,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


def test_the_metrics_follow_prometheuss_conventions() -> None:
    """All metrics, with samples, pass promtool's linter."""
    assembly = wired()
    assembly.metrics.requests.observe("GET", "/", 200, 0.1)
    output = judged("check", "metrics", given=assembly.metrics.render("")[0].decode())

    assert output.strip() == ""


def test_a_bad_name_is_reported() -> None:
    """The check above detects violations."""
    registry = CollectorRegistry()
    registry.register(QueueMetrics(lambda: {"default": QueueCounts()}))
    bad = "# HELP requests_ms Requests.\n# TYPE requests_ms counter\nrequests_ms 1\n"

    with pytest.raises(AssertionError, match="requests_ms"):
        judged("check", "metrics", given=bad)


def test_the_configuration_and_the_rules_are_accepted() -> None:
    """The files are checked under the names with which they refer to each other."""
    output = judged("check", "config", "prometheus.yml")

    assert "SUCCESS: prometheus.yml is valid prometheus config file syntax" in output
    assert "SUCCESS: 28 rules found" in output


@pytest.mark.parametrize("tests", ["rules_test.yml", "rules_day_test.yml"])
def test_the_rules_pass_their_unit_tests(tests: str) -> None:
    """Each alert fires for its condition only, with the expected text."""
    assert "SUCCESS" in judged("test", "rules", tests)


def test_the_dashboards_expressions_are_valid(tmp_path: Path) -> None:
    """Prometheus parses every one of them."""
    expressions = [target.query(scraped=15) for target in targets()]
    records = [{"record": f"panel:{n}", "expr": e} for n, e in enumerate(expressions)]
    rules = tmp_path / "panels.yml"
    rules.write_text(json.dumps({"groups": [{"name": "panels", "rules": records}]}))

    assert f"SUCCESS: {len(records)} rules found" in judged("check", "rules", str(rules))
    assert len(records) > 40


def test_metrics_of_a_running_service_follow_the_conventions() -> None:
    """The service has handled requests and jobs."""
    with running() as service:
        service.wait_ready()
        service.get("/api/v1/jobs")
        service.get("/nothing")
        run = "/api/v1/schedules/analytics.rollup_health/run"
        assert service.get(run, method="POST").status == 202
        output = judged("check", "metrics", given=service.get("/metrics").body.decode())

    assert output.strip() == ""
