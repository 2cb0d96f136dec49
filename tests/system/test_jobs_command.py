"""``viralfx jobs``: an operator's view of the ledger, without a service."""

import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest.mock import Mock, patch

import pytest
from tests.servers.postgres import Database
from tests.system.service import clean_environment, command
from tests.system.workers import environment_of

from viralfx.cli import main
from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.bulk import BulkCount
from viralfx.jobs.ledger import Found
from viralfx.jobs.model import Job, JobFilter
from viralfx.jobs.service import JobService

NOWHERE = "01a214b8-8af2-7a9b-8393-0890f8feb712"
SECONDS = 60.0


class Terminal(io.StringIO):
    """Standard input of a person."""

    def isatty(self) -> bool:
        """Return True."""
        return True


class Shell:
    """Runs commands on a database, in this process: there are many, and each start is slow."""

    def __init__(self, database: Database) -> None:
        self.environment = environment_of(database)

    def run(
        self, *arguments: str, columns: int | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, with ``columns`` in a terminal of that width."""
        output, errors = io.StringIO(), io.StringIO()
        output.isatty = lambda: columns is not None  # type: ignore[method-assign]
        environ = {**clean_environment(), **self.environment, "COLUMNS": str(columns), **more}
        with (
            patch.dict(os.environ, environ, clear=True),
            redirect_stdout(output),
            redirect_stderr(errors),
        ):
            try:
                code = main(["jobs", *arguments])
            except SystemExit as error:
                code = int(error.code or 0)
        return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())

    def json(self, *arguments: str) -> Any:
        """Run a command that succeeds; return its JSON."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fails(self, code: int, *arguments: str) -> str:
        """Run a command that fails; return its lines of errors."""
        done = self.run(*arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        return done.stderr


@pytest.mark.each_python
def test_jobs_are_submitted_listed_shown_and_cancelled(database: Database) -> None:
    """For people as a table, and for programs as the API's JSON."""
    shell = Shell(database)
    first = shell.json("submit", "parcels.echo", '{"text": "\\u001b[31mred\\u009b"}', "--key", "k")
    again = shell.run("submit", "parcels.echo", '{"text": "\\u001b[31mred\\u009b"}', "--key", "k")
    later = shell.json("submit", "elsewhere.run", "[1]", "--queue", "default", "--priority", "7")
    table = shell.run("list").stdout
    narrow = shell.run("list", columns=60).stdout
    page = shell.json("list", "--queue", "default", "--state", "waiting")
    older = shell.json("list", "--cursor", later["id"], "--limit", "1")
    shown = shell.run("show", first["id"]).stdout
    cancelled = shell.run("cancel", later["id"])

    assert first["id"] in again.stdout
    assert "there was a job like it" in again.stderr
    assert [line.split()[:4] for line in table.splitlines()] == [
        ["id", "task", "queue", "state"],
        [later["id"], "elsewhere.run", "default", "waiting"],
        [first["id"], "parcels.echo", "analytics", "waiting"],
    ]
    assert [len(line) for line in narrow.splitlines()] == [60, 60, 60]
    assert all(line.endswith("…") for line in narrow.splitlines())
    assert [job["id"] for job in page["items"]] == [later["id"]]
    assert [job["id"] for job in older["items"]] == [first["id"]]
    assert re.search(r"^task +parcels.echo$", shown, re.MULTILINE)
    assert all(each.isprintable() for each in shown.replace("\n", ""))
    assert cancelled.stdout == f"{later['id']}  cancelled\n"
    found = shell.json("show", later["id"])
    assert (found["state"], found["priority"], found["payload"]) == ("cancelled", 7, [1])
    tasks = [each["task"] for each in shell.json("schedules")["items"]]
    assert "default.prune" in tasks
    assert shell.run("schedules").stdout.split()[:2] == ["task", "cron"]


def test_many_jobs_are_changed_on_confirmation(database: Database) -> None:
    """A filter that matches several needs --yes; one job needs none."""
    shell = Shell(database)
    ids = [shell.json("submit", "parcels.echo", str(number))["id"] for number in range(2)]
    other = shell.json("submit", "elsewhere.run", "1", "--queue", "default")["id"]
    with patch.object(sys, "stdin", Terminal("n\n")):
        declined = shell.fails(1, "cancel", "--task", "parcels.echo")
    refused = shell.fails(2, "cancel", "--task", "parcels.echo")
    one = shell.run("cancel", "--queue", "default")
    both = shell.json("cancel", "--task", "parcels.echo", "--before", "2999-01-01T00:00Z", "--yes")
    none = shell.run("retry", "--code", "error")
    misspelt = shell.run("retry", "--task", "parcels.eco")
    known = shell.run("retry", "--task", "parcels.echo")
    nothing = shell.run("list", "--state", "failed")

    assert "the filter matches 2 jobs; repeat it with --yes" in refused
    assert declined == "cancel 2 jobs? [y/N] viralfx: nothing was changed\n"
    assert nothing.stderr == "no job matches\n"
    assert (one.stdout, both, none.stdout) == (
        "1 job\n",
        {"count": 2, "more": False},
        "0 jobs\n",
    )
    assert none.stderr == known.stderr == ""
    assert misspelt.stderr == "no job of a task 'parcels.eco' was found in any state\n"
    cancelled = shell.json("list", "--state", "cancelled")
    assert {job["id"] for job in cancelled["items"]} == {*ids, other}
    assert "pass ids, or a filter" in shell.fails(2, "retry")
    assert "not both" in shell.fails(2, "retry", ids[0], "--queue", "default")
    assert "only jobs that are failed" in shell.fails(2, "retry", "--state", "waiting")


def test_waiting_jobs_are_run_now(database: Database) -> None:
    """Several at once; a job in another state is refused, and the others are run."""
    shell = Shell(database)
    at = ("--run-at", "2999-01-01T00:00:00Z")
    ids = [shell.json("submit", "parcels.echo", str(n), *at)["id"] for n in range(3)]
    shell.run("cancel", ids[1])
    done = shell.run("run", *ids)
    (shown,) = shell.json("run", ids[0])

    assert done.stdout == f"{ids[0]}  waiting\n{ids[2]}  waiting\n"
    assert done.returncode == 1
    assert "is cancelled; only one that is waiting can be run now" in done.stderr
    assert shown["runAt"] < "2999"


def test_a_job_has_the_queue_and_attempts_of_its_options(database: Database) -> None:
    """Its task is declared for another queue."""
    shell = Shell(database)
    options = ("--queue", "notifications", "--max-attempts", "7")
    job_id = shell.json("submit", "parcels.echo", "1", *options)["id"]
    shown = shell.json("show", job_id)

    assert (shown["queue"], shown["maxAttempts"]) == ("notifications", 7)


def test_a_schedule_is_paused_run_and_resumed(database: Database) -> None:
    """By the task; the table of schedules shows the pause."""
    shell = Shell(database)
    paused = shell.run("pause", "--schedule", "default.prune")
    table = shell.run("schedules").stdout
    job = shell.json("run", "--schedule", "default.prune")
    resumed = shell.json("resume", "--schedule", "default.prune")

    assert (paused.stdout, paused.stderr) == ("default.prune  paused\n", "")
    assert re.search(r"^default\.prune .* paused$", table, re.MULTILINE)
    assert (job["queue"], job["state"]) == ("default", "waiting")
    assert (resumed["task"], resumed["paused"]) == ("default.prune", False)
    assert [each["task"] for each in shell.json("list")["items"]] == ["default.prune"]


def test_redis_is_not_needed(database: Database) -> None:
    """A notification that cannot be sent costs no time: workers poll."""
    shell = Shell(database)
    done = shell.run("submit", "parcels.echo", "1", REDIS_HOST="127.0.0.1", REDIS_PORT="1")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("parcels.echo in analytics, waiting\n")


def test_a_queue_is_paused_and_resumed(database: Database) -> None:
    """An unknown queue is an error."""
    shell = Shell(database)
    paused = shell.run("pause", "analytics")
    resumed = shell.json("resume", "analytics")

    assert (paused.stdout, paused.stderr) == ("analytics  paused\n", "")
    assert resumed == {"queue": "analytics", "paused": False}
    assert "no queue 'analytic'" in shell.fails(2, "pause", "analytic")


def test_a_queue_that_only_the_ledger_knows_is_no_mistake(database: Database) -> None:
    """The environment of an operator seldom has QUEUES."""
    shell = Shell(database)
    arguments = ("submit", "reports.write", "1", "--queue", "reports")
    unknown = shell.fails(2, *arguments)
    shell.environment["QUEUES"] = "default,notifications,analytics,reports"
    first = shell.json(*arguments)["id"]
    del shell.environment["QUEUES"]
    second = shell.json(*arguments)["id"]
    listed = shell.json("list", "--queue", "reports")
    shell.run("pause", "reports", "--wait")
    found = {each["name"]: each for each in shell.json("queues")["items"]}
    table = [line.split() for line in shell.run("queues").stdout.splitlines()]

    assert "there is no queue named 'reports'" in unknown
    assert {job["id"] for job in listed["items"]} == {first, second}
    assert found["reports"]["paused"]
    assert (found["reports"]["counts"]["waiting"], found["default"]["paused"]) == (2, False)
    assert table[0][:4] == ["queue", "paused", "consumers", "waiting"]
    assert ["reports", "paused", "0", "2"] in [row[:4] for row in table]
    assert shell.json("cancel", "--queue", "reports", "--yes") == {
        "count": 2,
        "more": False,
    }


def test_a_task_of_an_application_is_submitted(database: Database) -> None:
    """With the options of @task, and a payload of its type."""
    environment = Shell(database).environment | {"STEPS": os.devnull}
    arguments = ("jobs", "submit", "app.follow", "--app", "tests.system.worker_app:app")
    done = command(*arguments, "17", environment=environment)
    refused = command(*arguments, '"many"', environment=environment)

    assert (done.returncode, "app.follow in default, waiting" in done.stdout) == (0, True)
    assert (refused.returncode, "Expected `int`" in refused.stderr) == (2, True)


def test_mistakes_get_one_line_each(database: Database) -> None:
    """With the exit code 1 for a job's state, 2 for an argument, and 3 for the ledger."""
    shell = Shell(database)
    job_id = shell.json("submit", "parcels.echo", "1")["id"]
    missing = "01a214b8-8af2-7a9b-8393-0890f8feb712"

    assert shell.fails(1, "show", missing) == f"viralfx: there is no job {missing}\n"
    refused = shell.fails(1, "retry", job_id, missing).splitlines()
    assert refused == [
        f"viralfx: job {job_id} is waiting; only one that is failed can be retried",
        f"viralfx: there is no job {missing}",
    ]
    assert "did you mean parcels.echo?" in shell.fails(2, "submit", "parcels.ecko", "1")
    assert "pass --queue" in shell.fails(2, "submit", "else.where", "1")
    assert "no queue named 'nope'" in shell.fails(2, "submit", "x", "1", "--queue", "nope")
    assert "is not a number from 1 to 10000" in shell.fails(
        2, "submit", "parcels.echo", "1", "--max-attempts", "0"
    )
    assert "no task 'default.prun' has a schedule; did you mean default.prune?" in shell.fails(
        2, "pause", "--schedule", "default.prun"
    )
    assert "--wait is for a queue" in shell.fails(
        2, "pause", "--wait", "--schedule", "default.prune"
    )
    assert "not allowed with argument" in shell.fails(2, "resume", "q", "--schedule", "t")
    assert "one of the arguments" in shell.fails(2, "run")
    assert shell.fails(1, "run", missing) == f"viralfx: there is no job {missing}\n"
    assert "is not the id of a job" in shell.fails(2, "show", "17")
    assert "is not a time with a time zone" in shell.fails(
        2, "submit", "parcels.echo", "1", "--run-at", "2026-01-01T00:00:00"
    )
    assert "no queue 'nope'" in shell.fails(2, "list", "--queue", "nope")
    malformed = shell.fails(2, "submit", "parcels.echo", "{")
    assert malformed.startswith("viralfx: jobs submit parcels.echo: ")
    assert "the payload is JSON, such as " in malformed
    assert "is not empty" in shell.fails(2, "submit", "parcels.echo", "1", "--key", "")
    assert "belong to the names of TOKENS" in shell.fails(
        2, "submit", "parcels.echo", "1", "--key", "@ann 17"
    )
    without = command("jobs", "list")
    assert (without.returncode, "DATABASE_URL: not set" in without.stderr) == (2, True)
    nowhere = {"DATABASE_URL": "postgresql://u@127.0.0.1:1/x"}
    unreachable = command("jobs", "list", environment=nowhere)
    assert (unreachable.returncode, "after 1 attempt" in unreachable.stderr) == (3, True)
    assert len(unreachable.stderr.splitlines()) == 1


# -- input and output that fail ------------------------------------------------------------------


def started(shell: Shell, *arguments: str | bytes, **streams: Any) -> subprocess.Popen[bytes]:
    """Start a command as a process, with its standard streams."""
    return subprocess.Popen(
        [sys.executable, "-m", "viralfx", "jobs", *arguments],
        env={**clean_environment(), **shell.environment},
        **{"stderr": subprocess.PIPE, **streams},
    )


def test_output_that_cannot_be_written_is_a_failure(database: Database) -> None:
    """With one line; a reader that has gone is none, but hides no refusal."""
    shell = Shell(database)
    job_id = shell.json("submit", "parcels.echo", "1")["id"]
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        process = started(shell, "list", stdout=full)
        _, errors = process.communicate(timeout=SECONDS)
    reader, writer = os.pipe()
    os.close(reader)
    gone = started(shell, "cancel", job_id, NOWHERE, stdout=writer)
    os.close(writer)
    _, refused = gone.communicate(timeout=SECONDS)
    closed = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -m viralfx jobs list >&-', sys.executable],
        env={**clean_environment(), **shell.environment},
        stderr=subprocess.PIPE,
        timeout=SECONDS,
        check=False,
    )

    assert errors == b"viralfx: cannot write the output: No space left on device\n"
    assert process.returncode == 1
    assert (gone.returncode, refused) == (1, f"viralfx: there is no job {NOWHERE}\n".encode())
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_arguments_and_input_that_are_no_text(database: Database) -> None:
    """Each is an invalid argument, with one line."""
    shell = Shell(database)
    unreadable = started(shell, "list", "--task", b"\xff")
    _, errors = unreadable.communicate(timeout=SECONDS)
    with patch.object(sys, "stdin", None):
        closed = shell.fails(2, "submit", "parcels.echo", "-")

    assert (unreadable.returncode, errors) == (2, b"viralfx: an argument is not UTF-8\n")
    assert closed == "viralfx: jobs submit: standard input is closed\n"
    for time in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59-12:00"):
        message = shell.fails(2, "submit", "parcels.echo", "1", "--run-at", time)
        assert "from 0001-01-02 to 9999-12-30" in message


def test_an_interrupt_ends_the_question(database: Database) -> None:
    """At once, and nothing is changed; no answer, or one that is no text, is no."""
    shell = Shell(database)
    for number in range(2):
        shell.json("submit", "parcels.echo", str(number))
    terminal, stdin = pty.openpty()
    process = started(shell, "cancel", "--task", "parcels.echo", stdin=stdin)
    os.close(stdin)
    assert process.stderr is not None
    asked = b""
    while not asked.endswith(b"[y/N] "):
        asked += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)
    os.close(terminal)
    hung_up = Mock(**{"isatty.return_value": True, "readline.side_effect": OSError(errno.EIO, "x")})
    with patch.object(sys, "stdin", hung_up):
        closed = shell.fails(1, "cancel", "--task", "parcels.echo")
    answer = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    with patch.object(sys, "stdin", answer), patch.object(answer, "isatty", lambda: True):
        unreadable = shell.fails(1, "cancel", "--task", "parcels.echo")

    assert (process.returncode, errors) == (130, b"viralfx: interrupted\n")
    for each in (closed, unreadable):
        assert each == "cancel 2 jobs? [y/N] viralfx: nothing was changed\n"
    assert len(shell.json("list", "--state", "waiting")["items"]) == 2


def test_no_more_jobs_are_changed_than_the_question_showed(database: Database) -> None:
    """Also if more match by the time of the answer; the command says so."""
    shell = Shell(database)

    def answer() -> str:
        for number in range(3):
            database.execute(f"select viralfx_ops.enqueue('parcels.echo', '{number}')")
        return "y\n"

    slow = Mock(**{"isatty.return_value": True, "readline.side_effect": answer})
    for number in range(2):
        shell.json("submit", "parcels.echo", str(number))
    with patch.object(sys, "stdin", slow):
        done = shell.run("cancel", "--task", "parcels.echo", "--json")

    assert json.loads(done.stdout) == {"count": 2, "more": True}
    assert done.stderr.endswith("more jobs match by now; repeat the command\n")
    assert len(shell.json("list", "--state", "waiting")["items"]) == 3


def test_an_outage_after_a_change_does_not_hide_it(database: Database) -> None:
    """Whether more jobs match is not known then; one within the change ends with its number."""
    shell = Shell(database)
    for number in range(2):
        shell.json("submit", "parcels.echo", str(number))
    search, cancel_all = JobService.search, JobService.cancel_all
    changed = False

    async def change(self: JobService, wanted: JobFilter, **options: Any) -> BulkCount:
        nonlocal changed
        changed = True
        return await cancel_all(self, wanted, **options)

    async def cut_off(self: JobService, wanted: JobFilter) -> Found:
        if changed:
            raise LedgerUnavailableError("planted")
        return await search(self, wanted)

    with (
        patch.object(JobService, "cancel_all", change),
        patch.object(JobService, "search", cut_off),
        patch.object(sys, "stdin", Terminal("y\n")),
    ):
        done = shell.run("cancel", "--task", "parcels.echo", "--json")

    assert (done.returncode, json.loads(done.stdout)) == (0, {"count": 2, "more": True})
    assert done.stderr.endswith("more jobs may match by now; repeat the command\n")


def test_jobs_that_end_already_do_not_hide_the_others(database: Database) -> None:
    """The question counts the jobs behind any number of them."""
    shell = Shell(database)
    database.execute(
        "select viralfx_ops.enqueue('parcels.echo', to_jsonb(n)) from generate_series(1, 1003) n"
    )
    database.execute(
        "update viralfx_ops.viralfx_jobs set state = 'active', worker = 'planted',"
        " started_at = now(), cancel_requested = id > (select id from viralfx_ops.viralfx_jobs"
        " order by id limit 1 offset 1)"
    )

    assert "the filter matches 2 jobs; repeat it with --yes" in shell.fails(
        2, "cancel", "--state", "active"
    )


def test_jobs_that_were_changed_before_an_outage_are_shown(database: Database) -> None:
    """The exit code is that of the outage."""
    shell = Shell(database)
    ids = [shell.json("submit", "parcels.echo", str(number))["id"] for number in range(2)]
    cancel = JobService.cancel

    async def cut_off(self: JobService, job_id: str) -> Job:
        if job_id == ids[1]:
            raise LedgerUnavailableError("planted")
        return await cancel(self, job_id)

    with patch.object(JobService, "cancel", cut_off):
        done = shell.run("cancel", *ids)

    assert (done.returncode, done.stdout) == (3, f"{ids[0]}  cancelled\n")
    assert done.stderr == "viralfx: DATABASE_URL: planted\n"


def test_a_ledger_that_refuses_a_job_is_one_line(database: Database) -> None:
    """Like that of a user without rights: the arguments are not to blame."""
    shell = Shell(database)
    database.execute(
        """create function refuse() returns trigger language plpgsql as $$
        begin raise insufficient_privilege using message = 'planted'; end $$"""
    )
    database.execute(
        "create trigger refuse before insert or update on viralfx_ops.viralfx_jobs"
        " for each statement execute function refuse()"
    )
    submitted = shell.fails(3, "submit", "parcels.echo", "1")
    run = shell.fails(3, "run", "--schedule", "default.prune")

    assert submitted == run == "viralfx: DATABASE_URL: planted (SQLSTATE 42501)\n"


def test_an_argument_that_the_ledger_refuses_is_named(database: Database) -> None:
    """The exit code is that of an invalid argument, also of a payload that Python cannot decode."""
    shell = Shell(database)
    key = shell.fails(2, "submit", "parcels.echo", "1", "--key", "k" * 2001)
    task = shell.fails(2, "submit", os.urandom(40_000).hex(), "1", "--queue", "default")
    deep = shell.fails(2, "submit", "parcels.echo", "[" * 20_000 + "]" * 20_000)

    assert "submit parcels.echo: the job cannot be stored: an idempotency key has at most" in key
    assert re.search(r"submit [0-9a-f]+: the job cannot be stored: index row", task)
    assert deep == "viralfx: jobs submit parcels.echo: it is nested more than 500 levels deep\n"


def test_a_job_with_a_deep_payload_is_shown(database: Database) -> None:
    """SQL accepts one that Python does not decode."""
    shell = Shell(database)
    payload = "[" * 2000 + "]" * 2000
    rows = database.execute(f"select viralfx_ops.enqueue('t', '{payload}')")
    shown = shell.run("show", str(rows[0][0]), "--json")

    assert (shown.returncode, shown.stderr) == (0, "")
    assert f'"payload":{payload}' in shown.stdout
