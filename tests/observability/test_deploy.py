"""Tests of deploy/observability: queries use existing series, and alerts have a runbook entry."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample
from tests.observability.dashboards import dashboard
from tests.observability.promql import asked
from tests.observability.series import FOLDER, SCRAPED, load, unknown
from tests.observability.wired import described, wired

from viralfx.telemetry.metrics.requests import RequestMetrics

ROOT = Path(__file__).parents[2]
METRICS = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
RUNBOOK = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")


def rules() -> list[dict[str, Any]]:
    """Return the alert rules."""
    return [rule for group in load("rules.yml")["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Return the panels of the dashboard that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield all queries with their place."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    yield from re.findall(r"^\| ([^|]+) \| `([^`]+\(.+)` \|$", METRICS, re.MULTILINE)


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_queries_use_existing_series_and_labels(where: str, expression: str) -> None:
    """This holds for alerts, the dashboard and docs/metrics.md."""
    assert asked(expression).series, where
    assert unknown(expression) == []


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("sum(rate(viralfx_nothing_total[5m]))", ["viralfx_nothing_total"]),
        ('viralfx_ready{colour="red"} == 0', ["viralfx_ready{colour}"]),
        ("max by (colour) (viralfx_ready)", ["colour"]),
        ('viralfx_check_status{check="a and b", status!~"x|y"} > 0 and viralfx_ready', []),
        ("http_server_request_duration_seconds > 1", ["http_server_request_duration_seconds"]),
    ],
)
def test_unknown_series_and_labels_are_detected(expression: str, found: list[str]) -> None:
    """The rule above detects wrong queries."""
    assert unknown(expression) == found


def test_legends_use_labels_of_the_result() -> None:
    """A label that was aggregated away would be empty."""
    for panel in panels():
        for target in panel["targets"]:
            query = asked(target["expr"])
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            left = query.grouped if " by (" in target["expr"] else SCRAPED
            assert named <= left, (panel["title"], target["legendFormat"])


def test_the_dashboard_shows_every_metric() -> None:
    """The listed exceptions duplicate information of other metrics, or are for alerts."""
    shown = {
        name for panel in panels() for t in panel["targets"] for name in asked(t["expr"]).series
    }
    unseen = {m.name for m in described(wired()) if not m.series & shown}

    assert unseen == {
        "process_max_fds",
        "process_start_time_seconds",
        "process_virtual_memory_bytes",
        "viralfx_audit_events_lost_total",
        "viralfx_audit_events_total",
        "viralfx_check_age_seconds",
        "viralfx_check_attempts_total",
        "viralfx_check_transitions_total",
        "viralfx_circuit_changes_total",
        "viralfx_event_streams_total",
        "viralfx_http_connections_max",
        "viralfx_job_attempts",
        "viralfx_log_lines_lost_total",  # the log says so
        "viralfx_job_progress_ratio",  # of few tasks; each job shows its own
        "viralfx_queue_consumers_blocked",  # the check queues warns of it
        "viralfx_queue_paused",  # the check queues names it, and it silences alerts
        "viralfx_retry_delay_seconds",
        "viralfx_spans_lost_total",  # the log says so
        "viralfx_webhook_circuit_changes_total",
        "viralfx_websocket_received_bytes_total",  # few applications have WebSockets
        "viralfx_websocket_sent_bytes_total",
        "viralfx_websockets_total",
    }


def test_panels_do_not_overlap() -> None:
    """Each panel has an id and its own place on a grid of 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_has_severity_summary_and_procedure(rule: dict[str, Any]) -> None:
    """The runbook's heading has symptom, commands and remedy."""
    document, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    sections = {part.split("\n", 1)[0].lower(): part for part in RUNBOOK.split("\n## ")[1:]}

    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"]
    assert document == "docs/runbook.md"
    assert anchor == rule["alert"].lower()
    wanted = r"\*\*Symptom:\*\*.*```bash\n.*(curl|kubectl).*```.*\*\*Remedy:\*\*"
    assert re.search(wanted, sections[anchor], re.DOTALL)


GUIDE = "From a correlation id to the job, and back"
"""The only heading of the runbook without an alert: procedures refer to it."""


def test_the_runbook_has_no_heading_without_an_alert() -> None:
    """Each heading exists once."""
    headings = re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE)

    assert sorted(headings) == sorted([GUIDE, *(rule["alert"] for rule in rules())])


def test_every_alert_has_positive_and_negative_tests() -> None:
    """At some time only some of the series make it fire."""
    fired = {
        check["alertname"]
        for test in load("rules_test.yml")["tests"]
        for check in test.get("alert_rule_test", ())
        if check["exp_alerts"] and len(test["input_series"]) > len(check["exp_alerts"])
    }

    assert fired == {rule["alert"] for rule in rules()}


def test_the_scrape_configuration_follows_the_guide() -> None:
    """Job, path, interval and target are those of docs/operations.md; workers are added."""
    jobs = {job["job_name"]: job for job in load("prometheus.yml")["scrape_configs"]}

    assert jobs["viralfx-backend"] == {
        "job_name": "viralfx-backend",
        "metrics_path": "/metrics",
        "scrape_interval": "15s",
        "static_configs": [{"targets": ["backend:3000"]}],
    }
    [workers] = jobs["viralfx-worker"]["dns_sd_configs"]
    assert workers == {"names": ["worker"], "type": "A", "port": 3001}


def test_links_from_exemplars_to_traces_can_be_activated() -> None:
    """No trace storage is included; the prepared lines match the exemplars."""
    text = (FOLDER / "grafana/datasources.yml").read_text(encoding="utf-8")
    (only,) = yaml.safe_load(text)["datasources"]
    metrics, traces = yaml.safe_load(re.sub("(?m)^( +)# ", r"\1", text))["datasources"]
    (exemplar,) = [sample.exemplar for sample in traced_request() if sample.exemplar]
    (leads,) = metrics.pop("jsonData")["exemplarTraceIdDestinations"]

    assert metrics == only
    assert leads["name"] in exemplar.labels
    assert leads["datasourceUid"] == traces["uid"]


def traced_request() -> Iterator[Sample]:
    """Yield the samples of one traced request."""
    registry = CollectorRegistry()
    RequestMetrics(registry).observe("GET", "/", 200, 0.1, ("a" * 32, "b" * 16))
    for family in registry.collect():
        yield from family.samples


def test_the_collector_accepts_both_transports() -> None:
    """Every part of the pipeline is configured, and every configured part is used."""
    collector = load("otel-collector.yml")
    pipelines = collector["service"]["pipelines"]
    traces = pipelines["traces"]

    assert set(pipelines) == {"traces"}
    assert set(collector["receivers"]["otlp"]["protocols"]) == {"grpc", "http"}
    for part in ("receivers", "processors", "exporters"):
        assert set(traces[part]) == set(collector[part])
    assert traces["processors"][0] == "memory_limiter"
