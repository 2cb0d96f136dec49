"""Tokens in files are read again; a file that is not usable keeps the former ones."""

import logging
from pathlib import Path

import pytest

from viralfx.settings import Settings, read_settings
from viralfx.settings.live_tokens import LiveTokens

OLD, NEW, THIRD = "c0a8e1f59d3b7264", "kQ4Tz0pLk9vRw2Ym", "p8Zr5Bn1Xs6Hd3Wf"


class Seconds:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def settings(path: Path, **more: str) -> Settings:
    """Return the settings with the management token in a file."""
    return read_settings({"MANAGEMENT_TOKEN_FILE": str(path), **more})


def accepted(tokens: LiveTokens) -> list[str]:
    """Return the tokens that are accepted."""
    return [text for text in (OLD, NEW, THIRD) if tokens.identify(text.encode()) is not None]


def test_a_file_is_read_again_while_the_process_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With two values during a rotation, separated by any white space."""
    caplog.set_level(logging.INFO)
    path, clock = tmp_path / "token", Seconds()
    path.write_text(OLD)
    tokens = LiveTokens(settings(path), clock=clock)
    assert accepted(tokens) == [OLD]
    path.write_text(f"{NEW}\n{OLD}\n")
    assert accepted(tokens) == [OLD]
    clock.now += 1
    assert accepted(tokens) == [OLD, NEW]
    path.write_text(f"{NEW}\n")
    clock.now += 1
    assert accepted(tokens) == [NEW]
    assert caplog.text.count("Secret changed") == 2
    assert NEW not in caplog.text


@pytest.mark.parametrize(
    ("content", "environment", "reason"),
    [
        (None, "development", "cannot read"),
        (b"", "development", "is empty"),
        (b" \n", "development", "is empty"),
        (b"\xff\xfe", "development", "not UTF-8 text"),
        (f"{OLD} {NEW} {THIRD}".encode(), "development", "holds 3 tokens"),
        (b"changeme-changeme-changeme", "production", "consists of words"),
        (THIRD.encode(), "production", "MANAGEMENT_TOKEN, too"),
    ],
)
def test_a_file_that_is_not_usable_keeps_the_tokens(
    tmp_path: Path,
    content: bytes | None,
    environment: str,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged as an error once, and a usable file afterwards counts."""
    path, clock = tmp_path / "token", Seconds()
    path.write_text(OLD)
    tokens = LiveTokens(settings(path, ENVIRONMENT=environment, API_TOKEN=THIRD), clock=clock)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for _ in range(3):
        clock.now += 1
        assert accepted(tokens) == [OLD, THIRD]
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert reason in vars(record)["reason"]
    path.write_text(NEW)
    clock.now += 1
    assert accepted(tokens) == [NEW, THIRD]


def test_the_file_of_names_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong line keeps the former names, and no line shows a secret."""
    path, clock = tmp_path / "tokens", Seconds()
    path.write_text(f"ann read {OLD}\n")
    tokens = LiveTokens(read_settings({"TOKENS_FILE": str(path)}), clock=clock)
    for text, names in (
        (f"ann read {NEW} {OLD}\nbob submit:a.* {THIRD}\n", ["ann", "ann", "bob"]),
        (f"ann raed {NEW}\n", ["ann", "ann", "bob"]),
        (f"bob submit:a.* {THIRD}\n", ["bob"]),
    ):
        path.write_text(text)
        clock.now += 1
        found = [tokens.identify(secret.encode()) for secret in (OLD, NEW, THIRD)]
        assert [each.name for each in found if each is not None] == names
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "line 1: the second field is no list of rights" in vars(record)["reason"]
    assert NEW not in str(vars(record))


@pytest.mark.parametrize("broken", [False, True])
def test_secrets_may_move_between_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, broken: bool
) -> None:
    """Each file alone would have an equal secret; a file that is not usable keeps no other back."""
    caplog.set_level(logging.INFO)
    management, names, api, clock = tmp_path / "m", tmp_path / "t", tmp_path / "a", Seconds()
    management.write_text(OLD)
    names.write_text(f"ann read {NEW}")
    api.write_text(THIRD)
    files = {"TOKENS_FILE": str(names), "API_TOKEN_FILE": str(api)}
    tokens = LiveTokens(settings(management, ENVIRONMENT="production", **files), clock=clock)
    management.write_text("K7vQ2mZx9TbL4wRs" if broken else NEW)
    names.write_text(f"ann read {OLD if not broken else NEW} {NEW[::-1]}")
    if broken:
        api.write_text("")
    clock.now += 1

    held = [tokens.identify(text.encode()) for text in (OLD, NEW, NEW[::-1], THIRD)]
    found = [None if each is None else each.name for each in held]
    assert found == ([None, "ann", "ann", "api"] if broken else ["ann", "management", "ann", "api"])
    assert caplog.text.count("Secret changed") == 2
    assert caplog.text.count("Token file is not usable") == broken


def test_a_variable_takes_two_values() -> None:
    """Without a file they stay as they are."""
    tokens = LiveTokens(read_settings({"MANAGEMENT_TOKEN": f"{OLD} {NEW}"}))
    assert accepted(tokens) == [OLD, NEW]
    assert tokens.identify(f"{OLD} {NEW}".encode()) is None
