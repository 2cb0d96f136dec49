"""Tests of redaction: lines contain no secret in any encoding and stay valid JSON."""

import io
import json
import logging
import time
import urllib.parse
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from viralfx.settings import read_settings
from viralfx.telemetry.logging.handler import configure_logging
from viralfx.telemetry.logging.redaction import Redaction, secrets_of

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
    "URL in small letters": urllib.parse.quote(PASSWORD, safe="").replace("%2F", "%2f").lower(),
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
    """Return whether a text contains a secret in one of the usual encodings."""
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], urllib.parse.quote(secret, "")}
    return any(form in text for form in forms)


@pytest.mark.parametrize("console", [False, True], ids=["json", "console"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_secret_is_replaced_in_every_encoding(form: str, *, console: bool) -> None:
    """This holds for the message, for fields and for nested values."""
    line = logged(f"before {form} after", PASSWORD, console=console, one=form, deep={"a": [form]})

    assert not leaks(line, PASSWORD)
    assert "pl4nted" not in line
    assert "before " in line
    assert "***" in line
    if not console:
        assert json.loads(line)["message"].startswith("before ")


@pytest.mark.parametrize("console", [False, True], ids=["json", "console"])
def test_a_secret_in_an_exception_is_replaced(*, console: bool) -> None:
    """Text, cause and notes of the exception are redacted."""
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
        ("two http://a:b1@x,http://c:d1@y", "two http://***@x,http://***@y"),
        ("postgres://u:p@ss/word@h:5432/db", "postgres://***@h:5432/db"),
        ("amqp://u:se/cret@h", "amqp://***@h"),
        ("postgres://u:p?ss#w@h", "postgres://***@h"),
        ("postgres://u:it's\"so@h", "postgres://***@h"),
        ("postgres://u:it'!s@h", "postgres://***@h"),
        ("postgres://u@corp:hunter22@h", "postgres://***@h"),
        (r"smb://CORP\user:hunter22@h", "smb://***@h"),
        ("http://u:p@[::1]:80/a", "http://***@[::1]:80/a"),
        ("redis://t0ken@cache", "redis://***@cache"),
        ("https://ghp_abc@github.com/x/y.git", "https://***@github.com/x/y.git"),
        ("https://me@host:3000/a@b", "https://***@host:3000/a@b"),
        (r'{"dsn":"redis:\/\/u:hunter22@h\/0"}', r'{"dsn":"redis:\/\/***@h\/0"}'),
        (r'"{\"dsn\":\"redis:\\/\\/u:p/w@h\"}"', r'"{\"dsn\":\"redis:\\/\\/***@h\"}"'),
        ('{"a":"http://u:pw@h","b":"c@d"}', '{"a":"http://***@h","b":"c@d"}'),
        ("authorization: Bearer eyJhbGciOi.J9-_x", "authorization: Bearer ***"),
        ("authorization: bearer eyJhbGciOi.J9-_x", "authorization: bearer ***"),
    ],
)
def test_unknown_credentials_are_replaced(text: str, expected: str) -> None:
    """Credentials in addresses and bearer tokens are recognised by their form."""
    assert expected == json.loads(logged(text))["message"]
    assert expected == Redaction().text(expected)


@pytest.mark.parametrize(
    "text",
    [
        "https://host/path?x=a@b",
        "https://host?x=a:b@c",
        "http://host:3000/path?mail=a@b",
        "http://localhost:4873/@scope/package",
        "http://[::1]:3000/a@b",
        "https://host/path:a@b",
        "file:///srv/me@work/a:b@c",
        r"http:\/\/host\/a:b@c",
        "mail a@b, see http://host",
        "see http://host:3000, http://host: or a@b",
        "(http://host)a@b, <http://host>a@b, http://host,a@b",
        "the text before :// in user@host",
        '{"url":"http://host","mail":"a@b"}',
        '{"url":"http://host:x","mail":"a@b"}',
        r'"{\"url\":\"http://host:x\",\"mail\":\"a@b\"}"',
        "['http://host:x']a@b, \"http://host:x\";a@b",
        "{'url': 'http://host:x', 'mail': 'a@b'}",
        r"C:\/x a@b",
        "the bearer of news",
        "no secret at all",
    ],
)
def test_text_without_credentials_is_unchanged(text: str) -> None:
    """Examples are addresses without a user, mail addresses, and similar text."""
    assert text == json.loads(logged(text))["message"]
    assert text == Redaction([PASSWORD]).text(text)


@given(
    st.text(alphabet="ab1:/@\\\"' ?#[].,*", max_size=40),
    st.text(alphabet="a:/@", min_size=8, max_size=12),
)
@example("[a@b:1/c@d", "a secret")
def test_redaction_is_idempotent(text: str, secret: str) -> None:
    """Spans and log lines redact the text of a job's error repeatedly."""
    redaction = Redaction([secret])
    cleaned = redaction.text(f"bearer abcd x://{text}")

    assert cleaned == redaction.text(cleaned)


@given(st.text(alphabet="ab/@:?", min_size=1, max_size=12))
def test_any_password_in_an_address_is_replaced(password: str) -> None:
    """Exceptions are passwords that contain another address, or a port and a path."""
    assume("://" not in password)
    assert Redaction().text(f"redis://u:x{password}@h/0") == "redis://***@h/0"


@pytest.mark.parametrize(
    "secret",
    [
        "info",
        "level",
        "12345678",
        "20261128",
        "true",
        "null",
        '":"',
        '","port":"',
        "timestamp",
        "}",
    ],
)
def test_a_secret_that_looks_like_json_leaves_valid_json(secret: str) -> None:
    """Redaction works on values, not on the encoded line."""
    line = json.loads(logged(f"a {secret} b", secret, port=12345678, on=True, off=None))

    assert {"timestamp", "level", "context", "message"} <= line.keys()
    assert line["level"] == "info"
    if len(secret) >= 8:  # others are words
        assert f"a {secret} b" not in line.values()


@pytest.mark.parametrize(
    "hostile",
    [
        "://" + ":" * 200_000 + " @" + "://a:" * 50_000,
        "a://a:@" * 150_000,
        "@" + "://" * 350_000,
        "://a:'a\"" * 150_000 + "@",
        "@:" + "\\" * 1_000_000,
        "@" + ":\\/\\/" * 200_000,
        "://u:" + "@" * 500_000 + "/" * 500_000,
        "bearer" + " " * 1_000_000,
        "lorem ipsum " * 80_000,
    ],
    ids=lambda text: f"{text[:8]}...{text[-4:]}",
)
def test_crafted_text_is_redacted_in_linear_time(hostile: str) -> None:
    """Clients' data is redacted too; each case is a megabyte."""
    redaction = Redaction([f'planted-number-{n}/with+odd"characters' for n in range(8)])
    began = time.process_time()
    redaction.text(hostile)

    assert time.process_time() - began < 2.0


def test_many_secrets_cost_little_in_a_long_text() -> None:
    """Redaction runs on the event loop."""
    redaction = Redaction([f'planted-number-{n}/with+odd"characters' for n in range(8)])
    line = json.dumps({"message": "a@b http://h " + "lorem ipsum " * 80_000}).encode()
    began = time.process_time()
    redaction.line(line)

    assert time.process_time() - began < 0.2


def test_a_secret_may_contain_any_bytes() -> None:
    """Environment variables may contain bytes that are not UTF-8."""
    secret = b"planted-\xfc".decode(errors="surrogateescape")

    assert Redaction([secret]).text(f"before {secret} after") == "before *** after"


def test_tiny_secrets_are_not_redacted() -> None:
    """Three characters occur in half of all texts."""
    assert json.loads(logged("abc", "abc"))["message"] == "abc"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("the secret thing", "the secret thing"),
        ("secret thing", "secret thing"),
        ("no such table: secret", "no such table: secret"),
        ("secret", "***"),
        ("password=secret, 'secret' {\"secret\"}", "password=***, '***' {\"***\"}"),
        ("redis://u:secret@h/0", "redis://***@h/0"),
        ("key:secrets", "key:secrets"),
    ],
)
def test_short_secrets_are_redacted_as_values(text: str, redacted: str) -> None:
    """A password of an ordinary word must not make log lines unreadable, and so show itself."""
    assert json.loads(logged(text, "secret"))["message"] == redacted


@given(
    st.text(min_size=8, max_size=30),
    st.text(max_size=30),
    st.dictionaries(st.text(max_size=8), st.text(max_size=20) | st.integers() | st.none()),
)
def test_any_secret_in_any_line(secret: str, around: str, fields: dict[str, Any]) -> None:
    """For any secret and any line the result is valid JSON without the secret."""
    assume("*" not in secret)  # the mask could be a part of the secret
    event = {"timestamp": "t", "level": "info", "context": "c", **fields, "z": around + secret}
    line = Redaction([secret]).line(json.dumps(event).encode())
    parsed = json.loads(line)

    assert secret not in parsed["z"]


def test_every_secret_of_the_settings_is_known() -> None:
    """This includes passwords in addresses and secrets in lists."""
    settings = read_settings(
        {
            "DATABASE_URL": "postgresql://app:dsn%2Fpassword@db/main",
            "REDIS_HOST": "cache",
            "REDIS_PASSWORD": "redis-password",
            "REDIS_SENTINEL_PASSWORD": "sentinel-password",
            "MANAGEMENT_TOKEN": f" {TOKEN} planted-next-token ",
            "API_TOKEN": "planted-api-token",
            "WEBHOOK_SECRET": f"{WHSEC},{WHSEC[:-1]}x",
            "WEBHOOK_KEYS": f"a.example={WHSEC[:-1]}y,b.example={WHSEC[:-1]}z",
            "WEBHOOK_SHARED_SECRET": f"{WHSEC[:-1]}u",
            "ALERT_WEBHOOK_SECRET": f"{WHSEC[:-1]}v",
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
        "planted-next-token",
        "planted-api-token",
        WHSEC,
        *(f"{WHSEC[:-1]}{last}" for last in "xyzuv"),
        "/services/T000/B000/XXXXXXXX",
    } <= known


def test_a_line_without_secrets_is_returned_unchanged() -> None:
    """The result is the same object; the usual case costs only a search."""
    line = json.dumps({"timestamp": "t", "message": "x" * 300}).encode()

    assert Redaction([PASSWORD, TOKEN]).line(line) is line


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://db/app?user=me&password=h%20unter2&sslmode=require",
        "postgresql://me:h%20unter2@a:1,[::1]:2/app",
    ],
)
def test_a_password_anywhere_in_a_database_address_is_redacted(url: str) -> None:
    """As a parameter, and beside several hosts."""
    settings = read_settings({"DATABASE_URL": url})
    redaction = Redaction(secrets_of(settings))

    assert redaction.text("h unter2 and h%20unter2") == "*** and ***"


def test_each_secret_of_the_tokens_is_masked() -> None:
    """The text of TOKENS as a whole is no secret that a log line would show; its parts are."""
    text = "ann read first-planted second-planted; bob admin third-planted"
    settings = read_settings({"TOKENS": text})
    found = {*secrets_of(settings)}

    assert {"first-planted", "second-planted", "third-planted"} <= found
    assert {"ann", "read", "bob", "admin"}.isdisjoint(found)
