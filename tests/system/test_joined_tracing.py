"""Traces of an application that has a tracer provider of its own."""

import json
import subprocess
import sys
from typing import Any

import pytest
from tests.system.service import ROOT, clean_environment

SPANS = {
    "nothing": "GET /orders",
    "plugin": "GET /orders",
    "middleware": "GET /orders",
    "around": "around",
}
"""The name of the server's span, by what else makes spans."""


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """Return the spans of the applications, which follow each other in one process."""
    environment = {**clean_environment(), "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.system.joined_app", *SPANS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("also", SPANS)
def test_a_request_has_one_span_in_the_pipeline_of_the_application(
    printed: dict[str, Any], also: str
) -> None:
    """Its jobs are in the same trace, and the provider is not shut down, also with an endpoint."""
    found = printed[also]
    served = [span for span in found["spans"] if span["kind"] == "SERVER"]
    jobs = [span for span in found["spans"] if span["kind"] in {"PRODUCER", "CONSUMER"}]

    assert [span["name"] for span in served] == [SPANS[also]]
    assert [span["name"] for span in jobs] == ["send default", "process default"]
    assert {span["trace"] for span in jobs} == {served[0]["trace"]}
    assert found["alive"]
