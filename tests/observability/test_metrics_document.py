"""Tests of docs/metrics.md: it lists every metric and the items of docs/operations.md."""

import re
from pathlib import Path

from tests.observability.wired import Described, described, wired

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")

GUIDE = {
    "Database: connection pool usage": (
        "viralfx_database_pool_connections",
        "viralfx_database_pool_connections_max",
        "viralfx_database_pool_waiting_requests",
    ),
    "Database: query execution time": ("db_client_operation_duration_seconds",),
    "Database: slow query count": ("viralfx_database_slow_queries_total",),
    "Database: connection failures": ("viralfx_database_connection_failures_total",),
    "Redis: connection status": ("viralfx_redis_connected",),
    "Redis: request/response times": ("db_client_operation_duration_seconds",),
    "Redis: memory usage": ("viralfx_redis_memory_used_bytes", "viralfx_redis_memory_limit_bytes"),
    "Redis: failed operations": (
        "viralfx_redis_failed_requests_total",
        "viralfx_db_client_errors_total",
    ),
    "Application: request rate": ("http_server_request_duration_seconds",),
    "Application: response times": ("http_server_request_duration_seconds",),
    "Application: error rate": ("http_server_request_duration_seconds",),
    "Application: memory usage": (
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
    ),
    "Application: CPU usage": ("process_cpu_seconds_total",),
    "Queues: waiting jobs": ("viralfx_queue_jobs",),
    "Queues: active jobs": ("viralfx_queue_jobs",),
    "Queues: completed jobs": ("viralfx_queue_finished_jobs_total",),
    "Queues: failed jobs": ("viralfx_queue_finished_jobs_total",),
}
"""The items of "Key metrics to monitor" in docs/operations.md, and the metrics that answer them."""


def row(metric: Described) -> str:
    """Return one metric as a row of the table."""
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    responses = "; ".join(item for item, names in GUIDE.items() if metric.name in names)
    return f"| `{metric.name}` | {metric.type} | {labels} | {metric.meaning} | {responses} |"


def table(metrics: list[Described]) -> str:
    """Return the table."""
    head = ["| name | type | labels | meaning | in the guide |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, metrics)])


def test_the_table_matches_the_registry() -> None:
    """The registry is that of an assembly with all parts; a failure shows the right table."""
    right = table(described(wired()))

    assert right in DOCUMENT, f"docs/metrics.md should hold this table:\n\n{right}\n"


def test_each_item_of_the_guide_has_existing_metrics() -> None:
    """The guide lists seventeen items."""
    names = {metric.name for metric in described(wired())}

    assert len(GUIDE) == 17
    assert {item for item, wanted in GUIDE.items() if not set(wanted) <= names} == set()


def test_the_operations_guide_has_the_same_items() -> None:
    """Groups and items have the same order."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    section = text.partition("\n## Key metrics to monitor\n")[2].partition("\n## ")[0]
    groups = re.findall(r"^\| (\w+) \| (.*) \|$", section, re.MULTILINE)[1:]

    assert [f"{group}: {item}" for group, items in groups for item in items.split("; ")] == list(
        GUIDE
    )


def test_names_follow_the_conventions() -> None:
    """Names have base units, ``_total`` only for counters, and a known prefix."""
    metrics = described(wired())
    prefixes = re.compile(r"viralfx_|process_|http_server_|db_client_")
    scaled = re.compile(r"_(ms|millis\w*|micros\w*|minutes|kb|mb|kilo\w+|mega\w+|percent)(_|$)")

    assert [m.name for m in metrics if not prefixes.match(m.name)] == []
    assert [m.name for m in metrics if scaled.search(m.name)] == []
    assert [m.name for m in metrics if (m.type == "counter") != m.name.endswith("_total")] == []
    assert [m.name for m in metrics if not m.meaning.endswith(".")] == []
