"""The command line: its lists, output and errors."""

import errno
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from viralfx import cli
from viralfx.cli import main
from viralfx.jobs.model import JobState
from viralfx.settings import Settings, fields, show

pytestmark = pytest.mark.usefixtures("plain_environ")


def table(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Run ``viralfx env`` and return the columns by variable."""
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = lines[0]
    starts = [match.start() for match in re.finditer(r"\S+", header)]
    bounds = list(zip(starts, [*starts[1:], None], strict=True))
    rows = [[line[start:end].strip() for start, end in bounds] for line in lines]
    assert rows[0] == ["name", "default", "value", "meaning", "source"]
    return {row[0]: row[1:] for row in rows[1:]}


# -- env -------------------------------------------------------------------------------------


def test_env_lists_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row has the default, the value in force, the meaning and the source."""
    defaults = Settings()

    assert {
        field.variable: [
            show(field.default),
            show(field.of(defaults)),
            field.meaning,
            "default",
        ]
        for field in fields()
    } == table(capsys)


def test_env_shows_the_source_of_a_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The source is the environment, a file or the default."""
    (tmp_path / "level").write_text("warn\n")
    monkeypatch.setenv("PORT", "8080")
    monkeypatch.setenv("LOG_LEVEL_FILE", str(tmp_path / "level"))
    rows = table(capsys)

    assert [*rows["PORT"][:2], rows["PORT"][3]] == ["3000", "8080", "environment"]
    assert ["log", "warn", f"file {tmp_path}/level"] == [
        *rows["LOG_LEVEL"][:2],
        rows["LOG_LEVEL"][3],
    ]
    assert rows["HOST"][3] == "default"


@pytest.mark.parametrize("arguments", [["env"], ["env", "--markdown"]], ids=" ".join)
def test_env_masks_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """A secret is shown as ``***``."""
    monkeypatch.setenv("MANAGEMENT_TOKEN", "hunter2")
    main(arguments)
    out, err = capsys.readouterr()

    assert "hunter2" not in out + err
    assert "***" in out


def test_env_markdown_has_the_contracts_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of name, default, value and meaning, ready for a document."""
    assert main(["env", "--markdown"]) == 0
    header, rule, *rows = capsys.readouterr().out.splitlines()

    assert (header, rule) == ("| name | default | value | meaning |", "|---|---|---|---|")
    assert [field.variable for field in fields()] == [row.split(" | ")[0][2:] for row in rows]
    assert {5} == {row.count("|") for row in rows}
    assert all(row.startswith("| ") and row.endswith(" |") for row in rows)


def test_env_with_invalid_variables_prints_every_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line per problem on standard error, exit code 2, nothing on standard output."""
    monkeypatch.setenv("PORT", "http")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    monkeypatch.setenv("SHUTDOWN_DRAIN_TIMOUT", "1")
    code = main(["env"])
    out, err = capsys.readouterr()

    assert (code, out, len(err.splitlines())) == (2, "", 3)
    assert all(line.startswith("viralfx: ") for line in err.splitlines())


def test_env_lists_the_variables_beside_a_typing_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list shows the right name; standard error has the line of the other commands."""
    monkeypatch.setenv("SHUTDOWN_DRAIN_TIMOUT", "1")
    code = main(["env"])
    out, err = capsys.readouterr()

    assert code == 0
    assert "\nSHUTDOWN_DRAIN_TIMEOUT " in out
    assert err == (
        "viralfx: SHUTDOWN_DRAIN_TIMOUT: unknown variable; did you mean SHUTDOWN_DRAIN_TIMEOUT?\n"
    )


# -- help and arguments ----------------------------------------------------------------------


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """It lists exactly the implemented commands."""
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out

    assert caught.value.code == 0
    assert re.findall(r"^ {4}(\w+)\s", out, re.MULTILINE) == [
        "serve",
        "worker",
        "migrate",
        "doctor",
        "probe",
        "env",
        "jobs",
        "audit",
    ]


@pytest.mark.parametrize(
    "command",
    ["serve", "worker", "migrate", "doctor", "probe", "env", "jobs", "audit"],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 0."""
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])

    assert caught.value.code == 0
    assert f"usage: viralfx {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["migrat"],
        ["serve", "--port", "http"],
        ["serve", "--port", "65536"],
        ["serve", "--port", "-1"],
        ["serve", "--port", "٣"],
        ["serve", "--workers", "4"],
        ["worker", "--queue"],
        ["worker", "default"],
        ["env", "--json"],
        ["jobs", "submit", "parcels.ship", "1", "--priority", "101"],
        ["jobs", "submit", "parcels.ship", "1", "--priority", "high"],
        ["jobs", "submit", "parcels.ship", "1", "--priority", "1_0"],
        ["jobs", "submit", "parcels.ship", "1", "--priority", "٣"],
        ["jobs", "list", "--limit", " 5 "],
        ["jobs", "list", "--limit", "9" * 5000],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_invalid_arguments_are_rejected(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 2, with the usage and without a traceback."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()

    assert (caught.value.code, out) == (2, "")
    assert err.startswith("usage: viralfx")


def test_a_filter_takes_every_state_of_a_job() -> None:
    """The command line lists the states itself, because it imports no module of jobs."""
    assert list(cli._STATES) == list(JobState)


# -- worker ----------------------------------------------------------------------------------


def worker_errors(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Return the lines with which ``viralfx worker`` exits before its start."""
    assert main(["worker", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


MEMORY = (
    "viralfx: DATABASE_URL: not set, so each process keeps its jobs in its own memory, where a"
    " separate worker cannot find them; set it, or run jobs in `viralfx serve`"
)


def test_a_worker_needs_a_database(capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs in memory are in another process."""
    assert worker_errors(capsys) == [MEMORY]


def test_an_unknown_queue_is_rejected_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All unknown queues are reported at once, together with other problems."""
    arguments = ("--queue", "defualt", "--queue", "analytics", "--queue", "zzz")
    first = "viralfx: --queue: there is no queue named 'defualt'; did you mean default?"
    second = (
        "viralfx: --queue: there is no queue named 'zzz'; QUEUES=default,notifications,analytics"
    )

    assert worker_errors(capsys, *arguments) == [MEMORY, first, second]

    monkeypatch.setenv("DATABASE_URL", "postgresql://db/app")

    assert worker_errors(capsys, *arguments) == [first, second]


# -- webhook-key -----------------------------------------------------------------------------

WEBHOOK_SECRET, OWN_KEY = "whsec_" + "c2Vj" * 8, "whsec_" + "b3du" * 8
RECEIVER = "https://hooks.example.com/in"


def test_a_receiver_gets_its_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for each key that signs: derived ones, a configured one, and that of alerts."""

    def printed(*arguments: str) -> list[str]:
        assert main(["webhook-key", *arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.splitlines()

    monkeypatch.setenv("WEBHOOK_SECRET", WEBHOOK_SECRET)
    (key,) = printed(RECEIVER)
    monkeypatch.setenv("WEBHOOK_SECRET", f"{OWN_KEY},{WEBHOOK_SECRET}")
    assert printed(RECEIVER)[1:] == [key]
    assert key not in printed("https://other.example.com/")
    assert key not in printed("--alerts", RECEIVER)
    monkeypatch.setenv("WEBHOOK_KEYS", f"hooks.example.com={OWN_KEY}")
    monkeypatch.setenv("ALERT_WEBHOOK_SECRET", OWN_KEY)
    assert printed(RECEIVER) == [OWN_KEY]
    assert printed("--alerts", RECEIVER) == [OWN_KEY]


def test_a_receiver_without_a_key_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As is a URL that no webhook can have."""
    assert main(["webhook-key", RECEIVER]) == 2
    assert capsys.readouterr().err.startswith("viralfx: WEBHOOK_SECRET is not set")
    monkeypatch.setenv("WEBHOOK_SECRET", WEBHOOK_SECRET)
    assert main(["webhook-key", "nonsense"]) == 2
    assert capsys.readouterr() == (
        "",
        "viralfx: the URL must be https://host/path, without a fragment\n",
    )


# -- as a process ----------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the module as a program with a plain environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_the_module_is_the_command() -> None:
    """``python -m viralfx`` does what ``viralfx`` does."""
    done = run("-m", "viralfx", "env", "--markdown")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("| name |")


def test_probe_imports_no_framework() -> None:
    """A probe that runs every few seconds must not load the framework."""
    done = run(
        "-c",
        "import sys; from viralfx.cli import main;"
        " main(['probe', 'live', '--url', 'http://127.0.0.1:9', '--timeout', '0.1']);"
        " print(sorted({'litestar', 'uvicorn', 'structlog', 'psutil'} & set(sys.modules)))",
    )

    assert done.stdout == "[]\n"


def test_the_package_imports_the_framework_lazily() -> None:
    """Public names that need Litestar import it at their first use."""
    done = run(
        "-c",
        "import sys, viralfx; before = 'litestar' in sys.modules;"
        " viralfx.OperationsPlugin; print(before, 'litestar' in sys.modules)",
    )

    assert done.stdout == "False True\n"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """It is that of the distribution, and needs no command."""
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])

    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"viralfx {version('viralfx')}\n"


def test_the_version_is_looked_up_lazily() -> None:
    """A program that does not ask for it does not pay for it."""
    done = run(
        "-I",
        "-c",
        "import sys, viralfx; before = 'importlib.metadata' in sys.modules;"
        " print(before, viralfx.__version__)",
    )

    assert done.stdout == f"False {version('viralfx')}\n"


def test_a_closed_output_pipe_is_no_error() -> None:
    """``viralfx env | head -1`` exits with 0 and without an error message."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "viralfx", "env"],
            env={"PATH": os.environ["PATH"]},
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
            timeout=30,
        )
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (0, b"")


def taking_nothing(how: str) -> int:
    """Return a descriptor whose writes fail."""
    if how == "full":
        return os.open("/dev/full", os.O_WRONLY)
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("how", "redirection", "unbuffered"),
    [
        *(("gone", "", ""), ("gone", "", "1"), ("full", "", ""), ("full", "", "1")),
        *(("closed", "", ""), ("closed", ">&-", "")),
    ],
)
def test_errors_that_cannot_be_written_change_no_exit_code(
    how: str, redirection: str, unbuffered: str
) -> None:
    """Neither those of an argument nor those of a variable; they are not in the output."""
    if how == "closed":
        redirection += " 2>&-"
    for arguments in (["jobs", "list", "--bad"], ["jobs", "list"]):
        command = (sys.executable, *arguments)
        errors = taking_nothing(how) if how != "closed" else subprocess.DEVNULL
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", f'exec "$0" -m viralfx "$@" {redirection}', *command],
                env={"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": unbuffered},
                stdout=subprocess.PIPE,
                stderr=errors,
                check=False,
                timeout=30,
            )
        finally:
            if how != "closed":
                os.close(errors)

        assert (done.returncode, done.stdout) == (2, b"")


def test_a_full_disk_is_not_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a service, or under a file: such an error is not one of the printed lines."""

    def fail(_: object) -> int:
        raise OSError(errno.ENOSPC, "planted")

    def fail_in_file(_: object) -> int:
        raise OSError(errno.ENOSPC, "planted", "cache")

    monkeypatch.setattr(cli, "_serve", fail)
    monkeypatch.setattr(cli, "_doctor", fail_in_file)
    for command in ("serve", "doctor"):
        with pytest.raises(OSError, match="planted"):
            main([command])
