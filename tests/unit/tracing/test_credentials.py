"""Tests of which parts of the ``OTEL_*`` variables count as secrets."""

import pytest

from viralfx.settings import read_settings
from viralfx.telemetry.logging.redaction import Redaction, secrets_of
from viralfx.telemetry.tracing.variables import secrets


def test_keys_and_passwords_of_exporters_are_secrets() -> None:
    """This holds for the exporters of traces, logs and metrics."""
    environ = {
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20short",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "x-ingest=0123456789abcdef%3D, apikey=abcd",
        "OTEL_EXPORTER_OTLP_LOGS_HEADERS": "x-tenant-token=fedcba9876543210",
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "https://user:p%40ss@host/v1/logs",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "https://host/v1?zone=north&api_key=ab%2Bcd#part",
        "OTEL_RESOURCE_ATTRIBUTES": "token=none",
    }

    found = set(secrets(environ))
    assert found == {
        *("Bearer%20short", "Bearer short", "short"),
        *("0123456789abcdef%3D", "0123456789abcdef=", "abcd", "fedcba9876543210"),
        *("user:p%40ss", "user:p@ss", "p%40ss", "p@ss"),
        *("ab%2Bcd", "ab+cd"),
    }


@pytest.mark.parametrize(
    "name",
    [
        *(
            "api-key",
            "apikey",
            "x-accesskey",
            "licensekey",
            "apisecret",
            "authtoken",
            "accessToken",
        ),
        *("x-authentication", "Passphrase", "X-JWT", "authorization", "db_password"),
    ],
)
def test_a_name_can_mark_its_value_as_secret(name: str) -> None:
    """Any spelling of the name marks a value of any length."""
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": f"{name}=hunter2"}
    query = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"https://host/v1?{name}=hunter2"}
    for environ in (headers, query):
        assert set(secrets(environ)) == {"hunter2"}


@pytest.mark.parametrize(
    "header",
    [
        *("x-scope-orgid=default", "x-team=payments", "x-zone=north", "x-passage=open"),
        *("content-type=application/x-protobuf", "user-agent=OTel-OTLP-Exporter-Python/1.39"),
        *("x-honeycomb-dataset=shop-in-production", "x-secret-name=production"),
    ],
)
def test_ordinary_words_are_no_secrets(header: str) -> None:
    """Redaction would mask them wherever they occur in a log line."""
    assert list(secrets({"OTEL_EXPORTER_OTLP_HEADERS": header})) == []


def test_exporter_secrets_are_redacted_in_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries log how they send telemetry, too."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=planted")

    assert Redaction(secrets_of(read_settings({}))).text("key=planted") == "key=***"
