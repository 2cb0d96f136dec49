"""Calls from threads, forks and signal handlers, at each moment of the application."""

import json
import subprocess
import sys
from typing import Any

import pytest
from tests.servers.postgres import Database
from tests.system.service import ROOT, clean_environment

FORKED = "ForeignLoopError: this process was forked from the one in which the application runs"
OF_MEMORY = {
    "before: asyncio.run, forked": "accepted",
    "before: submit_sync, forked": "accepted",
    "before: asyncio.run, in threads": ["accepted"],
    "before: submit_sync, in threads": ["accepted"],
    "before: submit_sync, in a handler": "accepted",
    "running: asyncio.run, forked": FORKED,
    "running: submit_sync, forked": FORKED,
    "running: asyncio.run, in threads": ["accepted"],
    "running: submit_sync, in threads": ["accepted"],
    "running: submit_sync, in a handler": "accepted",
    "running: submit_sync, on a loop": (
        "ForeignLoopError: submit_sync() blocks its thread, and this one runs an event loop, which"
        " would stop: use `await jobs.submit(...)`"
    ),
    "running: submit_sync, again": "accepted",
    "beside: asyncio.run, forked": FORKED,
    "beside: submit_sync, forked": FORKED,
    "beside: asyncio.run, in threads": ["accepted"],
    "beside: submit_sync, in threads": ["accepted"],
    "beside: submit_sync, in a handler": "accepted",
    "after: asyncio.run, forked": FORKED,
    "after: submit_sync, forked": FORKED,
    "after: asyncio.run, in threads": [
        "LedgerUnavailableError: the process stops, and its jobs in memory with it"
    ],
    "after: submit_sync, in threads": [
        "LedgerUnavailableError: the process stops, and its jobs in memory with it"
    ],
    "after: submit_sync, in a handler": (
        "LedgerUnavailableError: the process stops, and its jobs in memory with it"
    ),
}
NOT_STARTED = (
    "LedgerUnavailableError: the database's pool is not open yet: nothing has started the plugin;"
    " in a script, use `async with app.lifespan():`, or jobs.submit_sync()"
)
STOPPED = (
    "LedgerUnavailableError: the application of this process has stopped, or has failed to start"
)
CLOSED = (
    "LedgerUnavailableError: the database's pool is closed: the application has stopped, or has"
    " failed to start"
)
# A forked process has connections of its own.
OF_POSTGRES = OF_MEMORY | {
    "before: asyncio.run, forked": NOT_STARTED,
    "before: asyncio.run, in threads": [NOT_STARTED],
    "running: submit_sync, forked": "accepted",
    "beside: submit_sync, forked": "accepted",
    "after: submit_sync, forked": "accepted",
    "after: asyncio.run, in threads": [CLOSED],
    "after: submit_sync, in threads": [STOPPED],
    "after: submit_sync, in a handler": STOPPED,
}


def outcomes(**environment: str) -> Any:
    """Run the program, and return the outcomes of its calls."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.process.foreign_calls"],
        cwd=ROOT,
        env={**clean_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        call: FORKED if str(outcome).startswith(FORKED) else outcome
        for call, outcome in found.items()
    }


@pytest.mark.each_python
def test_a_call_from_anywhere_has_a_result_or_names_the_remedy() -> None:
    """Jobs in memory: none is accepted where no worker could find it."""
    assert outcomes() == OF_MEMORY


@pytest.mark.each_python
def test_a_call_from_anywhere_with_postgres(migrated_database: Database) -> None:
    """A process without the application has connections of its own, and accepted jobs are there."""
    found = outcomes(DATABASE_URL=migrated_database.url)
    accepted = migrated_database.execute(
        "SELECT count(*)::int FROM viralfx_ops.viralfx_all_jobs WHERE task = 'foreign.note'"
    )

    assert found == OF_POSTGRES
    single = sum(outcome == "accepted" for outcome in found.values())
    many = sum(outcome == ["accepted"] for outcome in found.values())
    assert accepted == [(single + 50 * many,)]
