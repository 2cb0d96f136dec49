"""Seeded faults in tests: each ends as the gate promises, and the summary names it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.gate import FOLDER, MAX_RERUNS, STAGES
from tests.servers.waiting import wait_until

ROOT = Path(__file__).parents[2]

FAULTS = '''
"""Tests with faults."""
import os, signal, time
from pathlib import Path
import pytest

def attempt(name):
    with open(f"{name}.attempts", "a+") as file:
        file.write(".")
    return os.path.getsize(f"{name}.attempts")

def test_passes():
    pass

def test_skips():
    pytest.skip("no engine here")

def test_fails_once():
    assert attempt("once") > 1, "on the first day"

@pytest.mark.parametrize("word", ["a b", "[x]::y"])
def test_fails_twice(word):
    assert attempt(word.strip("[]").replace(":", "")) > 2

def test_fails_always():
    assert attempt("always") < 0, "each day"

def test_kills_its_worker():
    if attempt("kill") == 1:
        os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.timeout(1)
def test_hangs_once():
    if attempt("hang") == 1:
        time.sleep(30)

@pytest.fixture
def broken():
    assert attempt("fixture") > 1, "not set up"

def test_has_a_broken_fixture(broken):
    pass
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with tests that have faults."""
    for layer in ("system", "unit"):
        (tmp_path / f"tests/{layer}").mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib\ntestpaths = tests\n", encoding="utf-8"
    )
    (tmp_path / "results").mkdir()
    return tmp_path


def gate(checkout: Path, *arguments: str, apart: bool = False) -> tuple[int, list[str]]:
    """Run the gate in a checkout; return its exit code and its output."""
    return run("tests.gate", checkout, *arguments, apart=apart)


def run(module: str, checkout: Path, *arguments: str, apart: bool = False) -> tuple[int, list[str]]:
    """Run a module in a checkout; return its exit code and the lines of its output."""
    with start(module, checkout, *arguments, apart=apart) as process:
        output, _ = process.communicate(timeout=80)
    return process.returncode, output.splitlines()


def start(
    module: str, checkout: Path, *arguments: str, apart: bool = False, **options: Any
) -> subprocess.Popen[str]:
    """Start a module in a checkout; ``apart``: without a folder for the results of a run."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), FOLDER: str(checkout / "results")}
    # Other plugins take most of the time of a start.
    environ |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "-p xdist -p pytest_timeout",
    }
    if apart:
        del environ[FOLDER]
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=checkout,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def write(checkout: Path, layer: str, text: str) -> None:
    """Write the tests of a layer."""
    (checkout / f"tests/{layer}/test_{layer}.py").write_text(text, encoding="utf-8")


def test_a_test_with_a_fault_runs_again_alone_and_the_summary_names_it(checkout: Path) -> None:
    """Up to twice; pure tests once. The skips stand before the summary, and the totals last."""
    write(checkout, "system", FAULTS)
    write(checkout, "unit", "def test_pure():\n    assert 1 == 2\n")
    code, lines = gate(checkout, "run", "beside", "-n", "2")
    assert code == 1
    assert "== beside: 7 passed, 2 failed" in lines
    assert (checkout / "always.attempts").read_text() == "..."

    code, lines = gate(checkout, "run", "other", "tests/system", "-k", "passes")
    assert code == 0
    (checkout / f"results/{STAGES}").write_text("readme RED 61\nother green 2\n")
    code, lines = gate(checkout, "summary")
    assert code == 1
    lines, place = lines[lines.index("== summary") :], "tests/system/test_system.py"
    assert lines[1:3] == ["readme       RED         61 s", "other        green        2 s"]
    assert set(lines[3:5]) == {
        f"FAILED {place}::test_fails_always (beside) - AssertionError: each day",
        "FAILED tests/unit/test_unit.py::test_pure (beside) - assert 1 == 2",
    }
    reruns = "\n".join(lines[5:-1])
    assert f"{place}::test_fails_once (beside) - passed then; first: AssertionError: on" in reruns
    assert f"{place}::test_fails_always (beside) - failed again; first: AssertionE" in reruns
    assert f"{place}::test_hangs_once (beside) - passed then; first: Failed: Timeout" in reruns
    assert f"{place}::test_has_a_broken_fixture (beside) - passed then; first: setup: A" in reruns
    assert "test_kills_its_worker (beside) - passed then; first: worker 'gw" in reruns
    assert "test_fails_twice[[x]::y] (beside) - passed then" in reruns
    assert "test_pure" not in reruns
    assert lines[-1] == "8 passed, 2 failed, 7 run again"


COUNTED = """
import os, time
import pytest

def attempt(name):
    with open(f"{name}.attempts", "a+") as file:
        file.write(".")
    return os.path.getsize(f"{name}.attempts")
"""
IN_FILES = {
    "kills_once": "def test_a():\n    if attempt('once') == 1: os.kill(os.getpid(), 9)\n",
    "many": "@pytest.mark.parametrize('n', range(9))\ndef test_it(n): pass\n",
    "single": "def test_it(): pass\n",
    "kills": "def test_a(): os.kill(os.getpid(), 9)\ndef test_b(): pass\ndef test_c(): pass\n",
    "hangs": (
        "def test_a():\n"
        "    while attempt('hangs') == 1:\n"
        "        while True:\n"
        "            try: time.sleep(60)\n"
        "            except BaseException: pass\n"
    ),
}


def test_a_process_that_ends_costs_one_test(checkout: Path) -> None:
    """The other tests of its file run, and a test that catches its time limit ends so, too."""
    for name, text in IN_FILES.items():
        (checkout / f"tests/system/test_{name}.py").write_text(COUNTED + text, encoding="utf-8")
    code, lines = gate(checkout, "run", "beside", "-n", "2", "-o", "faulthandler_timeout=2")
    assert code == 1
    assert "== beside: 14 passed, 1 failed" in lines, lines
    *_, failed = (line for line in lines if line.startswith("FAILED tests/system/test_kills.py"))
    assert "::test_a - worker 'gw" in failed
    assert len((checkout / "once.attempts").read_text()) == 2


def test_an_interrupted_part_leaves_its_results(checkout: Path) -> None:
    """The tests that have failed until then are in the summary."""
    waits = "def test_b():\n    open('waits', 'x').close()\n    time.sleep(600)\n"
    write(checkout, "system", COUNTED + "def test_a(): assert 0, 'early'\n" + waits)
    with start("tests.gate", checkout, "run", "all", start_new_session=True) as process:
        wait_until((checkout / "waits").exists, seconds=60, what="the second test runs")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    code, lines = gate(checkout, "summary")
    assert code == 1
    assert "FAILED tests/system/test_system.py::test_a (all) - AssertionError: early" in lines
    assert "FAILED all (all) - pytest was interrupted" in lines


LEFT = """
import socket
def test_it():
    left = [socket.socket()]
    left.append(left)
"""


def test_results_survive_an_error_of_pytest_itself(checkout: Path) -> None:
    """Such as a warning about a socket that a test left, found when all tests had run."""
    write(checkout, "system", LEFT)
    code, lines = gate(checkout, "run", "all", "-W", "error")
    assert code == 1
    assert "== all: 1 passed, 1 failed" in lines, lines
    assert "FAILED all - pytest ended with 1" in lines


def test_the_summary_names_the_reason_of_a_stage(checkout: Path) -> None:
    """The end of its output if no test of it failed, and results that cannot be read."""
    results = checkout / "results"
    (results / STAGES).write_text("static RED 4\nreadme RED 9\ncontainers skipped 0\n")
    (results / "static.log").write_text("Success\nsome.py:1: error: wrong type\n\n")
    (results / "readme.log").write_text("FAILED tests/test_it.py - no\nthe end\n")
    (results / "containers.log").write_text("no engine\n")
    (results / "cut.json").write_text('{"passed": [')
    code, lines = gate(checkout, "summary")
    assert code == 1
    assert lines[2:] == [
        "static       RED          4 s",
        "  Success",
        "  some.py:1: error: wrong type",
        "readme       RED          9 s",
        "containers   skipped      0 s",
        "  no engine",
        "FAILED cut (cut) - its results cannot be read",
        "0 passed, 1 failed, 0 run again",
    ]


@pytest.mark.parametrize("environment", ["missing", "without packages"])
def test_a_run_without_an_environment_has_a_summary(tmp_path: Path, environment: str) -> None:
    """With its reason, such as a full disk: the summary needs neither pytest nor ``.venv``."""
    for name in (".ci/run", "tests/gate.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    full = "echo 'cp: No space left on device' >&2; exit 1"
    script(tmp_path / ".ci/venv", full)
    # A test installs no program.
    script(tmp_path / "bin/apt-get", "exit 1")
    script(tmp_path / "bin/python3", f'exec "{sys.executable}" -S "$@"')
    if environment == "without packages":
        script(tmp_path / ".venv/bin/python", f'exec "{sys.executable}" -S "$@"')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "DOCKER_HOST": "unix:///nowhere"}
    environ.pop("PYTHON", None)
    process = subprocess.run(
        [tmp_path / ".ci/run", "repository"],
        check=False,
        env=environ,
        capture_output=True,
        text=True,
        timeout=80,
    )
    assert process.returncode == 1, process.stderr
    lines = process.stdout.splitlines()
    lines = lines[lines.index("== summary") + 1 :]
    assert lines[0].startswith("environment  RED "), lines
    assert lines[1:] == ["  cp: No space left on device", "0 passed, 0 failed, 0 run again"]


def script(path: Path, text: str) -> None:
    """Write a program of the shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def test_skips_are_counted_by_reason(checkout: Path) -> None:
    """Before the summary, since there may be many."""
    skips = "import pytest\n@pytest.mark.skip(reason='no engine')\ndef test_{}(): pass\n"
    write(checkout, "system", skips.format("one") + skips.format("two"))
    code, _ = gate(checkout, "run", "all")
    assert code == 0
    code, lines = gate(checkout, "summary")
    assert code == 0
    assert lines == ["SKIPPED 2 (all) - no engine", "", "== summary", lines[-1]]


def test_more_failures_than_the_limit_are_not_repeated(checkout: Path) -> None:
    """They are no noise; the first ones are shown, then a count."""
    many = MAX_RERUNS + 10
    write(
        checkout,
        "system",
        "import pytest\n"
        f"@pytest.mark.parametrize('n', range({many}))\ndef test_it(n): assert n < 0\n",
    )
    code, lines = gate(checkout, "run", "all")
    assert code == 1
    assert f"{many} failures are more than {MAX_RERUNS}: no test runs again" in lines
    code, lines = gate(checkout, "summary")
    assert code == 1
    assert lines[-2:] == ["and 5 more failed", f"0 passed, {many} failed, 0 run again"]


SHARED = """
@pytest.fixture(scope="module")
def shared():
    assert attempt("shared") > 1, "not set up"

@pytest.mark.parametrize("n", range({many}))
def test_it(shared, n): pass
"""
"""Tests whose fixture fails the first time."""


def test_a_fixture_that_fails_once_counts_once(checkout: Path) -> None:
    """All its tests run again, however many, and the summary lists the first ones."""
    many = MAX_RERUNS + 10
    write(checkout, "system", COUNTED + SHARED.format(many=many))
    code, lines = gate(checkout, "run", "all")
    assert code == 0, lines
    assert (checkout / "shared.attempts").read_text() == ".."
    code, lines = gate(checkout, "summary")
    assert code == 0, lines
    assert lines[-2:] == ["and 5 more ran again", f"{many} passed, 0 failed, {many} run again"]


def test_a_part_runs_once(checkout: Path) -> None:
    """``once`` gives the result of the first time; ``run`` refuses a name that is taken."""
    write(checkout, "unit", "def test_it():\n    assert not print('ran', file=open('ran', 'a'))\n")
    assert gate(checkout, "once", "pure", "tests/unit")[0] == 0
    code, lines = gate(checkout, "once", "pure", "tests/unit")
    assert (code, lines[-1]) == (0, "== pure, which ran before: 1 passed, 0 failed")
    assert gate(checkout, "run", "pure", "tests/unit")[0] == 2
    assert (checkout / "ran").read_text(encoding="utf-8") == "ran\n"

    write(checkout, "unit", "def test_it():\n    assert False\n")
    codes = [gate(checkout, "once", "red", "tests/unit")[0] for _ in range(2)]
    assert codes == [1, 1]


def test_a_test_that_fails_sometimes_is_counted(checkout: Path) -> None:
    """``tests.flaky`` runs it beside two busy loops, shows each failure, and counts them."""
    write(checkout, "system", FAULTS)
    path = "tests/system/test_system.py"
    code, lines = run("tests.flaky", checkout, path, "2", "-k", "passes or fails_once")
    assert code == 1
    assert lines[0] == "1 of 2: 1 failed"
    assert lines[-3] == "2 of 2: 0 failed", lines
    assert lines[-2].startswith(f"FAILED 1 of 2: {path}::test_fails_once - AssertionError: on the")
    assert lines[-1] == "1 failures in 2 runs"


@pytest.mark.parametrize(
    ("text", "arguments", "code", "said"),
    [
        ("import missing_module\n", [], 2, "FAILED tests/system/test_system.py - E   Module"),
        ("def test_it(): pass\n", ["-k", "none"], 5, "FAILED all - pytest ended with 5"),
        ("def test_it(): pass\n", ["--no-such-option"], 4, "FAILED all - pytest ended with 4"),
        (
            "import os\ndef test_it(): os.kill(os.getpid(), 9)\n",
            [],
            -9 % 256,
            "FAILED all - pytest ended with -9 and left no results",
        ),
    ],
    ids=["collection", "no test", "usage", "killed"],
)
def test_a_part_that_does_not_run_is_red(
    checkout: Path, text: str, arguments: list[str], code: int, said: str
) -> None:
    """With the exit code of pytest, also where each part has a folder of its own."""
    write(checkout, "system", text)
    found, lines = gate(checkout, "run", "all", *arguments, apart=True)
    assert found % 256 == code
    assert [line for line in lines if line.startswith(said)], lines
