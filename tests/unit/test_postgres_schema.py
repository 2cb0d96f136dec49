"""The migrations as files, against the list that the service holds a database to."""

import pytest
from alembic.script import Script

from viralfx.adapters.postgres import PostgresConfig
from viralfx.adapters.postgres.migrate import scripts
from viralfx.adapters.postgres.schema import REVISIONS, pending_migrations

SCRIPTS = list(reversed(list(scripts().walk_revisions())))


class Answers:
    """A connection to a database whose schema is at a revision."""

    def __init__(self, revision: str | None) -> None:
        self._revision = revision

    async def fetchval(self, query: str, /) -> str | None:
        """Answer."""
        assert query.startswith("SELECT ")
        return self._revision


def test_the_list_is_that_of_the_files() -> None:
    """The service looks at the list and never loads Alembic."""
    assert tuple(script.revision for script in SCRIPTS) == REVISIONS


def test_they_are_one_line_without_branches() -> None:
    """One beginning, one end, and each knows the one before."""
    assert scripts().get_heads() == [REVISIONS[-1]]
    assert scripts().get_bases() == [REVISIONS[0]]
    before = [script.down_revision for script in SCRIPTS]
    assert before == [None, *REVISIONS[:-1]]


@pytest.mark.parametrize("script", SCRIPTS, ids=REVISIONS)
def test_each_says_what_it_means_and_how_to_undo_it(script: Script) -> None:
    """The first line is what `viralfx migrate` prints."""
    assert script.doc
    assert script.module.__doc__
    assert script.doc.endswith(".")
    assert callable(script.module.upgrade)
    assert callable(script.module.downgrade)
    assert script.module.downgrade.__doc__


@pytest.mark.parametrize("done", range(len(REVISIONS) + 1))
async def test_what_comes_after_the_last_one_is_pending(done: int) -> None:
    """All of them in a database that was never migrated."""
    revision = REVISIONS[done - 1] if done else None

    assert await pending_migrations(Answers(revision)) == REVISIONS[done:]


async def test_nothing_is_pending_in_a_newer_database() -> None:
    """What a later version of the service made, this one can use."""
    assert await pending_migrations(Answers("9999")) == ()


@pytest.mark.parametrize(
    ("schema", "search_path"),
    [("app", '"app"'), ("Mixed Case", '"Mixed Case"'), ('a"b,c', '"a""b,c"')],
)
def test_a_schema_is_one_name(schema: str, search_path: str) -> None:
    """The server takes a search path apart at commas, and turns capitals into small letters."""
    arguments = PostgresConfig(host="h", schema=schema).connect_arguments()

    assert arguments["server_settings"]["search_path"] == search_path
