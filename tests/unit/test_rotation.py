"""Credentials that change while the program runs: files and callables."""

import asyncio
import logging
import os
import sys
import traceback
from collections.abc import Awaitable
from pathlib import Path
from uuid import uuid4

import pytest
from tests.manual_clock import ManualClock

from viralfx.settings import CredentialsError, RotatingSecret, Secret, read_settings
from viralfx.settings.rotation import CredentialsCallable, PasswordFile
from viralfx.telemetry.logging.redaction import Redaction


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file with a password."""
    path = tmp_path / "password"
    path.write_text("one-one\n")
    return path


def write(path: Path, text: str | bytes | None) -> None:
    """Replace the file's content; None removes the file."""
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)


def in_file(path: Path, clock: ManualClock) -> RotatingSecret:
    """Return the secret that the file holds."""
    read = Secret(path.read_text().rstrip(), file=str(path))
    return RotatingSecret("REDIS_PASSWORD", read, clock=clock.monotonic)


def test_settings_keep_the_path_of_a_secret(file: Path) -> None:
    """A secret from a variable has none."""
    password = read_settings({"REDIS_PASSWORD_FILE": str(file)}).redis.password
    other = read_settings({"REDIS_PASSWORD": "plain"}).redis.password

    assert password is not None
    assert (password.value, password.file) == ("one-one", str(file))
    assert other is not None
    assert other.file is None


async def test_file_is_read_at_most_once_a_second(file: Path, clock: ManualClock) -> None:
    """Unless the server refused the last value."""
    secret = in_file(file, clock)
    write(file, "two-two\n")
    at_once = await secret.current()
    await clock.advance(1.0)
    later = await secret.current()
    write(file, "three-3\n")
    soon = await secret.current()
    secret.refused()

    assert (at_once, later, soon) == ("one-one", "two-two", "two-two")
    assert await secret.current() == "three-3"


@pytest.mark.parametrize("broken", [None, "\n", b"\xff\xfe"], ids=["missing", "empty", "binary"])
async def test_last_value_stays_in_use_while_the_file_is_broken(
    file: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture, broken: str | bytes | None
) -> None:
    """One line says why; a mounted secret is replaced in several steps."""
    secret = in_file(file, clock)
    write(file, broken)
    for _ in range(3):
        await clock.advance(1.0)
        assert await secret.current() == "one-one"
    lines = [r for r in caplog.records if r.name == "viralfx.credentials"]
    write(file, "two-two\n")
    await clock.advance(1.0)

    assert [r.levelno for r in lines] == [logging.WARNING]
    assert await secret.current() == "two-two"


async def test_pipe_is_not_read_again(tmp_path: Path, clock: ManualClock) -> None:
    """As of a shell's ``<(...)``: to open it again would wait for a writer, and block the loop."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    secret = RotatingSecret("DB_PASSWORD", Secret("first", file=str(pipe)), clock=clock.monotonic)
    await clock.advance(60.0)

    assert secret.rotates is False
    assert await secret.current() == "first"


async def test_secret_without_a_file_never_changes(clock: ManualClock) -> None:
    """And a missing one stays missing."""
    given = RotatingSecret("DB_PASSWORD", Secret("one"), clock=clock.monotonic)
    missing = RotatingSecret("DB_PASSWORD", None, clock=clock.monotonic)
    await clock.advance(60.0)

    assert (await given.current(), await missing.current()) == ("one", None)


async def _awaited() -> tuple[str, str]:
    return "user", "token-1"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (lambda: "token-1", "token-1"),
        (lambda: ("user", "token-1"), ("user", "token-1")),
        (_awaited, ("user", "token-1")),
        (lambda: _awaited(), ("user", "token-1")),  # noqa: PLW0108 - not a coroutine function
    ],
    ids=["password", "user and password", "async", "awaitable"],
)
async def test_callable_wins_over_the_setting(
    source: CredentialsCallable, expected: object
) -> None:
    """It may be plain or async, and return a user."""
    secret = RotatingSecret("OperationsConfig.redis_credentials", Secret("given"), source)

    assert await secret.current() == expected


def _fails() -> str:
    raise OSError(2, "no such token")


async def _exits() -> str:
    sys.exit("no such token")


@pytest.mark.parametrize(
    "source",
    [_fails, lambda: None, lambda: "", lambda: ("user", 1), _exits, lambda: sys.exit("no token")],
    ids=["error", "nothing", "empty", "no password", "async exit", "exit"],
)
async def test_failing_callable_is_named(source: CredentialsCallable) -> None:
    """Its errors are not taken for those of a network or a file, and it is called again."""
    secret = RotatingSecret("OperationsConfig.redis_credentials", None, source)
    for _ in range(2):
        with pytest.raises(CredentialsError, match=r"^OperationsConfig\.redis_credentials: "):
            await secret.current()


async def test_text_of_a_callables_error_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nor that of its causes and notes: they may quote a token. The frames are."""
    text = uuid4().hex

    def refused_by_the_service() -> str:
        error = OSError(text)
        error.add_note(text)
        raise error from KeyError(text)

    secret = RotatingSecret("OperationsConfig.redis_credentials", None, refused_by_the_service)
    with pytest.raises(CredentialsError) as caught:
        await secret.current()
    (record,) = (r for r in caplog.records if r.name == "viralfx.credentials")
    shown = logging.Formatter().format(record) + str(vars(record))
    raised = "".join(traceback.format_exception(caught.value))

    assert text not in shown + raised
    assert "in refused_by_the_service" in shown
    assert "raised OSError" in shown


async def test_callable_that_hangs_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten seconds; less here."""
    monkeypatch.setattr("viralfx.settings.rotation.CALL_SECONDS", 0.01)

    async def hang() -> str:
        await asyncio.Event().wait()
        return "never"

    with pytest.raises(CredentialsError, match="no answer within"):
        await RotatingSecret("OperationsConfig.redis_credentials", None, hang).current()


async def test_connections_share_a_call_in_a_thread() -> None:
    """Also if it returns an awaitable, which can be awaited once; and they share its error."""
    calls = 0

    def find() -> Awaitable[tuple[str, str]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError
        return _awaited()

    secret = RotatingSecret("OperationsConfig.redis_credentials", None, find)
    first = await asyncio.gather(*(secret.current() for _ in range(3)))
    second = await asyncio.gather(*(secret.current() for _ in range(3)), return_exceptions=True)

    assert first == [("user", "token-1")] * 3
    assert [type(each) for each in second] == [CredentialsError] * 3
    assert calls == 2


async def test_new_secrets_are_masked(file: Path, clock: ManualClock) -> None:
    """In every log; the last eight of them."""
    redaction = Redaction(["given-first"])
    secret = in_file(file, clock)
    for number in range(10):
        write(file, f"password{number}\n")
        await clock.advance(1.0)
        await secret.current()

    assert redaction.text("password9 password2 given-first") == "*** *** ***"
    assert redaction.line(b'{"detail":"password9"}') == b'{"detail":"***"}'
    assert redaction.text("password1") == "password1"


async def test_tokens_of_a_callable_are_masked() -> None:
    """The user is not a secret."""
    redaction = Redaction()
    await RotatingSecret("name", None, lambda: ("alice", "token-77")).current()

    assert redaction.text("alice token-77") == "alice ***"


PASSWORDS = r"""
# comment:1:shop:app:not-this
db-1:5432:shop:app:one
db-2:*:shop:app:two\:2\\
[::1]:5432:shop:app:not-this
\:\:1:5432:shop:app:six
localhost:5432:shop:app:socket
db-3:5432:shop:app
db-3:5432:shop:app:three:with more
*:*:*:guest:*
*:*:*:*:any
"""


@pytest.mark.parametrize(
    ("host", "port", "user", "password"),
    [
        ("db-1", 5432, "app", "one"),
        ("db-1", 5433, "app", "any"),
        ("db-2", 6000, "app", "two:2\\"),
        ("::1", 5432, "app", "six"),
        ("/run/postgresql", 5432, "app", "socket"),
        ("db-3", 5432, "app", "three"),
        ("db-4", 5432, "guest", "*"),
    ],
)
def test_password_of_a_server_is_in_the_first_line_that_fits(
    tmp_path: Path, host: str, port: int, user: str, password: str
) -> None:
    """By libpq's rules for stars, backslashes, comments and sockets."""
    path = tmp_path / "pgpass"
    path.write_text(PASSWORDS)
    file = PasswordFile(str(path))
    file.read()

    assert file.find(host, port, "shop", user) == password


def test_file_of_passwords_without_a_line_that_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no password then. A file that is gone is logged once, and its content stays."""
    path = tmp_path / "pgpass"
    path.write_text("db:5432:shop:app:planted-one\n")
    file, masking = PasswordFile(str(path)), Redaction()
    file.read()
    assert file.find("db", 5432, "shop", "other") is None
    assert file.find("db", 5432, "shop", "app") == "planted-one"
    assert "planted" not in masking.text("password=planted-one")
    path.unlink()
    for _ in range(2):
        file.read()
    assert file.find("db", 5432, "shop", "app") == "planted-one"
    (line,) = caplog.records
    assert line.getMessage() == "Password file cannot be read; its last content stays in use"
    path.write_text("db:5432:shop:app:planted-two\n")
    file.read()
    assert file.find("db", 5432, "shop", "app") == "planted-two"
