"""Tests of the tracing findings of ``viralfx doctor``."""

import json

import pytest

from viralfx.bootstrap.doctor import review_tracing, unmade
from viralfx.cli import main
from viralfx.core.errors import ConfigurationError
from viralfx.domain.doctor import Area, Verdict
from viralfx.telemetry.tracing import variables

COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://app:hunter2@collector:4318/hunter3?k=hunter4"}


@pytest.mark.parametrize(
    ("environ", "status", "text"),
    [
        ({}, "skip", "OTEL_EXPORTER_OTLP_ENDPOINT is not set: nothing is traced"),
        (
            COLLECTOR,
            "pass",
            "traces go to http://collector:4318 by HTTP: OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
        (
            {
                **COLLECTOR,
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "other:4317",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            },
            "pass",
            "traces go to other:4317 by gRPC: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        ),
        (
            {**COLLECTOR, "OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"},
            "skip",
            "OTEL_SDK_DISABLED=true: nothing is traced, despite OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
        (
            {**COLLECTOR, "OTEL_TRACES_EXPORTER": "none", "OTEL_TRACES_SAMPLER": "loud"},
            "skip",
            "OTEL_TRACES_EXPORTER=none: nothing is traced, despite OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://app:hunter2@one\u2028two/hunter3"},
            "pass",
            "traces go to http://one two by HTTP: OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
    ],
)
def test_doctor_shows_where_traces_go(environ: dict[str, str], status: str, text: str) -> None:
    """The finding shows no part of an address that may be secret."""
    found = review_tracing(environ)

    assert (found.area, found.verdict, found.found) == (Area.TRACING, status, text)


@pytest.mark.parametrize(("more", "code"), [({}, 1), ({"LOG_LEVEL": "loud"}, 2)])
def test_wrong_variables_of_traces_are_found(
    plain_environ: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, str],
    code: int,
) -> None:
    """Doctor reports each problem of the start-up once, even if the settings are invalid."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "htp:/hunter2",
        "OTEL_TRACES_SAMPLER": "loud",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": "/nowhere\n/planted",
    }
    for name, value in {**environ, **more, "PORT": "0"}.items():
        plain_environ.setenv(name, value)
    ended = main(["doctor", "--json"])
    out, _ = capsys.readouterr()
    findings = json.loads(out)["findings"]
    of_traces = {f["found"] for f in findings if "OTEL_" in f["found"]}

    assert ended == code
    assert of_traces == {" ".join(p.splitlines()) for p in variables.problems(environ)}
    assert len(of_traces) == 3
    assert [f["area"] for f in findings if f["status"] == "fail"][-3:] == ["tracing"] * 3
    assert [f["status"] for f in findings if f["area"] == "health endpoints"] == ["skip"]
    assert "hunter2" not in out


def test_problems_that_only_the_sdk_finds_belong_to_tracing() -> None:
    """Other problems of creating the application stay in their area."""
    found = unmade(
        ConfigurationError(["OTEL_*: odd", "READINESS_REQUIRES: no such check"]).details, {}
    )

    assert [(f.area, f.verdict, f.found) for f in found] == [
        (Area.TRACING, Verdict.FAIL, "OTEL_*: odd"),
        (Area.ENDPOINTS, Verdict.FAIL, "READINESS_REQUIRES: no such check"),
    ]
