"""Installs the wheel as users do, and measures it: ``just wheels``.

With the pip of each Python that is here, with uv, and beside packages that applications have. It
needs a package index, and some minutes.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tests.deploy.release import ROOT, UV, build, project, publish_readme

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
MAX_SECONDS = 60.0
"""For the oldest supported Python, with the pip that it comes with."""

BESIDE = (
    *("fastapi", "starlette", "django", "flask", "quart", "sanic"),
    *("uvicorn", "gunicorn", "hypercorn", "granian"),
    *("pydantic", "sqlalchemy", "alembic", "psycopg", "redis"),
    *("celery", "dramatiq", "procrastinate", "taskiq", "rq"),
    *("httpx", "aiohttp", "requests", "boto3"),
    *("sentry-sdk", "logfire", "structlog", "prometheus-client"),
)
"""Packages that applications have; each is resolved beside ``viralfx[all]``."""

APART = {
    "arq": "it needs an older redis",
    "saq": "its extra needs an older redis",
    "opentelemetry-distro": "it pins a newer release than one of the instrumentations has",
    "opentelemetry-sdk": "an instrumentation pins an older release of it",
}
"""Packages that are set back beside an extra, with the reason."""


def interpreters() -> Iterator[tuple[str, Path]]:
    """Yield version and path of each Python that is here and has venv."""
    for version in VERSIONS:
        candidates = [*_on_path(f"python{version}"), *_of_pyenv(version)]
        for candidate in candidates:
            code = "import ensurepip, sys; print(sys.version_info[:2])"
            found = subprocess.run(
                [candidate, "-c", code], capture_output=True, text=True, check=False
            )
            if found.stdout.strip() == f"({version.replace('.', ', ')})":
                yield version, candidate
                break


def _on_path(name: str) -> Iterator[Path]:
    for folder in os.get_exec_path():
        if (path := Path(folder, name)).exists():
            yield path


def _of_pyenv(version: str) -> list[Path]:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return sorted(root.glob(f"versions/{version}.*/bin/python"))


def wheel_of_checkout(folder: Path) -> Path:
    """Build the wheel of this checkout below a folder; return its path."""
    copied = folder / "sources"
    shutil.copytree(
        ROOT / "src", copied / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for path in [*ROOT.glob("*.toml"), ROOT / "README.md", ROOT / "LICENSE", *ROOT.glob("THIRD*")]:
        shutil.copy(path, copied)
    publish_readme(copied)
    return next(path for path in build(copied, folder / "dist") if path.suffix == ".whl")


def timed(
    *command: str | Path, **environment: str
) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a command; return its seconds and its result."""
    began = time.monotonic()
    clean = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**clean, **environment}
    )
    return time.monotonic() - began, done


def by_pip(python: Path, wheel: Path, folder: Path, *, may_be_slow: bool) -> Iterator[str]:
    """Install the wheel with everything by the pip of a Python; yield problems."""
    _, made = timed(python, "-m", "venv", folder)
    if made.returncode:
        yield f"venv: {made.stdout}{made.stderr}"
        return
    inside = folder / "bin/python"
    version = subprocess.check_output([inside, "-m", "pip", "--version"], text=True).split()[1]
    before = _processor_seconds()
    seconds, done = timed(
        inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", f"{wheel}[all]"
    )
    busy = _processor_seconds() - before
    print(f"  pip {version}: viralfx[all] in {seconds:.0f} s, {busy:.0f} s busy", flush=True)
    if done.returncode:
        yield f"pip {version}: {done.stderr[-2000:]}"
        return
    if python_version(inside) == VERSIONS[0] and seconds > MAX_SECONDS and not may_be_slow:
        yield f"pip {version} takes {seconds:.0f} s"
    _, checked = timed(inside, "-m", "pip", "check")
    if checked.returncode:
        yield checked.stdout
    _, imported = timed(inside, ROOT / "tests/deploy/extra_jobs.py", "all")
    if imported.returncode:
        yield imported.stderr[-2000:]
    _, doctor = timed(folder / "bin/viralfx", "doctor", "--json", PORT="0")
    if doctor.returncode:
        yield doctor.stdout + doctor.stderr


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def python_version(python: Path) -> str:
    """Return major and minor version of a Python."""
    shown = subprocess.check_output([python, "--version"], text=True)
    return ".".join(shown.split()[1].split(".")[:2])


def resolved(python: Path, requirements: Sequence[str]) -> dict[str, str] | str:
    """Return the versions that uv finds for the requirements, or its message."""
    done = subprocess.run(
        [UV, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", python, "-"],
        input="\n".join(requirements),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return done.stderr
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))


def beside_others(python: Path, wheel: Path) -> Iterator[str]:
    """Resolve the wheel with everything beside each other package; yield problems.

    A package that gets an older version beside this one is a problem, too: an application would
    be set back in silence.
    """
    ours = f"viralfx[all] @ {wheel.as_uri()}"
    together = resolved(python, [ours, *BESIDE])
    if isinstance(together, str):
        yield together
    for name in (*BESIDE, *APART):
        alone, both = resolved(python, [name]), resolved(python, [name, ours])
        if isinstance(alone, str) or isinstance(both, str):
            yield f"{name}: {alone if isinstance(alone, str) else both}"
        elif alone[name] != both[name]:
            how = f"{name} is {both[name]} beside viralfx[all], and {alone[name]} alone"
            if name in APART:
                print(f"  {how}: {APART[name]}")
            else:
                yield how


def main() -> int:
    """Install, resolve and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the pip of the oldest Python")
    quick = parser.parse_args().quick
    # An exit lets the installer that runs be killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    problems: list[str] = []
    # Beside the environment, which has the same packages: /tmp may be small.
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        os.environ["TMPDIR"] = folder
        wheel = wheel_of_checkout(Path(folder))
        found = dict(islice(interpreters(), 1 if quick else None))
        print(f"{wheel.name}, Python {', '.join(found)}", flush=True)
        if next(iter(found), None) != VERSIONS[0]:
            problems.append(f"Python {VERSIONS[0]} is not here")
        for version, python in found.items():
            installed = Path(folder, version)
            found_here = by_pip(python, wheel, installed, may_be_slow=quick)
            problems += (f"{version}: {each}" for each in found_here)
            shutil.rmtree(installed)
        if not quick:
            others = list(beside_others(next(iter(found.values())), wheel))
            print(f"  beside {len(BESIDE)} packages: {len(others)} problems", flush=True)
            problems += others
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{project()['name']}: {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
