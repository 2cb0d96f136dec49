"""``viralfx audit``, and the events of ``viralfx jobs``."""

import json
import os
import pwd
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests import forked
from tests.servers.postgres import Database
from tests.system.test_jobs_command import Shell
from tests.system.workers import environment_of

ACTOR = f"cli {pwd.getpwuid(os.getuid()).pw_name}"


@pytest.mark.each_python
def test_the_events_of_commands_are_shown(database: Database) -> None:
    """Changes and refusals with their user, the latest first; reads are none."""
    shell = Shell(database)
    job = shell.json("submit", "parcels.echo", "1")["id"]
    shell.run("list")
    shell.json("cancel", job)
    shell.fails(1, "retry", job)
    shell.json("cancel", "--task", "parcels.echo", "--yes")
    shell.json("pause", "default")
    shell.json("resume", "default")
    shell.json("pause", "--schedule", "default.prune")
    environment = environment_of(database)

    def audit(*arguments: str, code: int = 0) -> Any:
        done = forked.viralfx("audit", *arguments, environ=environment)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        return done

    events = [
        ("schedule.pause", "default.prune", "done", "paused"),
        ("queue.resume", "default", "done", "running"),
        ("queue.pause", "default", "done", "paused"),
        ("jobs.cancel", "task=parcels.echo", "done", None),
        ("job.retry", job, "refused", None),
        ("job.cancel", job, "done", "cancelled"),
        ("job.submit", "parcels.echo", "done", None),
    ]
    shown = json.loads(audit("--json").stdout)
    names = ("action", "target", "outcome", "after")
    assert [tuple(each[name] for name in names) for each in shown["items"]] == events
    assert {each["actor"] for each in shown["items"]} == {ACTOR}
    assert shown["nextCursor"] is None

    table = audit("--limit", "2")
    header, *rows = table.stdout.splitlines()
    assert header.split()[:4] == ["at", "actor", "address", "action"]
    assert ["schedule.pause" in rows[0], "queue.resume" in rows[1]] == [True, True]
    cursor = table.stderr.removeprefix("older events: --cursor ").strip()
    rest = json.loads(audit("--json", "--cursor", cursor).stdout)["items"]
    assert [each["action"] for each in rest] == [action for action, *_ in events[2:]]

    one = json.loads(audit("--json", "--action", "job.cancel", "--actor", ACTOR).stdout)["items"]
    assert [each["target"] for each in one] == [job]
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert "no event matches" in audit("--since", soon).stderr
    assert len(json.loads(audit("--json", "--since", "1h").stdout)["items"]) == len(events)
    assert "there are session.begin" in audit("--action", "job.explode", code=2).stderr
    assert "is not a time" in audit("--since", "yesterday", code=2).stderr


def test_a_lost_audit_table_stops_no_command(database: Database) -> None:
    """The change is done, and a line says that it is not recorded."""
    shell = Shell(database)
    job = shell.json("submit", "parcels.echo", "1")["id"]
    database.execute("drop table viralfx_audit_events")
    cancelled = shell.run("cancel", job)
    shown = forked.viralfx("audit", environ=environment_of(database))

    assert (cancelled.returncode, cancelled.stdout) == (0, f"{job}  cancelled\n")
    assert "the audit trail has no event of this" in cancelled.stderr
    assert (shown.returncode, "run `viralfx migrate`" in shown.stderr) == (3, True)


def test_without_a_database_it_names_the_variable() -> None:
    """Exit code 2, as of ``viralfx jobs``."""
    done = forked.viralfx("audit", environ={})
    assert (done.returncode, "DATABASE_URL: not set" in done.stderr) == (2, True)
