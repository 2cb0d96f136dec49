"""Calls from threads, forks and signal handlers, at each moment of the application."""

import json
import subprocess
import sys
from typing import Any

import pytest
from tests.servers.postgres import Database
from tests.servers.redis import RedisServer
from tests.system.service import ROOT, clean_environment

FORKED = "ForeignLoopError: this process was forked from the one in which the application runs"


def at_all(outcome: str, *, forked: str | None = None) -> dict[str, object]:
    """Return the outcomes of a call of a service from each place; None: of a fork, too."""
    return {
        "forked": outcome if forked is None else forked,
        "in threads": [outcome],
        "in a handler": outcome,
    }


NO_DATABASE = "ConfigurationError: DATABASE_URL: not set, so there is no database"
NO_REDIS = "ConfigurationError: REDIS_HOST: not set, so there is no Redis"
STOPPING = "LedgerUnavailableError: the process stops, and its jobs in memory with it"
OF_MEMORY = {
    "before: asyncio.run, forked": "accepted",
    "before: submit_sync, forked": "accepted",
    "before: asyncio.run, in threads": ["accepted"],
    "before: submit_sync, in threads": ["accepted"],
    "before: submit_sync, in a handler": "accepted",
    "before: asyncio.run, in a handler": "accepted",
    "before: cache": at_all("accepted"),
    "before: database": at_all(NO_DATABASE),
    "before: redis": at_all(NO_REDIS),
    "before: search": at_all("accepted"),
    "running: cache": at_all("accepted", forked=FORKED),
    "running: database": at_all(NO_DATABASE),
    "running: redis": at_all(NO_REDIS),
    "running: search": at_all("accepted", forked=FORKED),
    "running: asyncio.run, in a handler": "accepted",
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
    "beside: asyncio.run, in a handler": "accepted",
    "beside: asyncio.run, forked": FORKED,
    "beside: submit_sync, forked": FORKED,
    "beside: asyncio.run, in threads": ["accepted"],
    "beside: submit_sync, in threads": ["accepted"],
    "beside: submit_sync, in a handler": "accepted",
    "after: cache": at_all("accepted", forked=FORKED),
    "after: database": at_all(NO_DATABASE),
    "after: redis": at_all(NO_REDIS),
    "after: search": at_all("accepted", forked=FORKED),
    "after: asyncio.run, in a handler": STOPPING,
    "after: asyncio.run, forked": FORKED,
    "after: submit_sync, forked": FORKED,
    "after: asyncio.run, in threads": [STOPPING],
    "after: submit_sync, in threads": [STOPPING],
    "after: submit_sync, in a handler": STOPPING,
}
NOT_OPEN = (
    "the database's pool is not open yet: nothing has started the plugin; in a script, use"
    " `async with app.lifespan():`, or jobs.submit_sync()"
)
NOT_STARTED = f"LedgerUnavailableError: {NOT_OPEN}"
STOPPED = (
    "LedgerUnavailableError: the application of this process has stopped, or has failed to start"
)
CLOSED = "the database's pool is closed: the application has stopped, or has failed to start"
# A forked process has connections of its own for jobs.
OF_SERVERS = OF_MEMORY | {
    "before: asyncio.run, forked": NOT_STARTED,
    "before: asyncio.run, in threads": [NOT_STARTED],
    "before: asyncio.run, in a handler": NOT_STARTED,
    "before: database": at_all(f"NotOpenError: {NOT_OPEN}"),
    "before: redis": at_all("accepted"),
    "before: search": at_all(NOT_STARTED),
    "running: submit_sync, forked": "accepted",
    "running: database": at_all("accepted", forked=FORKED),
    "running: redis": at_all("accepted", forked=FORKED),
    "beside: submit_sync, forked": "accepted",
    "after: submit_sync, forked": "accepted",
    "after: asyncio.run, in threads": [f"LedgerUnavailableError: {CLOSED}"],
    "after: asyncio.run, in a handler": f"LedgerUnavailableError: {CLOSED}",
    "after: submit_sync, in threads": [STOPPED],
    "after: submit_sync, in a handler": STOPPED,
    "after: database": at_all(f"NotOpenError: {CLOSED}", forked=FORKED),
    "after: redis": at_all(
        "ClientClosedError: the Redis client is closed: the application has stopped", forked=FORKED
    ),
    "after: search": at_all(f"LedgerUnavailableError: {CLOSED}", forked=FORKED),
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
    return {call: without_remedy(outcome) for call, outcome in found.items()}


def without_remedy(outcome: Any) -> Any:
    """Return an outcome without the remedy of a fork, which is long."""
    if isinstance(outcome, dict):
        return {place: without_remedy(each) for place, each in outcome.items()}
    return FORKED if str(outcome).startswith(FORKED) else outcome


@pytest.mark.each_python
def test_a_call_from_anywhere_has_a_result_or_names_the_remedy() -> None:
    """Jobs in memory: none is accepted where no worker could find it."""
    assert outcomes() == OF_MEMORY


@pytest.mark.each_python
def test_a_call_from_anywhere_with_servers(migrated_database: Database, redis: RedisServer) -> None:
    """A process without the application has connections of its own, and accepted jobs are there."""
    found = outcomes(
        DATABASE_URL=migrated_database.url, REDIS_HOST="127.0.0.1", REDIS_PORT=str(redis.port)
    )
    accepted = migrated_database.execute(
        "SELECT count(*)::int FROM viralfx_ops.viralfx_all_jobs WHERE task = 'foreign.note'"
    )

    assert found == OF_SERVERS
    single = sum(outcome == "accepted" for outcome in found.values())
    many = sum(outcome == ["accepted"] for outcome in found.values())
    assert accepted == [(single + 50 * many,)]
