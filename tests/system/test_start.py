"""The start of a service, and the state that it restores."""

import os
import re
import signal
from pathlib import Path

import pytest
from tests.servers.waiting import wait_until
from tests.system.jobs import accept, until
from tests.system.service import READY_WITHIN, command, running

PLAIN = ("--app", "tests.system.apps:plain")
PREFIXED = ("--app", "tests.system.prefixed_app:app")


def test_an_application_that_fails_to_start_exits_3() -> None:
    """The log names the line that failed, started parts are closed, and the exit code is 3."""
    with running("--app", "tests.system.apps:fails_to_start") as service:
        code = service.exit_code()

    assert code == 3
    (line,) = service.logged("Start-up failed")
    assert re.fullmatch(
        r".+ failed: RuntimeError: planted in start-up \(/\S+/tests/system/apps\.py:\d+\)",
        line["detail"],
    )


@pytest.mark.each_python
def test_probes_answer_while_the_application_starts() -> None:
    """Live is 200, ready and startup 503, requests are refused with 503; SIGTERM still stops it."""
    with running("--app", "tests.system.apps:never_starts") as service:
        wait_until(lambda: service.status("/health/live") == 200, seconds=READY_WITHIN, what="live")
        ready = service.get("/health/ready")
        startup = service.get("/health/startup")
        other = service.get("/anything")
        service.signal(signal.SIGTERM)

        assert (ready.status, ready.json()["reason"]) == (503, "starting")
        assert (startup.status, startup.json()["started"]) == (503, False)
        assert (other.status, other.headers["retry-after"]) == (503, "1")
        assert service.exit_code(seconds=60) == 0


def test_no_home_is_needed() -> None:
    """A service whose home is missing, and cannot be made, is ready and ends with 0."""
    with running(environment={"HOME": "/proc/none"}, fresh=True) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


@pytest.mark.each_python
def test_a_signal_during_the_imports_is_not_lost() -> None:
    """SIGTERM before the event loop runs still causes a graceful shutdown."""
    with running(*PLAIN) as service:
        wait_until(
            lambda: _handles_sigterm(service.process.pid),
            seconds=READY_WITHIN,
            what="the handler is installed",
        )
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
        assert service.logged("Process ends")


@pytest.mark.usefixtures("default_sighup")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_while_the_command_line_is_imported_is_not_lost(name: str, tmp_path: Path) -> None:
    """A signal at the first import stops the service gracefully: the start blocks signals."""
    (tmp_path / "sitecustomize.py").write_text(AT_THE_FIRST_IMPORT.format(name=name))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with running(*PLAIN, environment={"PYTHONPATH": path}, fresh=True) as service:
        assert service.exit_code(seconds=READY_WITHIN) == 0
        assert service.logged("Process ends")[0]["reason"] == name


@pytest.mark.parametrize("arguments", [["env"], ["probe", "live", "--timeout", "3000"]])
def test_commands_that_handle_no_signals_end_by_them(arguments: list[str], tmp_path: Path) -> None:
    """A signal that arrives while a command starts still ends it."""
    (tmp_path / "sitecustomize.py").write_text(AT_THE_FIRST_IMPORT.format(name="SIGTERM"))
    ended = command(*arguments, environment={"PYTHONPATH": str(tmp_path)}, fresh=True)

    assert ended.returncode == -signal.SIGTERM


@pytest.mark.parametrize("console", [False, True])
def test_unused_packages_are_not_imported(*, console: bool) -> None:
    """Requests, documentation, a failed job and errors load no rich, pydantic or attrs."""
    environment = {
        "TASK_MODULES": "tests.system.module_tasks",
        "LOG_FORMAT": "console" if console else "json",
    }
    with running(environment=environment, fresh=True) as service:
        service.wait_ready()
        assert service.get("/api/docs/openapi.json").status == 200
        assert service.get("/nowhere").status == 404
        failing = accept(service, "modules.betray", "PATH")
        until(service, failing, "failed")
        loaded = {
            prefix: until(service, accept(service, "modules.list", prefix), "completed")["result"]
            for prefix in ("rich", "pydantic", "attr", "pygments", "opentelemetry", "greenlet")
        }
        importable = accept(service, "modules.import_all", ["attrs", "pydantic", "rich"])

        # A task can still import them.
        assert until(service, importable, "completed")["result"] == ["attrs", "pydantic", "rich"]
    assert {prefix: found for prefix, found in loaded.items() if found} == {}


def test_an_application_can_import_optional_packages() -> None:
    """With --app no package is hidden: structlog finds rich, and Litestar finds pydantic."""
    with running("--app", "tests.system.apps:plain", fresh=True) as service:
        service.wait_ready()

        assert service.get("/imported").json() == ["pydantic", "rich"]


AT_THE_FIRST_IMPORT = """
import os, signal, sys

class Signals:
    def find_spec(self, name, path=None, target=None):
        if name == "viralfx.cli":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Signals())
"""
"""Python runs this before the program; it sends a signal at the entry point's first import."""


def test_state_survives_a_restart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With STATE_DIR a process knows how the previous one ended."""
    folder = tmp_path_factory.mktemp("state")
    token = {"Authorization": "Bearer planted"}
    environment = {"STATE_DIR": str(folder), "MANAGEMENT_TOKEN": "planted"}
    with running(environment=environment) as service:
        service.wait_ready()
        none_before = service.get("/health/shutdown", headers=token).json()["previous"]
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
    with running(environment=environment) as service:
        service.wait_ready()
        previous = service.get("/health/shutdown", headers=token).json()["previous"]

    assert none_before is None
    assert (
        previous["reason"],
        previous["starts"],
        previous["health"],
    ) == ("SIGTERM", 1, "healthy")
    assert [path.name for path in folder.iterdir()] == ["state.json"]


def _handles_sigterm(pid: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:  # noqa: PTH123
        caught = next(line for line in status if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_litestars_own_logging_is_replaced() -> None:
    """A Litestar application configures logging; the service configures it again afterwards."""
    with running("--app", "tests.system.apps:default_logging") as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0

    assert service.logged("Process ends")
    assert [line for line in service.output if not line.startswith("{")] == []


@pytest.mark.parametrize("program", ["serve", "worker"])
def test_a_prefix_separates_the_settings_of_an_application(program: str) -> None:
    """Names without it are those of the application; with it, typing errors are found."""
    own = {"DATABASE_URL": "mysql://a@b/shop", "DB_POOL_MAX": "many", "SHUTDOWN_DRAIN_TIMOUT": "5"}
    wrong = {f"OPS_{name}": value for name, value in own.items()}
    refused = command(program, *PREFIXED, environment={**own, **wrong})

    assert (refused.returncode, refused.stdout) == (2, "")
    assert [line.partition(": ")[2].partition(":")[0] for line in refused.stderr.splitlines()] == [
        "OPS_SHUTDOWN_DRAIN_TIMOUT",
        "OPS_DB_POOL_MAX",
        "OPS_DATABASE_URL",
    ]
    if program == "serve":
        with running(*PREFIXED, environment=own) as service:
            service.wait_ready()


@pytest.mark.parametrize("app", ["tests.system.apps:plain", "tests.system.log_app:app"])
def test_without_a_prefix_the_plain_names_are_judged(app: str) -> None:
    """With all problems at once, whether the application has a layer or gets one."""
    wrong = {"DB_POOL_MAX": "many", "SHUTDOWN_DRAIN_TIMOUT": "5", "LOG_LEVEL": "loud"}
    result = command("serve", "--app", app, environment=wrong)

    assert (result.returncode, result.stdout) == (2, "")
    names = [line.partition(": ")[2].partition(":")[0] for line in result.stderr.splitlines()]
    assert sorted(names) == sorted(wrong)


def test_level_and_format_of_the_log_are_those_of_the_application() -> None:
    """Its settings may have a prefix, and win over the variables without it."""
    environment = {"OPS_LOG_FORMAT": "console", "OPS_LOG_LEVEL": "debug", "LOG_LEVEL": "error"}
    with running(*PREFIXED, environment=environment) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0

    assert service.output
    assert not [line for line in service.output if line.startswith("{")]
    assert [line for line in service.output if "Listening" in line]


@pytest.mark.each_python
def test_a_closed_standard_output_changes_nothing() -> None:
    """Without standard output the service runs and stops normally."""
    with running(*PLAIN, closed_output=True) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


def test_probes_answer_while_saved_state_is_slow_to_load(tmp_path: Path) -> None:
    """A hanging disk prevents readiness; the probes still respond."""
    os.mkfifo(tmp_path / "state.json")
    with running(*PLAIN, environment={"STATE_DIR": str(tmp_path)}) as service:
        wait_until(lambda: service.status("/health/live") == 200, seconds=READY_WITHIN, what="live")
        ready = service.get("/health/ready")

        assert (ready.status, ready.json()["reason"]) == (503, "starting")


def test_an_application_cannot_disable_sigterm() -> None:
    """The service handles SIGTERM even if a start-up hook set it to be ignored."""
    with running("--app", "tests.system.apps:ignores_sigterm") as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
