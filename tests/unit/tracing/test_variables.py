"""Tests of the standard ``OTEL_*`` variables: when tracing is on, and which values are invalid."""

import os

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once
from redis.asyncio import Redis

from viralfx.core.errors import ConfigurationError
from viralfx.telemetry.tracing import start_tracing
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.setup import Tracing, trace_asyncpg, trace_redis
from viralfx.telemetry.tracing.variables import is_enabled, problems, uses_grpc

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
def test_an_endpoint_turns_tracing_on(environ: dict[str, str], *, wanted: bool) -> None:
    """Only an endpoint turns tracing on; two variables turn it off again."""
    assert is_enabled(environ) is wanted


def test_the_default_protocol_is_http() -> None:
    """This is the specification's default; the variable of traces overrides the general one."""
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
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization Bearer planted-key"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-key=planted%0Akey"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=good, x key=planted-key"),
        ("OTEL_EXPORTER_OTLP_HEADERS", 'api-key="planted-key"'),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api=planted;1"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "-1"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/file"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "1.5"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4096"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_PYTHON_TRACER_PROVIDER", "not_installed"),
        ("OTEL_SDK_DISABLED", "yes"),
        ("OTEL_EXPORTER_OTLP_INSECURE", "1"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team=a, planted"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1"),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "long"),
    ],
)
def test_an_invalid_value_is_a_problem(name: str, value: str) -> None:
    """The problem is one line that names the variable and shows no secret."""
    (problem,) = problems({**ENDPOINT, name: value})

    assert problem.startswith(f"{name}: ")
    assert "planted" not in problem


def test_grpc_rejects_users_and_some_header_names() -> None:
    """With gRPC the user would become part of the host, and such headers fail every export."""
    grpc = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:planted@localhost:4317",
        "OTEL_EXPORTER_OTLP_HEADERS": "x~key=planted",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "x-key=planted-caf%C3%A9",
    }.items():
        assert list(problems({**ENDPOINT, name: value})) == []
        (problem,) = problems({**ENDPOINT, **grpc, name: value})
        assert problem.startswith(f"{name}: ")
        assert "planted" not in problem


def test_the_sampling_ratio_is_validated() -> None:
    """The ratio is from 0 to 1; samplers without a ratio ignore the variable."""
    bad = {"OTEL_TRACES_SAMPLER_ARG": "2"}

    assert list(problems({**ENDPOINT, **bad})) == []
    (problem,) = problems({**ENDPOINT, **bad, "OTEL_TRACES_SAMPLER": "traceidratio"})
    assert problem.startswith("OTEL_TRACES_SAMPLER_ARG: ")


def test_valid_values_are_no_problems() -> None:
    """The examples in OpenTelemetry's documentation are valid."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=key,other=value",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "2.5",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.01",
        "OTEL_SPAN_EVENT_COUNT_LIMIT": "0",
        "OTEL_SPAN_LINK_COUNT_LIMIT": "",
        "OTEL_RESOURCE_ATTRIBUTES": "team=shop,zone=",
        "OTEL_SDK_DISABLED": "False",
        "OTEL_BSP_MAX_QUEUE_SIZE": "100",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "50",
    }

    assert list(problems(environ)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_RESOURCE_ATTRIBUTES", "team"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "few"),
    ],
)
def test_a_warning_of_the_sdk_fails_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The SDK itself only logs a warning and continues."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError) as raised:
        make_provider(instance="here", environment="test")
    assert raised.value.problems[0].startswith("OTEL_*: ")


def test_a_warning_of_the_sdk_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's message contains the value, which may be secret."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "planted")

    with pytest.raises(ConfigurationError, match=r"\*\*\*") as raised:
        make_provider(
            instance="here", environment="test", clean=lambda text: text.replace("planted", "***")
        )
    assert "planted" not in repr(raised.value.problems)


def test_all_problems_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """``start_tracing`` raises one error with all problems and leaves the variables alone."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "sometimes")

    with pytest.raises(ConfigurationError) as raised:
        start_tracing(instance="here", environment="test")
    assert len(raised.value.problems) == 2
    assert "OTEL_SEMCONV_STABILITY_OPT_IN" not in os.environ


def test_variables_are_restored(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """Empty variables count as unset; afterwards the application sees its own values again."""
    monkeypatch.setenv("OTEL_SPAN_LINK_COUNT_LIMIT", "")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", " ")
    before = dict(os.environ)
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    trace_asyncpg(provider)
    trace_redis(Redis(), provider)
    provider.shutdown()
    AsyncPGInstrumentor().uninstrument()  # type: ignore[no-untyped-call]

    assert dict(os.environ) == before


def test_an_empty_variable_names_no_provider(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """The specification treats it as unset; the library would look for a provider named ''."""
    monkeypatch.setenv("OTEL_PYTHON_TRACER_PROVIDER", "")
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    provider, exporter = make_provider(instance="here", environment="test", exporter=memory)
    Tracing(provider, exporter).make_global()

    assert trace.get_tracer_provider() is provider
    provider.shutdown()
