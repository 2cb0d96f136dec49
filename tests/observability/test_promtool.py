"""What Prometheus's own program says of the metrics, the rules and the configuration."""

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

from viralfx.domain.jobs.ledger import QueueCounts
from viralfx.telemetry.metrics.jobs import QueueMetrics

FOLDER = Path(__file__).parents[2] / "deploy/observability"

# The first test may have to fetch it.
pytestmark = pytest.mark.timeout(600)


def judged(*arguments: str, given: str | None = None) -> str:
    """Run it in the folder; fail with what it says unless it is content."""
    with or_skip():  # where there is neither promtool nor Debian
        program = promtool()
    result = subprocess.run(
        [program, *arguments],
        cwd=FOLDER,
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    return said


def test_the_metrics_follow_prometheuss_conventions() -> None:
    """Everything that can be measured, with something in it: no complaint."""
    assembly = wired()
    assembly.metrics.requests.observe("GET", "/", 200, 0.1)
    said = judged("check", "metrics", given=assembly.metrics.render("")[0].decode())

    assert said.strip() == ""


def test_a_bad_name_is_complained_about() -> None:
    """The check above looks."""
    registry = CollectorRegistry()
    registry.register(QueueMetrics(lambda: {"default": QueueCounts()}))
    bad = "# HELP requests_ms Requests.\n# TYPE requests_ms counter\nrequests_ms 1\n"

    with pytest.raises(AssertionError, match="requests_ms"):
        judged("check", "metrics", given=bad)


def test_the_configuration_and_the_rules_are_accepted() -> None:
    """The files as they are deployed, by the names that they call each other."""
    said = judged("check", "config", "prometheus.yml")

    assert "SUCCESS: prometheus.yml is valid prometheus config file syntax" in said
    assert "SUCCESS: 24 rules found" in said


def test_the_rules_do_what_their_tests_say() -> None:
    """Each alert fires for what it is about, with these words, and for nothing else."""
    assert "SUCCESS" in judged("test", "rules", "rules_test.yml")


def test_the_dashboards_expressions_are_valid(tmp_path: Path) -> None:
    """Every one of them, as Prometheus reads it."""
    expressions = [target.query(scraped=15) for target in targets()]
    records = [{"record": f"panel:{n}", "expr": e} for n, e in enumerate(expressions)]
    rules = tmp_path / "panels.yml"
    rules.write_text(json.dumps({"groups": [{"name": "panels", "rules": records}]}))

    assert f"SUCCESS: {len(records)} rules found" in judged("check", "rules", str(rules))
    assert len(records) > 40


def test_what_a_running_service_tells_follows_them_too() -> None:
    """As it is scraped, with requests and jobs in it."""
    with running() as service:
        service.wait_ready()
        service.get("/api/v1/jobs")
        service.get("/nothing")
        job = {"task": "analytics.rollup_health", "payload": None}
        assert service.get("/api/v1/jobs", method="POST", json_body=job).status == 202
        said = judged("check", "metrics", given=service.get("/metrics").body.decode())

    assert said.strip() == ""
