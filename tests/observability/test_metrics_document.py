"""docs/metrics.md holds every metric that there is, and what the operations guide asks for."""

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
"""The list "Key Metrics to Monitor" of the operations guide, and what answers it."""


def row(metric: Described) -> str:
    """Write one metric as a row of the table."""
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    answers = "; ".join(item for item, names in GUIDE.items() if metric.name in names)
    return f"| `{metric.name}` | {metric.type} | {labels} | {metric.meaning} | {answers} |"


def table(metrics: list[Described]) -> str:
    """Write the table."""
    head = ["| name | type | labels | meaning | in the guide |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, metrics)])


def test_the_table_is_that_of_the_registry() -> None:
    """Every metric of an assembly with everything in it; the right table is shown when not."""
    right = table(described(wired()))

    assert right in DOCUMENT, f"docs/metrics.md should hold this table:\n\n{right}\n"


def test_each_item_of_the_guide_is_answered() -> None:
    """By metrics that exist."""
    names = {metric.name for metric in described(wired())}

    assert len(GUIDE) == 17
    assert {item for item, wanted in GUIDE.items() if not set(wanted) <= names} == set()


def test_names_follow_the_conventions() -> None:
    """Base units, ``_total`` for counters and for nothing else, a prefix or a convention."""
    metrics = described(wired())
    prefixes = re.compile(r"viralfx_|process_|http_server_|db_client_")
    scaled = re.compile(r"_(ms|millis\w*|micros\w*|minutes|kb|mb|kilo\w+|mega\w+|percent)(_|$)")

    assert [m.name for m in metrics if not prefixes.match(m.name)] == []
    assert [m.name for m in metrics if scaled.search(m.name)] == []
    assert [m.name for m in metrics if (m.type == "counter") != m.name.endswith("_total")] == []
    assert [m.name for m in metrics if not m.meaning.endswith(".")] == []
