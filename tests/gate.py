"""Runs one part of the tests, repeats the failed ones alone, and sums up a whole run.

    python -m tests.gate run PART ARGUMENTS...    one part: the arguments are those of pytest
    python -m tests.gate once PART ARGUMENTS...   the same, unless an earlier stage has run it
    python -m tests.gate summary                  skips, stages, failures, reruns and totals

A busy machine can delay a test that starts processes, uses servers or waits. Such a test runs up
to twice more, after all others of its part and with nothing beside it. A pure test runs once. The
summary lists each rerun with its first error. More than ``MAX_RERUNS`` of them make a run red. The
tests of a file whose set-up fails with the same error count once, since they share a fixture.

A test that hangs is cut by its time limit, or with its process after ``HANGS_AFTER`` seconds if it
catches that. A part is cut after ``MAX_SECONDS``. Tests that did not run have failed.

``VIRALFX_TEST_GATE`` names the folder in which the parts of one run leave their results. Each part
has a name of its own there: ``run`` refuses a second part of the same name. The folder also holds
the results and the output of stages.

This module needs the standard library alone: a run whose environment cannot be made has a summary.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "VIRALFX_TEST_GATE"
STAGES = "stages"
"""The file to which ``.ci/run`` appends a line for each stage: name, result, seconds."""

PURE = ("tests/unit/", "tests/simulation/")
"""Folders whose tests depend on nothing but the code."""

MAX_ATTEMPTS = 3
HANGS_AFTER = 1000
"""Seconds; no test of the gate has a longer time limit."""
MAX_SECONDS = 2400
SECONDS_TO_END = 30
"""Seconds in which an interrupted pytest writes its results."""
MAX_RERUNS = 10
MAX_FAILURES_SHOWN = 15
MAX_COLUMNS = 200
REASON_LINES = 3
"""Last lines of a stage that the summary repeats if it is not green and no test of it failed."""

SETUP = "setup: "
"""Prefix of the error of a test whose set-up failed."""

FAILED = 1
"""pytest's exit code if tests failed. Other ones mean that they did not all run."""
USAGE = 2
INTERRUPTED = 130


@dataclass
class Results:
    """Results of one call of pytest, or of one part of a run."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """The failed tests, each with the first line of its error."""
    repeated: dict[str, str] = field(default_factory=dict)
    """The tests that ran more than once, each with the first line of its first error."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The skipped tests with their reasons."""

    def write(self, path: Path) -> None:
        """Write the results as JSON, whole or not at all."""
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(asdict(self)), encoding="utf-8")
        new.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the results; raise ``OSError`` or ``ValueError`` if there are none."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def run(folder: Path, part: str, arguments: Sequence[str]) -> int:
    """Run a part, repeat its failed tests, write its results, and return an exit code.

    The code is 0 if each test passed in one of its attempts, 1 if one did not, and that of pytest
    or of its signal if not all tests ran.
    """
    ran = folder / f"{part}.json"
    if ran.exists():
        print(f"{part}: another part of this run has this name", file=sys.stderr)
        return USAGE
    first = folder / f"{part}.first"
    try:
        code = attempt_apart(first, arguments)
    except KeyboardInterrupt:
        results = _left_in(first, part, "pytest was interrupted")
        results.failed.setdefault(part, "pytest was interrupted")
        results.write(ran)
        raise
    results = _left_in(first, part, f"pytest ended with {code} and left no results")
    if code and not results.failed:
        results.failed[part] = f"pytest ended with {code}"
    if code in {0, FAILED}:
        _repeat(folder, part, results)
        code = FAILED if results.failed else 0
    results.write(ran)
    _print_short(part, results)
    return code


def _left_in(path: Path, part: str, problem: str) -> Results:
    try:
        return Results.read(path)
    except (OSError, ValueError):
        return Results(failed={part: problem})


def once(folder: Path, part: str, arguments: Sequence[str]) -> int:
    """Run a part unless it has run, as a stage of its own; return an exit code as :func:`run`."""
    ran = folder / f"{part}.json"
    if not ran.exists():
        return run(folder, part, arguments)
    results = _left_in(ran, part, "its results cannot be read")
    _print_short(f"{part}, which ran before", results)
    return FAILED if results.failed else 0


def _repeat(folder: Path, part: str, results: Results) -> None:
    before = sum(_different(others.repeated) for _, others in _parts(folder))
    for number in range(2, MAX_ATTEMPTS + 1):
        again = [test for test in results.failed if _may_repeat(test)]
        count = _different({test: results.failed[test] for test in again} | results.repeated)
        if not again:
            return
        if before + count > MAX_RERUNS:
            print(f"{before + count} failures are more than {MAX_RERUNS}: no test runs again")
            return
        print(f"\n== {part}, attempt {number}: {len(again)} tests, one by one", flush=True)
        for test in again:
            results.repeated.setdefault(test, results.failed[test])
        names, path = folder / f"{part}.tests", folder / f"{part}.{number}"
        names.write_text("".join(f"{test}\n" for test in again), encoding="utf-8")
        # In another process: a thread that a test leaves behind, or its kill, ends only that one.
        attempt_apart(path, ["-n", "1", f"@{names}"])
        try:
            passed = Results.read(path).passed
        except (OSError, ValueError):
            continue
        for test in passed:
            results.failed.pop(test, None)
            results.passed.append(test)


def _different(errors: Mapping[str, str]) -> int:
    """Count failures; those of a fixture that tests of one file share count once."""
    of_setup = {test: error for test, error in errors.items() if error.startswith(SETUP)}
    shared = {(test.partition("::")[0], error) for test, error in of_setup.items()}
    return len(errors) - len(of_setup) + len(shared)


def _may_repeat(test: str) -> bool:
    # Without "::" it is a file that could not be collected, or the part itself.
    return "::" in test and not test.startswith(PURE)


def attempt_apart(path: Path, arguments: Sequence[str], **popen: Any) -> int:
    """Run pytest in a new process, so that an attempt inherits no module and no server.

    ``popen`` are further arguments of :class:`subprocess.Popen`. Returns pytest's exit code, or the
    negative number of a signal. An interrupt reaches pytest, which has time to write its results.
    """
    command = [sys.executable, "-m", "tests.recorder", str(path), *arguments]
    with subprocess.Popen(command, **popen) as process:
        try:
            return process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"cut after {MAX_SECONDS} s: {' '.join(arguments)}", flush=True)
            _end(process)
            return FAILED
        except KeyboardInterrupt:
            _end(process)
            raise


def _end(process: subprocess.Popen[Any]) -> None:
    # A terminal has sent the interrupt to pytest as well; a second one would keep it from writing.
    for seconds in (SECONDS_TO_END / 6, SECONDS_TO_END):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
    process.kill()


def _parts(folder: Path) -> Iterator[tuple[str, Results]]:
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        yield path.stem, _left_in(path, path.stem, "its results cannot be read")


def _print_short(part: str, results: Results) -> None:
    print(f"\n== {part}: {len(results.passed)} passed, {len(results.failed)} failed")
    for line in (*_failures(results.failed), *_reruns(results.repeated, results.failed)):
        print(line)
    sys.stdout.flush()


def _failures(failed: Mapping[str, str]) -> Iterator[str]:
    for test, error in list(failed.items())[:MAX_FAILURES_SHOWN]:
        yield _cut(f"FAILED {test} - {error}")
    if len(failed) > MAX_FAILURES_SHOWN:
        yield f"and {len(failed) - MAX_FAILURES_SHOWN} more failed"


def _reruns(repeated: Mapping[str, str], failed: Mapping[str, str]) -> Iterator[str]:
    for test, error in list(repeated.items())[:MAX_FAILURES_SHOWN]:
        result = "failed again" if test in failed else "passed then"
        yield _cut(f"RERUN {test} - {result}; first: {error}")
    if len(repeated) > MAX_FAILURES_SHOWN:
        yield f"and {len(repeated) - MAX_FAILURES_SHOWN} more ran again"
    if _different(repeated) > MAX_RERUNS:
        yield f"more than {MAX_RERUNS} failures that ran again make the run red"


def _cut(line: str) -> str:
    return line if len(line) <= MAX_COLUMNS else f"{line[: MAX_COLUMNS - 3]}..."


def summary(folder: Path) -> int:
    """Print the summary of a run; return 1 if a stage or test failed, or too many ran again."""
    parts = dict(_parts(folder))
    failed, repeated = dict[str, str](), dict[str, str]()
    for part, one in parts.items():
        # One test may be in several parts: on another Python, or with other servers.
        failed |= {f"{test} ({part})": error for test, error in one.failed.items()}
        repeated |= {f"{test} ({part})": error for test, error in one.repeated.items()}
    for part, one in parts.items():
        for reason, count in Counter(one.skipped.values()).most_common():
            print(_cut(f"SKIPPED {count} ({part}) - {reason}"))
    print("\n== summary")
    try:
        stages = [line.split() for line in (folder / STAGES).read_text().splitlines()]
    except OSError:
        stages = []
    for name, result, seconds in stages:
        print(f"{name:12} {result:8} {seconds:>5} s")
        if result != "green":
            for line in _reason_of(folder / f"{name}.log"):
                print(_cut(f"  {line}"))
    for line in (*_failures(failed), *_reruns(repeated, failed)):
        print(line)
    passed = sum(len(one.passed) for one in parts.values())
    print(f"{passed} passed, {len(failed)} failed, {len(repeated)} run again", flush=True)
    green = all(result in {"green", "skipped"} for _, result, _ in stages)
    return int(not green or bool(failed) or _different(repeated) > MAX_RERUNS)


def _reason_of(log: Path) -> list[str]:
    """Return the end of a stage's output, unless that stage has named its failed tests."""
    try:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return []
    return [] if any(line.startswith("FAILED ") for line in lines) else lines[-REASON_LINES:]


def take_interrupts() -> None:
    """Let SIGINT and SIGTERM raise ``KeyboardInterrupt``."""
    # A shell starts background jobs with SIGINT ignored.
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupt, signal.default_int_handler)


def main(arguments: Sequence[str]) -> int:
    """Run a command of this module."""
    take_interrupts()
    try:
        return _command(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _command(arguments: Sequence[str]) -> int:
    match arguments:
        case ["summary"]:
            return summary(Path(os.environ[FOLDER]))
        case ["run" | "once" as command, part, *rest]:
            start = run if command == "run" else once
            if FOLDER in os.environ:
                return start(Path(os.environ[FOLDER]), part, rest)
            with tempfile.TemporaryDirectory() as folder:
                return start(Path(folder), part, rest)
    print(__doc__, file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
