# ruff: noqa: T201 - a program whose output is its report
"""Mutation testing of the resilience core: change one thing at a time, and see a test fail.

    python tests/mutation/mutate.py [module ...]

cosmic-ray makes the mutants; each is tested in a fork of this process, which has imported the
test tools already, so that a mutant costs a fraction of a second instead of several. Works on a
copy in a temporary folder. Left out is what a type checker tests instead: mutants of ``|``, which
here only ever joins types, of ``@overload`` and of the ``*`` in a signature.
Exits with 1 when fewer than 95 % are killed.
"""

import difflib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.stateful  # noqa: F401 - imported once, before the forks
import pytest
import pytest_asyncio  # noqa: F401 - as above
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[2]
MODULES = ("retry", "breaker", "breaker_states", "retry_decision")
TESTS = (
    "boundaries",
    "breaker_rules",
    "retry_rules",
    "windows",
    "circuits",
    "bad_input",
    "documentation",
    "fused",
)
MORE_TESTS = (
    "tests/simulation/test_breaker_machine.py",
    "tests/process/test_breaker_threads.py",
    "tests/process/test_retry_threads.py",
)
TIMEOUT = 20.0
REQUIRED = 0.95


def mutants(code: str) -> Iterator[tuple[str, str]]:
    """Yield the operator and the code of each mutant."""
    overloads, stars = code.count("@overload"), code.count("*,")
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if "BitOr" in name or operator.arguments():
            continue
        occurrence = 0
        while (mutant := mutate_code(code, operator(), occurrence)) is not None:
            occurrence += 1
            if mutant.count("@overload") == overloads and mutant.count("*,") == stars:
                yield name, mutant


def run_tests(folder: Path) -> int:
    """Run the tests against the copy, without output."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder / "src"), str(folder)]
    tests = [*(f"tests/unit/resilience/test_{name}.py" for name in TESTS), *MORE_TESTS]
    # Modules imported before are not rewritten again; pytest warns about that.
    ignore = "ignore::pytest.PytestAssertRewriteWarning"
    return pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", ignore, *tests])


def survives(folder: Path) -> bool:
    """Run the tests in a fork; return whether all of them pass in time."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = run_tests(folder)
        finally:
            # A mutant may raise SystemExit; only the parent runs the rest of this program.
            os._exit(status)
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def check(modules: list[str], folder: Path) -> tuple[int, int]:
    """Test every mutant of the modules, print the survivors; return the total and the killed."""
    made = killed = 0
    for module in modules:
        path = folder / "src/viralfx/resilience" / f"{module}.py"
        code = path.read_text()
        for operator, mutant in mutants(code):
            path.write_text(mutant)
            made += 1
            # Python takes the bytecode of a file with the same size, changed in the same second.
            os.utime(path, (made, made))
            if not survives(folder):
                killed += 1
                continue
            diff = difflib.unified_diff(code.splitlines(), mutant.splitlines(), n=0)
            changed = [line for line in diff if line[:2] not in ("--", "++", "@@")]
            print(f"survived: {module} {operator}", *changed, sep="\n  ", flush=True)
        path.write_text(code)
        print(f"{module}: {killed} of {made} killed so far", flush=True)
    return made, killed


def main(modules: list[str]) -> int:
    """Run on a copy and print the score."""
    sys.dont_write_bytecode = True
    os.environ["FUZZ_EXAMPLES"] = "25"
    folder = Path(tempfile.mkdtemp(prefix="mutation-"))
    try:
        for name in ("src", "tests", "docs", "pyproject.toml", "README.md"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        if not survives(folder):
            print("the tests fail without any mutation")
            return 2
        made, killed = check(modules, folder)
    finally:
        shutil.rmtree(folder)
    print(f"{killed} of {made} killed: {killed / made:.1%}")
    return 0 if killed >= REQUIRED * made else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(MODULES)))
