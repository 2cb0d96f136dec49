"""Redaction: no secret in a line, in whatever form it came, and JSON stays JSON."""

import io
import json
import logging
import time
import urllib.parse
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from viralfx.settings import read_settings
from viralfx.telemetry.logs import configure_logging
from viralfx.telemetry.redaction import Redaction, secrets_of

PASSWORD = 'pl4nted"pass\\word/ü?'
TOKEN = "planted-management-token"
WHSEC = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

FORMS = {
    "itself": PASSWORD,
    "Python": repr(PASSWORD)[1:-1],
    "JSON": json.dumps(PASSWORD),
    "JSON in JSON": json.dumps(json.dumps({"password": PASSWORD})),
    "URL": urllib.parse.quote(PASSWORD, safe=""),
    "URL with slashes": urllib.parse.quote(PASSWORD),
    "form": urllib.parse.quote_plus(PASSWORD),
    "address": f"postgresql://app:{urllib.parse.quote(PASSWORD, safe='')}@db/main",
}


def logged(message: str, *secrets: str, console: bool = False, **extra: Any) -> str:
    """Log one record and return the line."""
    stream = io.StringIO()
    configure_logging(level="log", console=console, stream=stream, redaction=Redaction(secrets))
    logging.getLogger("any").info("%s", message, extra=extra)
    return stream.getvalue()


def leaks(text: str, secret: str) -> bool:
    """Tell whether a secret can be read in a text, in one of the usual forms."""
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], urllib.parse.quote(secret, "")}
    return any(form in text for form in forms)


@pytest.mark.parametrize("console", [False, True], ids=["json", "console"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_secret_is_replaced_in_every_form(form: str, *, console: bool) -> None:
    """In the message, in a field and deep inside of one."""
    line = logged(f"before {form} after", PASSWORD, console=console, one=form, deep={"a": [form]})

    assert not leaks(line, PASSWORD)
    assert "pl4nted" not in line
    assert "before " in line
    assert "***" in line
    if not console:
        assert json.loads(line)["message"].startswith("before ")


@pytest.mark.parametrize("console", [False, True], ids=["json", "console"])
def test_a_secret_in_an_exception_is_replaced(*, console: bool) -> None:
    """Its text, its cause, its notes."""
    stream = io.StringIO()
    configure_logging(level="log", console=console, stream=stream, redaction=Redaction([PASSWORD]))
    try:
        try:
            int(PASSWORD)
        except ValueError as error:
            error.add_note(f"the password was {PASSWORD!r}")
            raise RuntimeError(f"cannot connect with {PASSWORD!r}") from error
    except RuntimeError:
        logging.getLogger("any").exception("It broke")

    assert "pl4nted" not in stream.getvalue()
    assert "RuntimeError" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("to redis://user:hunter22@cache:6379/0", "to redis://***@cache:6379/0"),
        ("to redis://:hunter22@cache", "to redis://***@cache"),
        ("two http://a:b1@x http://c:d1@y", "two http://***@x http://***@y"),
        ("authorization: Bearer eyJhbGciOi.J9-_x", "authorization: Bearer ***"),
        ("authorization: bearer eyJhbGciOi.J9-_x", "authorization: bearer ***"),
        ("http://host:3000/path?mail=a@b", "http://host:3000/path?mail=a@b"),
        ("mail a@b, see http://host", "mail a@b, see http://host"),
        ("the bearer of news", "the bearer of news"),
        ("no secret at all", "no secret at all"),
    ],
)
def test_credentials_of_others_are_replaced(text: str, expected: str) -> None:
    """Nobody told of them, but they look like what they are."""
    assert expected == json.loads(logged(text))["message"]


@pytest.mark.parametrize(
    "secret", ["info", "level", "1234", "2026", "true", "null", '":"', '","x":"', "message", "}"]
)
def test_a_secret_that_looks_like_json_leaves_json(secret: str) -> None:
    """Nobody should choose such a secret, and no line breaks where somebody does."""
    line = json.loads(logged(f"a {secret} b", secret, port=1234, on=True, off=None))

    assert {"timestamp", "level", "context", "message"} <= line.keys()
    assert line["level"] == "info"
    if len(secret) >= 4:
        assert f"a {secret} b" not in line.values()


def test_a_hostile_text_takes_no_longer_than_its_length() -> None:
    """What a client sends is searched as well."""
    hostile = "://" + ":" * 200_000 + " @" + "://a:" * 50_000
    began = time.perf_counter()
    Redaction([PASSWORD]).text(hostile)

    assert time.perf_counter() - began < 2.0


def test_short_secrets_are_left_alone() -> None:
    """Three characters would black out half of every text."""
    assert json.loads(logged("abc", "abc"))["message"] == "abc"


@given(
    st.text(min_size=4, max_size=30),
    st.text(max_size=30),
    st.dictionaries(st.text(max_size=8), st.text(max_size=20) | st.integers() | st.none()),
)
def test_any_secret_in_any_line(secret: str, around: str, fields: dict[str, Any]) -> None:
    """Whatever the secret and the line are: the line is JSON, and the secret is not in it."""
    assume("*" not in secret)  # what stands in its place could be a part of it
    event = {"timestamp": "t", "level": "info", "context": "c", **fields, "z": around + secret}
    line = Redaction([secret]).line(json.dumps(event).encode())
    parsed = json.loads(line)

    assert secret not in parsed["z"]


def test_every_secret_of_the_settings_is_known() -> None:
    """Passwords inside addresses and secrets inside lists included."""
    settings = read_settings(
        {
            "DATABASE_URL": "postgresql://app:dsn%2Fpassword@db/main",
            "REDIS_HOST": "cache",
            "REDIS_PASSWORD": "redis-password",
            "REDIS_SENTINEL_PASSWORD": "sentinel-password",
            "MANAGEMENT_TOKEN": f" {TOKEN} ",
            "API_TOKEN": "planted-api-token",
            "WEBHOOK_SECRET": f"{WHSEC},{WHSEC[:-1]}x",
            "ALERT_WEBHOOK_URL": "https://hooks.example.com/services/T000/B000/XXXXXXXX",
        }
    )
    known = set(secrets_of(settings))

    assert {
        "dsn/password",
        "dsn%2Fpassword",
        "redis-password",
        "sentinel-password",
        TOKEN,
        "planted-api-token",
        WHSEC,
        f"{WHSEC[:-1]}x",
        "/services/T000/B000/XXXXXXXX",
    } <= known


def test_a_line_without_secrets_is_not_touched() -> None:
    """It is the same object: what is usual costs a search and no more."""
    line = json.dumps({"timestamp": "t", "message": "x" * 300}).encode()

    assert Redaction([PASSWORD, TOKEN]).line(line) is line
