"""The migration files compared with the list in ``migrations``, and the names of tables."""

import re
from pathlib import Path

import pytest

from viralfx.postgres.migrate import (
    FOLDER,
    LOCK,
    description_of,
    file_of,
    statements_of,
)
from viralfx.postgres.migrations import (
    REVISIONS,
    VERSION_TABLE,
    channel_of,
    missing_after,
    qualified,
)

FILES = sorted(FOLDER.rglob("*.sql"))


def test_list_equals_the_migration_files() -> None:
    """One file for each, and one that takes it back."""
    up, down = (
        sorted(path.name for path in each.glob("*.sql")) for each in (FOLDER, FOLDER / "down")
    )

    assert tuple(name[:4] for name in up) == REVISIONS
    assert up == down


def test_versions_share_the_lock_and_the_table() -> None:
    """A run of 0.2.0 excludes one of this version, and each reads the revision of the other."""
    assert LOCK == 7305981240662115
    assert VERSION_TABLE == "viralfx_migrations"


@pytest.mark.parametrize("revision", REVISIONS)
def test_each_migration_has_a_description(revision: str) -> None:
    """`viralfx migrate` prints the first line."""
    assert re.fullmatch(r"[A-Z].+[^.]\.", description_of(revision))
    assert file_of(revision).read_text(encoding="utf-8").startswith("-- ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_migration_can_be_rolled_back(path: Path) -> None:
    """No statement ends the transaction of the file, or needs to be outside of one."""
    text = path.read_text(encoding="utf-8")
    outside = re.sub(r"\$\$[^$]+\$\$|--.*", "", text)  # of functions and comments
    ends = r"^(?:BEGIN|START|COMMIT|ROLLBACK|ABORT|END|PREPARE|VACUUM)\b|CONCURRENTLY"

    assert re.findall(ends, outside, re.MULTILINE | re.IGNORECASE) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_migration_names_the_schema(path: Path) -> None:
    """Each object has it, and another schema replaces it everywhere, also in the channel."""
    text = path.read_text(encoding="utf-8")
    code = re.sub(r"--.*|(?:INDEX|TRIGGER) viralfx_\w+", "", text)
    other = statements_of(path, "mine")

    assert re.findall(r"(?<![\w.'])(?:viralfx_(?!ops\.)\w+|enqueue)\b", code) == []
    assert "viralfx_ops" not in other
    assert other.count('"mine".') == text.count("viralfx_ops.")
    assert other.count(f"'{channel_of('mine')}'") == text.count("pg_notify(")


@pytest.mark.parametrize("done", range(len(REVISIONS) + 1))
def test_later_migrations_are_pending(done: int) -> None:
    """All of them in a database without migrations."""
    revision = REVISIONS[done - 1] if done else None

    assert missing_after(revision) == REVISIONS[done:]


def test_nothing_is_pending_in_a_newer_database() -> None:
    """This version can use the schema of a later one."""
    assert missing_after("9999") == ()


NAME = re.compile(r"(?<![\w.-])viralfx_[a-z_]+(?![\w.*{-])")
OTHERS = {"viralfx_ops", "viralfx_accept", "viralfx_after_commit"}
"""Of a schema, a savepoint, and a key in the ``info`` of a session."""


@pytest.mark.parametrize(
    "path", sorted(FOLDER.parent.rglob("*.py")), ids=lambda path: f"{path.parent.name}.{path.stem}"
)
def test_every_name_is_qualified(path: Path) -> None:
    """A table, view or function that is missing in the pattern would be found by search path."""
    assert set(NAME.findall(qualified(path.read_text(encoding="utf-8"), "ops"))) <= OTHERS
    assert qualified("SELECT viralfx_jobs.id, viralfx_jobs_key", "ops") == (
        'SELECT "ops".viralfx_jobs.id, viralfx_jobs_key'
    )
