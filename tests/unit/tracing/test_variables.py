"""The standard variables: when traces are wanted, and what is wrong with a value."""

import os

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once
from redis.asyncio import Redis

from viralfx.domain.errors import ConfigurationError
from viralfx.telemetry.tracing import start_tracing
from viralfx.telemetry.tracing.databases import trace_asyncpg, trace_redis
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.variables import is_wanted, problems, uses_grpc
from viralfx.telemetry.tracing.wiring import Tracing

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
        ("OTEL_PYTHON_TRACER_PROVIDER", "nobody_s"),
        ("OTEL_SDK_DISABLED", "yes"),
        ("OTEL_EXPORTER_OTLP_INSECURE", "1"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team=a, planted"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1"),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "long"),
    ],
)
def test_a_bad_value_is_a_problem(name: str, value: str) -> None:
    """One line that names the variable."""
    (problem,) = problems({**ENDPOINT, name: value})

    assert problem.startswith(f"{name}: ")
    assert "planted" not in problem


def test_grpc_tells_no_user_and_fewer_names() -> None:
    """It would take the user for a part of the host, and each export would fail at the header."""
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
def test_what_the_sdk_complains_of_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Although it would only log a warning, and go on without."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError) as raised:
        make_provider(instance="here", environment="test")
    assert raised.value.problems[0].startswith("OTEL_*: ")


def test_what_the_sdk_complains_of_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the value."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "planted")

    with pytest.raises(ConfigurationError, match=r"\*\*\*") as raised:
        make_provider(
            instance="here", environment="test", clean=lambda text: text.replace("planted", "***")
        )
    assert "planted" not in repr(raised.value.problems)


def test_every_problem_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what starts to trace, too."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "sometimes")

    with pytest.raises(ConfigurationError) as raised:
        start_tracing(instance="here", environment="test")
    assert len(raised.value.problems) == 2
    assert "OTEL_SEMCONV_STABILITY_OPT_IN" not in os.environ


def test_variables_are_as_they_were(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """Empty ones are as good as none; they are the application's, and its children's."""
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
    """By the specification; the library looks for one of that name, and finds none."""
    monkeypatch.setenv("OTEL_PYTHON_TRACER_PROVIDER", "")
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    tracing = Tracing(*make_provider(instance="here", environment="test", exporter=memory))
    tracing.make_global()

    assert trace.get_tracer_provider() is tracing.provider
    tracing.provider.shutdown()
