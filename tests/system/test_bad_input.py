"""Mistakes of new users, and the one line of error that each one gets."""

import sys
from pathlib import Path

import pytest
from tests.system.jobs import JOBS
from tests.system.service import ROOT, command, running


def error_lines(**environment: str) -> list[str]:
    """Return the error lines of ``viralfx serve``, which exits with 2."""
    result = command("serve", environment=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


def test_all_problems_are_reported_at_once() -> None:
    """Several mistakes in several places give one line each."""
    lines = error_lines(
        PORT="abc",
        SHUTDOWN_DRAIN_TIMOUT="5",
        LOG_LEVEL="loud",
        READINESS_REQUIRES="Database",
        ENVIRONMENT="production",
    )

    assert lines == [
        "viralfx: SHUTDOWN_DRAIN_TIMOUT: unknown variable; did you mean SHUTDOWN_DRAIN_TIMEOUT?",
        "viralfx: PORT: 'abc' is not a whole number from 0 to 65535",
        "viralfx: LOG_LEVEL: 'loud' is not one of debug, error, log, verbose, warn",
        "viralfx: READINESS_REQUIRES: 'Database' is not a list of names like one,two, or none",
        (
            "viralfx: DATABASE_URL: ENVIRONMENT=production refuses to keep jobs in memory; set it,"
            " or ALLOW_MEMORY_ADAPTERS=true to accept the loss of all data at every stop"
        ),
        "viralfx: API_TOKEN: ENVIRONMENT=production refuses a jobs API without a token; set it",
    ]


def test_an_open_jobs_api_beyond_this_machine() -> None:
    """Without a token the service starts on loopback alone, and names each remedy."""
    assert error_lines(HOST="0.0.0.0") == [  # noqa: S104 - the start is refused
        (
            "viralfx: API_TOKEN: HOST=0.0.0.0 serves a jobs API without a token to other machines;"
            " set API_TOKEN, or HOST=127.0.0.1, or ALLOW_OPEN_API=true to accept jobs from all of"
            " them"
        )
    ]


def test_a_near_miss_of_production() -> None:
    """A typing error does not open the service."""
    assert error_lines(
        ENVIRONMENT="prod", ALLOW_MEMORY_ADAPTERS="true", API_TOKEN="a1b2c3d4e5f6g7h8"
    ) == [
        (
            "viralfx: ENVIRONMENT: 'prod' is not production; did you mean production? Any other"
            " word has the rules of production"
        )
    ]


def test_budgets_that_do_not_fit() -> None:
    """The line shows the sum and its parts."""
    lines = error_lines(SHUTDOWN_FORCE_TIMEOUT="50000", SHUTDOWN_READINESS_DELAY="1")

    assert len(lines) == 1
    assert lines[0].startswith("viralfx: SHUTDOWN_FORCE_TIMEOUT: the phases need 50.001 s")


def test_budgets_may_equal_the_force_timeout() -> None:
    """Budgets that sum up to exactly the force timeout are valid."""
    environment = {"SHUTDOWN_FORCE_TIMEOUT": "50000"}

    assert command("env", environment=environment).returncode == 0


def test_an_unreadable_file(tmp_path: Path) -> None:
    """An unreadable NAME_FILE gives a line with the path and the reason."""
    lines = error_lines(MANAGEMENT_TOKEN_FILE=str(tmp_path / "nothing"))

    assert lines == [
        (
            f"viralfx: MANAGEMENT_TOKEN: cannot read MANAGEMENT_TOKEN_FILE={tmp_path}/nothing:"
            " No such file or directory"
        )
    ]


def test_a_missing_state_folder(tmp_path: Path) -> None:
    """STATE_DIR must be a folder that exists."""
    assert error_lines(STATE_DIR=str(tmp_path / "nothing")) == [
        f"viralfx: STATE_DIR: {tmp_path}/nothing is not a folder; create it"
    ]


def test_a_check_that_does_not_exist() -> None:
    """Names in a list of checks must be registered checks."""
    assert error_lines(HEALTH_CRITICAL="databse") == [
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
            "--app: tests.system.apps:not_an_app is not an ASGI application but a dict",
        ),
        (
            "tests.system.taskiq_app:broker",
            (
                "--app: tests.system.taskiq_app:broker is a LedgerBroker, which has tasks and no"
                " routes; run them with `viralfx worker --app tests.system.taskiq_app:broker`, or"
                " name its module in TASK_MODULES"
            ),
        ),
        (
            "tests.system.apps:Foreign",
            (
                "--app: tests.system.apps:Foreign is not an ASGI application but a class; name an"
                " instance of Foreign"
            ),
        ),
        (
            "tests.system.apps:has_health_itself",
            (
                "--app: the application answers /health itself; add"
                " OperationsPlugin(OperationsConfig(path=...)) with an unused path to it"
            ),
        ),
    ],
)
def test_an_application_that_cannot_be_served(spec: str, line: str) -> None:
    """One line names the mistake in --app, and the exit code is 2."""
    result = command("serve", "--app", spec)

    assert (2, [f"viralfx: {line}"]) == (
        result.returncode,
        [said for said in result.stderr.splitlines() if "viralfx:" in said],
    )
    assert "Traceback" not in result.stderr


def test_an_application_with_a_mistake_in_it(tmp_path: Path) -> None:
    """The line names the file and line of the mistake."""
    (tmp_path / "broken_application.py").write_text('"""Broken."""\n\nraise ValueError("oops")\n')
    result = command("serve", "--app", "broken_application:app", cwd=tmp_path)

    assert result.returncode == 2
    assert "ValueError: oops" in result.stderr
    assert "broken_application.py:3" in result.stderr


@pytest.mark.each_python
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
def test_errors_of_foreign_code_are_logged_without_secrets(  # noqa: PLR0917
    tmp_path: Path, error: str, code: str, arguments: tuple[str, ...], modules: str, what: str
) -> None:
    """If a library quotes an address in its error text, secrets are redacted."""
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
    """One line for each, from the worker and from the service, without a traceback."""
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
    """A duplicate name, an unknown queue and an invalid payload type give one line each."""
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
    place = f"({tmp_path / 'my_tasks.py'}:12)"
    assert lines[0] == (
        "viralfx: @task('one'): there is no queue named 'analitics'; did you mean analytics?"
        f" {place}"
    )
    assert lines[1] == (
        f"viralfx: @task('one'): there are two tasks named 'one'; rename one {place}"
    )
    assert " add it to QUEUES, which has default, notifications, analytics (" in lines[2]
    assert lines[3].startswith("viralfx: @task('default.prune'): its payload has no JSON: ")
    assert lines[4].startswith("viralfx: @task('default.prune'): there are two tasks named")


def test_a_worker_without_database_or_queue() -> None:
    """A missing database and an unknown queue give one line each."""
    result = command("worker", "--queue", "notification")

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        (
            "viralfx: DATABASE_URL: not set, so each process keeps its jobs in its own memory,"
            " where a separate worker cannot find them; set it, or run jobs in `viralfx serve`"
        ),
        "viralfx: --queue: there is no queue named 'notification'; did you mean notifications?",
    ]


@pytest.mark.parametrize("port", ["-1", "65536", "x", ""])
def test_an_invalid_port(port: str) -> None:
    """--port is checked like PORT."""
    result = command("serve", f"--port={port}")

    assert result.returncode == 2
    assert "is not a whole number from 0 to 65535" in result.stderr


def test_the_help_lists_every_command() -> None:
    """Every command of this version is listed and answers --help."""
    result = command("--help")

    for name in ("serve", "worker", "migrate", "doctor", "probe", "env"):
        assert f"\n    {name} " in result.stdout
        assert command(name, "--help").returncode == 0


def test_a_probe_without_a_response_fails() -> None:
    """``viralfx probe`` exits 1 without a response, and 2 for an invalid address."""
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


def test_a_client_cannot_fill_the_memory_with_jobs() -> None:
    """Beyond JOB_MEMORY_MAX_JOBS a job gets 503, Retry-After and a remedy; other requests work."""
    body = {"task": "parcels.echo", "payload": None, "runAt": "2100-01-01T00:00:00Z"}
    environment = {"JOB_MEMORY_MAX_JOBS": "5", "TASK_MODULES": "tests.job_tasks"}
    with running(environment=environment) as service:
        service.wait_ready()
        replies = [service.get(JOBS, method="POST", json_body=body) for _ in range(10)]
        refused = replies[-1]
        listed = service.get(JOBS).json()["items"]
        ready = service.status("/health/ready")

    assert {reply.status for reply in replies} == {202, 503}
    assert refused.status == 503
    assert refused.headers["retry-after"] == "5"
    assert "JOB_MEMORY_MAX_JOBS=5. Nothing was accepted" in refused.json()["detail"]
    assert len([one for one in listed if one["state"] == "waiting"]) <= 5
    assert ready == 200


def test_production_runs_in_memory_only_on_demand() -> None:
    """ALLOW_MEMORY_ADAPTERS=true permits it, and one WARN line names the consequences."""
    environment = {
        "ENVIRONMENT": "production",
        "ALLOW_MEMORY_ADAPTERS": "true",
        "API_TOKEN": "planted-Qw7rT2zXk9Lm4vNc",
    }
    with running(environment=environment) as service:
        service.wait_ready()

        assert service.get("/health").json()["environment"] == "production"
    # Without warnings about the loop, which a busy machine may block.
    lines = [line for line in service.output if '"context":"loop"' not in line]
    warnings = [line for line in lines if '"warn"' in line]
    assert len(warnings) == 1
    assert "in memory" in warnings[0]


def test_the_module_runs_like_the_script() -> None:
    """``python -m viralfx`` and the console script are the same program."""
    script = Path(sys.executable).with_name("viralfx")

    assert script.exists()
    assert (ROOT / "src/viralfx/__main__.py").exists()
