"""What a new user gets wrong, and the one line they are told."""

import sys
from pathlib import Path

import pytest
from tests.system.service import ROOT, command, running


def told(**environment: str) -> list[str]:
    """Return the lines that ``viralfx serve`` prints before it exits with 2."""
    result = command("serve", environment=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


def test_all_problems_are_told_at_once() -> None:
    """Several mistakes in several places give one line each."""
    lines = told(
        PORT="abc",
        SHUTDOWN_DRAIN_TIMOUT="5",
        LOG_LEVEL="info",
        READINESS_REQUIRES="Database",
        ENVIRONMENT="production",
    )

    assert lines == [
        "viralfx: SHUTDOWN_DRAIN_TIMOUT: unknown variable; did you mean SHUTDOWN_DRAIN_TIMEOUT?",
        "viralfx: PORT: 'abc' is not a whole number from 0 to 65535",
        "viralfx: LOG_LEVEL: 'info' is not one of debug, error, log, verbose, warn",
        "viralfx: READINESS_REQUIRES: 'Database' is not a list of names like one,two, or none",
        (
            "viralfx: DATABASE_URL: ENVIRONMENT=production refuses a database in memory; set it,"
            " or ALLOW_MEMORY_ADAPTERS=true to accept the loss of all data at every stop"
        ),
        (
            "viralfx: REDIS_HOST: ENVIRONMENT=production refuses a cache in memory; set it, or"
            " REDIS_SENTINEL_ENABLED=true, or ALLOW_MEMORY_ADAPTERS=true to do without Redis"
        ),
        (
            "viralfx: API_TOKEN: ENVIRONMENT=production refuses a jobs API that is open to"
            " everybody; set it"
        ),
    ]


def test_budgets_that_do_not_fit() -> None:
    """The line shows the sum and its parts."""
    lines = told(SHUTDOWN_FORCE_TIMEOUT="50000", SHUTDOWN_READINESS_DELAY="1")

    assert len(lines) == 1
    assert lines[0].startswith("viralfx: SHUTDOWN_FORCE_TIMEOUT: the phases need 50.001 s")


def test_budgets_may_equal_the_force_timeout() -> None:
    """Exactly as much as there is, is allowed."""
    environment = {"SHUTDOWN_FORCE_TIMEOUT": "50000"}

    assert command("env", environment=environment).returncode == 0


def test_an_unreadable_file(tmp_path: Path) -> None:
    """NAME_FILE that cannot be read names the path and the reason."""
    lines = told(MANAGEMENT_TOKEN_FILE=str(tmp_path / "nothing"))

    assert lines == [
        (
            f"viralfx: MANAGEMENT_TOKEN: cannot read MANAGEMENT_TOKEN_FILE={tmp_path}/nothing:"
            " No such file or directory"
        )
    ]


def test_a_state_folder_that_is_none(tmp_path: Path) -> None:
    """STATE_DIR must be a folder that exists."""
    assert told(STATE_DIR=str(tmp_path / "nothing")) == [
        f"viralfx: STATE_DIR: {tmp_path}/nothing is not a folder; create it"
    ]


def test_a_check_that_does_not_exist() -> None:
    """A list of checks is held against the checks there are."""
    assert told(HEALTH_CRITICAL="databse") == [
        "viralfx: HEALTH_CRITICAL: there is no check named 'databse'; did you mean database?"
    ]


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("nocolon", "--app: 'nocolon' must be package.module:name"),
        ("no_such_module:app", "--app: there is no module 'no_such_module'"),
        ("tests.system.apps:plaln", "--app: tests.system.apps has no 'plaln'; did you mean plain?"),
        (
            "tests.system.apps:not_an_app",
            "--app: tests.system.apps:not_an_app is not a Litestar application but a dict",
        ),
        (
            "tests.system.apps:has_health_itself",
            (
                "--app: the application answers /health itself; give it"
                " OperationsPlugin(OperationsConfig(path=...)) with a path that is free"
            ),
        ),
    ],
)
def test_an_application_that_cannot_be_served(spec: str, line: str) -> None:
    """One line says what is wrong with --app, and the exit code is 2."""
    result = command("serve", "--app", spec)

    assert (2, [f"viralfx: {line}"]) == (
        result.returncode,
        [said for said in result.stderr.splitlines() if "viralfx:" in said],
    )
    assert "Traceback" not in result.stderr


def test_an_application_with_a_mistake_in_it(tmp_path: Path) -> None:
    """The line says where the mistake is."""
    (tmp_path / "broken_application.py").write_text('"""Broken."""\n\nraise ValueError("oops")\n')
    result = command("serve", "--app", "broken_application:app", cwd=tmp_path)

    assert result.returncode == 2
    assert "ValueError: oops" in result.stderr
    assert "broken_application.py:3" in result.stderr


@pytest.mark.parametrize(
    "error", ["ValueError", "SystemExit", "ModuleNotFoundError"], ids=lambda name: f"by {name}"
)
@pytest.mark.parametrize(
    ("code", "arguments", "modules", "what"),
    [
        ("{raised}", ("serve", "--app", "betraying:app"), "", "--app: importing betraying"),
        ("{raised}", ("doctor", "--app", "betraying:app"), "", "--app: importing betraying"),
        ("def app(): {raised}", ("serve", "--app", "betraying:app"), "", "--app: calling"),
        ("{raised}", ("serve",), "betraying", "TASK_MODULES: importing betraying"),
    ],
    ids=["app", "doctor", "factory", "tasks"],
)
def test_what_foreign_code_says_is_told_without_secrets(  # noqa: PLR0917
    tmp_path: Path, error: str, code: str, arguments: tuple[str, ...], modules: str, what: str
) -> None:
    """Neither its own nor ours: a library quotes the address that it cannot use."""
    text = "bad address postgresql://app:planted-password@db/x, not planted-token"
    (tmp_path / "betraying.py").write_text(code.format(raised=f"raise {error}({text!r})"))
    environment = {"MANAGEMENT_TOKEN": "planted-token", "TASK_MODULES": modules}
    result = command(*arguments, environment=environment, cwd=tmp_path)
    said = " ".join((result.stdout + result.stderr).split())

    assert result.returncode == (1 if arguments[0] == "doctor" else 2)
    assert what in said
    assert f"{error}: bad address postgresql://***@db/x, not ***" in said
    assert "planted" not in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "TASK_MODULES: there is no module 'my_tasks'"),
        ('"""No tasks."""', "TASK_MODULES: my_tasks declares no task; put @task('...') on an"),
        ('raise ValueError("oops")', "TASK_MODULES: importing my_tasks failed: ValueError: oops ("),
        ("import nothing_at_all", "TASK_MODULES: importing my_tasks failed: ModuleNotFoundError"),
        ("raise SystemExit(0)", "TASK_MODULES: importing my_tasks failed: SystemExit: 0 ("),
        ("def broken(:", "TASK_MODULES: importing my_tasks failed: SyntaxError"),
    ],
)
def test_task_modules_that_cannot_be_used(tmp_path: Path, text: str | None, line: str) -> None:
    """One line for each, from the worker as from the service; no traceback."""
    if text is not None:
        (tmp_path / "my_tasks.py").write_text(f"{text}\n")
    environment = {"TASK_MODULES": "my_tasks,tests_nowhere.tasks"}
    for arguments, more in ((["serve"], {}), (["worker"], {"DATABASE_URL": "postgresql://db/x"})):
        result = command(*arguments, environment={**environment, **more}, cwd=tmp_path)
        first, second = result.stderr.splitlines()

        assert (result.returncode, result.stdout) == (2, "")
        assert first.startswith(f"viralfx: {line}")
        assert second == (
            "viralfx: TASK_MODULES: there is no module 'tests_nowhere', which tests_nowhere.tasks"
            " would be in"
        )


def test_tasks_that_cannot_be_used(tmp_path: Path) -> None:
    """A name twice, a queue that is none and a payload that is none are one line each."""
    (tmp_path / "my_tasks.py").write_text(
        """from viralfx import task


class Odd:
    pass


@task("one")
async def one(payload: int) -> None: ...


@task("one", queue="analitics")
async def two(payload: int) -> None: ...


@task("default.prune", queue="zzz")
async def three(payload: Odd | list[int]) -> None: ...
"""
    )
    result = command("serve", environment={"TASK_MODULES": "my_tasks"}, cwd=tmp_path)
    lines = result.stderr.splitlines()

    assert (result.returncode, len(lines)) == (2, 5)
    assert lines[0] == (
        "viralfx: @task('one'): there is no queue named 'analitics'; did you mean analytics?"
    )
    assert lines[1] == (
        "viralfx: @task('one'): there are two tasks named 'one'; rename one (my_tasks.two)"
    )
    assert lines[2].endswith(
        "there is no queue named 'zzz'; QUEUES has default, notifications, analytics"
    )
    assert lines[3].startswith("viralfx: @task('default.prune'): its payload has no JSON: ")
    assert lines[4].startswith("viralfx: @task('default.prune'): there are two tasks named")


def test_a_worker_that_could_not_work() -> None:
    """Without a database, and of a queue that is none: one line each."""
    result = command("worker", "--queue", "notification")

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        (
            "viralfx: DATABASE_URL: not set, so each process keeps its jobs in its own memory and"
            " nobody could give a worker any; set it, or run jobs in `viralfx serve`"
        ),
        "viralfx: --queue: there is no queue named 'notification'; did you mean notifications?",
    ]


@pytest.mark.parametrize("port", ["-1", "65536", "x", ""])
def test_a_port_that_is_none(port: str) -> None:
    """--port is checked like PORT."""
    result = command("serve", f"--port={port}")

    assert result.returncode == 2
    assert "is not a whole number from 0 to 65535" in result.stderr


def test_the_help_lists_what_works() -> None:
    """Every command of this version is listed and answers --help."""
    result = command("--help")

    for name in ("serve", "worker", "migrate", "doctor", "probe", "env"):
        assert f"\n    {name} " in result.stdout
        assert command(name, "--help").returncode == 0


def test_a_probe_of_nobody_fails() -> None:
    """``viralfx probe`` exits 1 when nobody answers, and 2 for an address that is none."""
    refused = command("probe", "live", "--url", "http://127.0.0.1:1")
    wrong = command("probe", "live", "--url", "localhost")

    assert (refused.returncode, wrong.returncode) == (1, 2)
    assert "refused" in refused.stderr
    assert "must look like" in wrong.stderr


def test_a_probe_of_a_running_service() -> None:
    """``viralfx probe`` finds the port in the environment, the management port first."""
    with running(management=True) as service:
        service.wait_ready()
        environment = {"PORT": "1", "MANAGEMENT_PORT": str(service.management_port)}
        results = [
            command("probe", kind, environment=environment) for kind in ("live", "ready", "startup")
        ]

    assert [result.returncode for result in results] == [0, 0, 0]
    assert '"ready":true' in results[1].stdout


def test_production_runs_in_memory_only_on_demand() -> None:
    """With ALLOW_MEMORY_ADAPTERS=true it does, and one WARN line says what that means."""
    environment = {
        "ENVIRONMENT": "production",
        "ALLOW_MEMORY_ADAPTERS": "true",
        "API_TOKEN": "planted",
    }
    with running(environment=environment) as service:
        service.wait_ready()

        assert service.get("/health").json()["environment"] == "production"
    # Not of the loop, which a busy machine may hold up.
    told = [line for line in service.output if '"context":"loop"' not in line]
    warnings = [line for line in told if '"warn"' in line]
    assert len(warnings) == 1
    assert "in memory" in warnings[0]


def test_the_module_runs_like_the_script() -> None:
    """``python -m viralfx`` and the console script are the same program."""
    script = Path(sys.executable).with_name("viralfx")

    assert script.exists()
    assert (ROOT / "src/viralfx/__main__.py").exists()
