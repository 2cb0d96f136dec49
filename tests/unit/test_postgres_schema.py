"""The migration files compared with the list in ``migrations``, and the names of tables."""

import re
from pathlib import Path

import pytest
from alembic.script import Script

from viralfx.adapters.postgres import migrations
from viralfx.adapters.postgres.migrate import scripts
from viralfx.adapters.postgres.migrations import REVISIONS, missing_after, qualified

SCRIPTS = list(reversed(list(scripts().walk_revisions())))


def test_list_equals_the_migration_files() -> None:
    """The service reads the list and never loads Alembic."""
    assert tuple(script.revision for script in SCRIPTS) == REVISIONS


def test_migrations_are_linear() -> None:
    """One start, one end, and each names its predecessor."""
    assert scripts().get_heads() == [REVISIONS[-1]]
    assert scripts().get_bases() == [REVISIONS[0]]
    before = [script.down_revision for script in SCRIPTS]
    assert before == [None, *REVISIONS[:-1]]


@pytest.mark.parametrize("script", SCRIPTS, ids=REVISIONS)
def test_each_migration_has_a_description_and_a_downgrade(script: Script) -> None:
    """`viralfx migrate` prints the first line."""
    assert script.doc
    assert script.module.__doc__
    assert script.doc.endswith(".")
    assert callable(script.module.upgrade)
    assert callable(script.module.downgrade)
    assert script.module.downgrade.__doc__


@pytest.mark.parametrize("done", range(len(REVISIONS) + 1))
def test_later_migrations_are_pending(done: int) -> None:
    """All of them in a database without migrations."""
    revision = REVISIONS[done - 1] if done else None

    assert missing_after(revision) == REVISIONS[done:]


def test_nothing_is_pending_in_a_newer_database() -> None:
    """This version can use the schema of a later one."""
    assert missing_after("9999") == ()


FOLDER = Path(migrations.__file__).parents[1]
NAME = re.compile(r"(?<![\w.-])viralfx_[a-z_]+(?![\w.*{-])")
OTHERS = {"viralfx_ops", "viralfx_accept", "viralfx_after_commit"}
"""Of a schema, a savepoint, and a key in the ``info`` of a session."""


@pytest.mark.parametrize(
    "path", sorted(FOLDER.rglob("*.py")), ids=lambda path: f"{path.parent.name}.{path.stem}"
)
def test_every_name_is_qualified(path: Path) -> None:
    """A table, view or function that is missing in the pattern would be found by search path."""
    text = re.sub(r"(INDEX|TRIGGER) viralfx_\w+", r"\1", path.read_text(encoding="utf-8"))
    assert set(NAME.findall(qualified(text, "ops"))) <= OTHERS
    assert qualified("SELECT viralfx_jobs.id, viralfx_jobs_key", "ops") == (
        'SELECT "ops".viralfx_jobs.id, viralfx_jobs_key'
    )
