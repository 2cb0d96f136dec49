"""Wheel and sdist of this checkout, and environments that have them.

``python -m tests.deploy.wheels`` installs the wheel and the packages of requirements.lock into an
empty environment, and sees each part work: the gate does this at its start.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from tests.deploy.distribution import ROOT, UV, build, publish_readme
from tests.deploy.extras import packages_of

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
JOBS = ROOT / "tests/deploy/extra_jobs.py"


def interpreters() -> Iterator[tuple[str, Path]]:
    """Yield version and path of each Python that is here and has venv."""
    for version in VERSIONS:
        candidates = [*_on_path(f"python{version}"), *_of_pyenv(version)]
        for candidate in candidates:
            # A launcher on PATH, such as one of pyenv, may run another program.
            code = "import ensurepip, sys; print(*sys.version_info[:2], sys.executable)"
            found = subprocess.run(
                [candidate, "-c", code], capture_output=True, text=True, check=False
            )
            begin = f"{version.replace('.', ' ')} "
            if found.stdout.startswith(begin):
                yield version, Path(found.stdout.removeprefix(begin).strip())
                break


def _on_path(name: str) -> Iterator[Path]:
    for folder in os.get_exec_path():
        if (path := Path(folder, name)).exists():
            yield path


def _of_pyenv(version: str) -> list[Path]:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return sorted(root.glob(f"versions/{version}.*/bin/python"))


def packages_of_checkout(folder: Path) -> tuple[Path, Path]:
    """Build wheel and sdist of this checkout below a folder; return their paths."""
    copied = folder / "sources"
    shutil.copytree(
        ROOT / "src", copied / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for path in [*ROOT.glob("*.toml"), ROOT / "README.md", ROOT / "LICENSE", *ROOT.glob("THIRD*")]:
        shutil.copy(path, copied)
    publish_readme(copied)
    sdist, wheel = sorted(build(copied, folder / "dist"), key=lambda path: path.suffix)
    return wheel, sdist


def wheel_of_checkout(folder: Path) -> Path:
    """Build the wheel of this checkout below a folder; return its path."""
    return packages_of_checkout(folder)[0]


def wheelhouse(folder: Path, extras: Collection[str]) -> Path:
    """Pack the packages that extras bring, as they are installed here, into wheels in a folder.

    pip can install them without an index. Programs are made anew from the entry points.
    """
    folder.mkdir()
    for name in sorted(packages_of(extras)):
        with suppress(PackageNotFoundError):  # for other systems or versions of Python
            _pack(distribution(name), folder)
    return folder


def _pack(package: Distribution, folder: Path) -> None:
    tag = re.findall(r"^Tag: (\S+)$", package.read_text("WHEEL") or "", re.MULTILINE)[-1]
    named = re.sub(r"[-_.]+", "_", package.name)
    with zipfile.ZipFile(folder / f"{named}-{package.version}-{tag}.whl", "w") as wheel:
        for file in package.files or ():
            path = Path(str(file.locate()))
            if ".." not in file.parts and file.suffix != ".pyc" and path.is_file():
                wheel.write(path, str(file))


@dataclass(frozen=True)
class Ended:
    """A command that ended, with its seconds: by the clock, and of processor time."""

    code: int
    output: str
    seconds: float
    busy: float


def timed(*command: str | Path, environment: Mapping[str, str] = {}, cwd: Path = ROOT) -> Ended:
    """Run a command in a folder, with more variables; return how it ended."""
    ours = {"VIRTUAL_ENV", "PYTHONPATH"}
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    began, before = time.monotonic(), _processor_seconds()
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds, busy = time.monotonic() - began, _processor_seconds() - before
    return Ended(done.returncode, done.stdout + done.stderr, seconds, busy)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def uv(*arguments: str | Path) -> Ended:
    """Run uv, with the index of pip; return how it ended."""
    return timed(UV, *arguments, environment=index())


@cache
def index() -> dict[str, str]:
    """Return the variable that gives uv the index of pip; it reads little of pip's settings."""
    if "UV_DEFAULT_INDEX" in os.environ:
        return {}
    configured = timed(sys.executable, "-m", "pip", "config", "get", "global.index-url")
    named = os.environ.get("PIP_INDEX_URL") or (configured.output if not configured.code else "")
    return {"UV_DEFAULT_INDEX": named.strip()} if named.strip() else {}


@dataclass(frozen=True)
class Environment:
    """A virtual environment, in a folder of its own."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin/python"

    @property
    def packages(self) -> Path:
        """The folder of its packages."""
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, *arguments: str | Path, **environment: str) -> Ended:
        """Run its Python in the folder above it, where no module of this checkout is."""
        place = self.folder.parent
        return timed(self.python, *arguments, cwd=place, environment=environment)

    def files(self) -> set[str]:
        """Return the files of the distribution, without byte code."""
        paths = (self.packages / "viralfx").rglob("*")
        return {
            path.relative_to(self.packages).as_posix()
            for path in paths
            if path.is_file() and path.suffix != ".pyc"
        }

    def problems(self, extra: str = "all") -> Iterator[str]:
        """Yield each problem of the distribution with one extra: the job of that extra fails.

        For all extras that imports each module, and the doctor has to find nothing either. The
        empty name is no extra.
        """
        yield from failure("uv pip check", uv("pip", "check", "--python", self.python))
        yield from failure(f"the job of {extra or 'no extra'}", self.run(JOBS, extra))
        if extra == "all":
            doctor = self.run("-m", "viralfx", "doctor", "--json", PORT="0")
            yield from failure("viralfx doctor", doctor)


def failure(what: str, ended: Ended) -> list[str]:
    """Return a line about a command that failed; none if it did not."""
    return [f"{what} ends with {ended.code}: {ended.output[-4000:]}"] if ended.code else []


def from_lock(wheel: Path, folder: Path) -> Iterator[str]:
    """Install a wheel with all extras and the packages of the lock by uv; yield problems.

    The folder must not exist. Hashes are compared, and nothing that the lock lacks is installed.
    """
    made = Environment(folder)
    into = ("pip", "install", "--quiet", "--no-deps", "--python", made.python)
    steps: tuple[tuple[str | Path, ...], ...] = (
        ("venv", "--quiet", "--python", sys.executable, folder),
        (*into, "--require-hashes", "--requirement", ROOT / "requirements.lock"),
        (*into, wheel),
    )
    for step in steps:
        if found := failure(f"uv {' '.join(map(str, step))}", uv(*step)):
            yield from found
            return
    yield from made.problems()


def main() -> int:
    """Install the wheel of this checkout from the lock; return the exit code."""
    # Beside the environment, which has the same packages: /tmp may be small.
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        wheel = wheel_of_checkout(Path(folder))
        problems = list(from_lock(wheel, Path(folder, "locked")))
    for each in problems:
        print(f"PROBLEM {each}")
    print(f"{wheel.name} with the packages of requirements.lock: {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    # An exit lets the installer that runs be killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
