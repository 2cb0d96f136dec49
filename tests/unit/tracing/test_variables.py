"""The standard variables: when traces are wanted, and what is wrong with a value."""

import os

import pytest

from viralfx.domain.errors import ConfigurationError
from viralfx.telemetry.tracing import start_tracing
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.variables import is_wanted, problems, uses_grpc

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "shop"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318/v1/traces"}, True),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "True"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "false"}, True),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, False),
    ],
)
def test_an_endpoint_turns_them_on(environ: dict[str, str], *, wanted: bool) -> None:
    """And nothing else does; two variables turn them off again."""
    assert is_wanted(environ) is wanted


def test_the_protocol_is_http_unless_said_otherwise() -> None:
    """As the specification has it; the variable of traces goes before the general one."""
    assert not uses_grpc({})
    assert uses_grpc({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert not uses_grpc(
        {
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        }
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "tcp"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:port"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "-1"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/file"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "1.5"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4096"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
    ],
)
def test_a_bad_value_is_a_problem(name: str, value: str) -> None:
    """One line that names the variable."""
    (problem,) = problems({**ENDPOINT, name: value})

    assert problem.startswith(f"{name}: ")


def test_the_share_of_a_ratio_is_looked_at() -> None:
    """It is from 0 to 1; without a ratio it means nothing."""
    bad = {"OTEL_TRACES_SAMPLER_ARG": "2"}

    assert list(problems({**ENDPOINT, **bad})) == []
    (problem,) = problems({**ENDPOINT, **bad, "OTEL_TRACES_SAMPLER": "traceidratio"})
    assert problem.startswith("OTEL_TRACES_SAMPLER_ARG: ")


def test_good_values_are_none() -> None:
    """What the documentation of OpenTelemetry shows."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=key,other=value",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "2.5",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.01",
        "OTEL_BSP_MAX_QUEUE_SIZE": "100",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "50",
    }

    assert list(problems(environ)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_RESOURCE_ATTRIBUTES", "team"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api key"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "few"),
    ],
)
def test_what_the_sdk_complains_of_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Although it would only log a warning, and go on without."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError) as raised:
        make_provider(instance="here", environment="test")
    assert raised.value.problems[0].startswith("OTEL_*: ")


def test_every_problem_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what starts to trace, too."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "sometimes")

    with pytest.raises(ConfigurationError) as raised:
        start_tracing(instance="here", environment="test")
    assert len(raised.value.problems) == 2
    assert "OTEL_SEMCONV_STABILITY_OPT_IN" not in os.environ
