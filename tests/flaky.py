"""Runs tests many times beside two busy loops, and reports how often each of them failed.

    python -m tests.flaky PATH [TIMES] [ARGUMENTS OF PYTEST...]

Each time is a new pytest. A test that fails here without a defect depends on how busy the machine
is: mend what it waits for or shares. The exit code is 1 if a test failed in any of the times.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.gate import Results, attempt_apart

TIMES = 20
LOOPS = 2


@contextmanager
def busy() -> Iterator[None]:
    """Keep two processors busy for the time of the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(LOOPS)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def flaky(path: str, times: int, arguments: Sequence[str]) -> int:
    """Run the tests of ``path`` so many times; return an exit code.

    A time in which no test passes counts as a failure of ``path``.
    """
    failures, errors = Counter[str](), dict[str, str]()
    with tempfile.TemporaryDirectory() as name, busy():
        for number in range(1, times + 1):
            results, output = Path(name, f"{number}.json"), Path(name, f"{number}.txt")
            with output.open("wb") as file:
                code = attempt_apart(
                    results, [path, *arguments], stdout=file, stderr=subprocess.STDOUT
                )
            failed = _failed(path, code, results)
            print(f"{number} of {times}: {len(failed)} failed", flush=True)
            if failed:
                print(output.read_text(encoding="utf-8", errors="replace"), flush=True)
            failures.update(list(failed))
            errors = failed | errors
    for test, count in failures.most_common():
        print(f"FAILED {count} of {times}: {test} - {errors[test]}")
    print(f"{sum(failures.values())} failures in {times} runs", flush=True)
    return int(bool(failures))


def _failed(path: str, code: int, results: Path) -> dict[str, str]:
    try:
        found = Results.read(results)
    except (OSError, ValueError):
        found = Results()
    if not found.failed and not found.passed:
        skips = ", ".join(sorted(set(found.skipped.values())))
        return {path: f"nothing passed; pytest ended with {code}; skipped: {skips or 'nothing'}"}
    return found.failed if found.failed or not code else {path: f"pytest ended with {code}"}


def main(arguments: Sequence[str]) -> int:
    """Run the command of this module."""
    match arguments:
        case [path, times, *rest] if times.isdecimal() and int(times):
            return flaky(path, int(times), rest)
        case [path, *rest] if not path.startswith("-"):
            return flaky(path, TIMES, rest)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
