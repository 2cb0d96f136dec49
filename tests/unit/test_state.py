"""The saved state, and the store that keeps it in a file."""

import errno
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from viralfx.adapters.memory import FileStateStore, MemoryStateStore
from viralfx.bootstrap import assemble
from viralfx.core.errors import ConfigurationError
from viralfx.domain.operations import SavedState
from viralfx.settings import Settings

STATE = SavedState(
    saved_at=datetime(2026, 1, 6, 12, tzinfo=UTC),
    starts=3,
    uptime=3600.5,
    health="healthy",
    checks={"database": "pass"},
    transitions={"database": 7},
    shutdown_reason="SIGTERM",
    shutdown_phases={"drain": "ok"},
)
OTHER = SavedState(
    saved_at=datetime(2026, 1, 7, 12, tzinfo=UTC), starts=4, uptime=1.0, health="degraded"
)


def names(folder: Path) -> set[str]:
    """Return the names in the folder."""
    return {path.name for path in folder.iterdir()}


async def test_save_leaves_one_file(tmp_path: Path) -> None:
    """No temporary file is left beside ``state.json``."""
    store = FileStateStore(tmp_path)
    await store.save(STATE)
    await store.save(OTHER)

    assert {"state.json"} == names(tmp_path)
    assert (tmp_path / "state.json").read_bytes().endswith(b"}\n")


async def test_only_this_user_can_read_the_state(tmp_path: Path) -> None:
    """Neither the umask nor the mode of an older file matters."""
    (tmp_path / "state.json").touch(mode=0o666)
    umask = os.umask(0)
    try:
        await FileStateStore(tmp_path).save(STATE)
    finally:
        os.umask(umask)

    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o600


async def test_a_link_in_the_folder_is_not_written_through(tmp_path: Path) -> None:
    """Neither in place of the file nor of the new one, whose name can be guessed."""
    folder, target = tmp_path / "state", tmp_path / "target"
    folder.mkdir()
    target.write_text("theirs")
    for name in ("state.json", f".state.{os.getpid()}.json"):
        (folder / name).symlink_to(target)

    await FileStateStore(folder).save(STATE)

    assert target.read_text() == "theirs"
    assert names(folder) == {"state.json"}
    assert not (folder / "state.json").is_symlink()


@pytest.mark.parametrize("call", [1, 2], ids=["before the rename", "after the rename"])
async def test_a_full_disk_leaves_a_complete_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """If the flush fails, the error is raised and a complete state remains."""
    store = FileStateStore(tmp_path)
    await store.save(STATE)
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        await store.save(OTHER)

    assert (STATE if call == 1 else OTHER) == await store.load()
    assert {"state.json"} == names(tmp_path)


async def test_crash_between_write_and_rename_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old state is unchanged until the rename."""
    store = FileStateStore(tmp_path)
    await store.save(STATE)

    def refuse(_: Path, __: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            await store.save(OTHER)

    assert await store.load() == STATE
    assert {"state.json"} == names(tmp_path)


async def test_a_leftover_temporary_file_is_ignored(tmp_path: Path) -> None:
    """It is never read, and the next save overwrites it."""
    (tmp_path / f".state.{os.getpid()}.json").write_bytes(b'{"saved_at":')
    store = FileStateStore(tmp_path)

    assert await store.load() is None

    await store.save(STATE)

    assert await store.load() == STATE
    assert {"state.json"} == names(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"saved_at":"yesterday","starts":1,"uptime":1.0,"health":"healthy"}',
        b'{"saved_at":"2026-01-06T12:00:00Z","starts":"1","uptime":1.0,"health":"healthy"}',
        b"\xff\xfe\x00",
        b'{"health":"\xff"}',
        b"\0" * 4096,
    ],
    ids=["empty", "cut", "null", "list", "nothing", "date", "type", "UTF-16", "text", "zeros"],
)
async def test_unreadable_file_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """An invalid file is renamed, logged once, and does not block the next save."""
    (tmp_path / "state.json").write_bytes(content)
    store = FileStateStore(tmp_path)

    assert await store.load() is None
    assert await store.load() is None
    assert content == (tmp_path / "state.json.unreadable").read_bytes()
    assert [r.message for r in caplog.records] == ["Saved state is unreadable and was set aside"]

    await store.save(STATE)

    assert await store.load() == STATE


async def test_file_of_a_later_version_is_read(tmp_path: Path) -> None:
    """Unknown fields are ignored, so that a roll-back keeps the state."""
    (tmp_path / "state.json").write_bytes(
        b'{"saved_at":"2026-01-07T12:00:00Z","starts":4,"uptime":1.0,"health":"degraded",'
        b'"invented_later":{"x":[1]}}'
    )

    assert await FileStateStore(tmp_path).load() == OTHER


async def test_a_read_error_is_logged_and_returns_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An unreadable disk does not prevent a start."""
    (tmp_path / "state.json").mkdir()

    assert await FileStateStore(tmp_path).load() is None
    assert [record.message for record in caplog.records] == ["Saved state cannot be read"]


async def test_a_missing_folder_is_an_error_only_when_saving(tmp_path: Path) -> None:
    """Loading from it returns None."""
    store = FileStateStore(tmp_path / "gone")

    assert await store.load() is None
    with pytest.raises(FileNotFoundError):
        await store.save(STATE)


def test_state_dir_must_be_a_folder(tmp_path: Path) -> None:
    """A missing folder is one clear line at start-up, not an error at shutdown."""
    path = tmp_path / "gone"

    with pytest.raises(ConfigurationError) as caught:
        assemble(Settings(state_dir=str(path)))
    assert (f"STATE_DIR: {path} is not a folder; create it",) == caught.value.problems


def test_state_dir_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder is one clear line at start-up."""
    # Permissions do not apply to root, which may run the tests, so the result is simulated.
    monkeypatch.setattr(os, "access", lambda *_: False)

    with pytest.raises(ConfigurationError) as caught:
        assemble(Settings(state_dir=str(tmp_path)))
    assert (f"STATE_DIR: {tmp_path} is not writable for this user",) == caught.value.problems


def test_state_dir_selects_the_file_store(tmp_path: Path) -> None:
    """Without ``STATE_DIR`` the state is in memory."""
    assert isinstance(assemble(Settings()).operations.state_store, MemoryStateStore)
    assert isinstance(
        assemble(Settings(state_dir=str(tmp_path))).operations.state_store, FileStateStore
    )
