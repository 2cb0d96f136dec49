"""Installs wheel and sdist as users do, and sees them work: ``just check-packaging [PART...]``.

It needs a package index and some minutes, so it is no part of the gate. ``--record`` publishes the
tables of a run of all parts in benchmarks/RESULTS.md, unless there is a problem.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.endurance import read
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.deploy import tutorial
from tests.deploy.distribution import ROOT, UV
from tests.deploy.wheels import (
    JOBS,
    VERSIONS,
    Ended,
    Environment,
    failure,
    index,
    interpreters,
    packages_of_checkout,
    timed,
    uv,
)
from tests.servers.postgres import postgres_server

MAX_SECONDS = 60.0
"""For the pip that each supported Python comes with, and all extras."""

POPULAR = (
    *("sqlalchemy", "alembic", "pydantic", "httpx", "boto3", "celery", "sentry-sdk", "structlog"),
    *("advanced-alchemy", "fastapi"),
)
"""Packages that applications most likely have; all are installed beside ``viralfx[all]``."""

BESIDE = (
    *POPULAR,
    *("starlette", "django", "flask", "quart", "sanic", "psycopg", "redis"),
    *("uvicorn", "gunicorn", "hypercorn", "granian"),
    *("dramatiq", "procrastinate", "taskiq", "rq"),
    *("aiohttp", "requests", "logfire", "prometheus-client"),
)
"""Packages that applications have; each is resolved beside ``viralfx[all]``."""

APART = {
    "arq": "it needs an older redis",
    "saq": "its extra needs an older redis",
    "opentelemetry-distro": "it pins a newer release than one of the instrumentations has",
    "opentelemetry-sdk": "an instrumentation pins an older release of it",
}
"""Packages that are set back beside an extra, with the reason."""

_LIKE_OTHERS = tuple(
    f"--{kind}=-dac_override,-dac_read_search" for kind in ("inh-caps", "bounding-set")
)
"""Takes from root the right to write where the mode of a folder forbids it."""


@dataclass
class Report:
    """The files under test, a folder for environments, and the findings."""

    wheel: Path
    sdist: Path
    folder: Path
    pythons: dict[str, Path]
    """By version, the oldest first."""
    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    @property
    def python(self) -> Path:
        """The oldest Python."""
        return next(iter(self.pythons.values()))

    def environment(self, name: str) -> Environment:
        """Return one that does not exist yet."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return Environment(path)

    def add(self, problems: Sequence[str], where: str) -> None:
        """Take down problems."""
        self.problems += (f"{where}: {each}" for each in problems)
        print(f"  {where}: {'; '.join(problems) or 'no problem'}", flush=True)

    def show(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Take down a table."""
        self.lines += ["", *table(header, rows)]


# -- installers ----------------------------------------------------------------------------------


def by_pip(python: Path, made: Environment, wanted: str) -> tuple[str, Ended]:
    """Install by the pip that a Python comes with; return the name of the installer."""
    if (venv := timed(python, "-m", "venv", made.folder)).code:
        return "pip", venv
    version = made.run("-m", "pip", "--version").output.split()[1]
    install = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    # It unpacks there; /tmp may be small.
    return f"pip {version}", made.run(*install, wanted, TMPDIR=str(made.folder.parent))


def by_uv(python: Path, made: Environment, wanted: str) -> tuple[str, Ended]:
    """Install by uv; return the name of the installer."""
    version = uv("--version").output.split()[1]
    if (venv := uv("venv", "--quiet", "--python", python, made.folder)).code:
        return f"uv {version}", venv
    return f"uv {version}", uv("pip", "install", "--quiet", "--python", made.python, wanted)


def installers(report: Report) -> None:
    """Install the wheel with all extras, and the sdist, by pip and uv of each Python."""
    rows, slowest = [], 0.0
    for version, python in report.pythons.items():
        for by in (by_pip, by_uv):
            made = report.environment(version)
            name, ended = by(python, made, f"{report.wheel}[all]")
            problems = failure("the installation", ended) or list(made.problems())
            where = f"Python {version}, {name}"
            report.add(problems, f"{where}, wheel with all extras")
            rows.append((f"{where}, wheel with all extras", *_times(ended)))
            if by is by_pip:
                slowest = max(slowest, ended.seconds)
            files = set() if problems else made.files()
            made = report.environment(version)
            _, ended = by(python, made, str(report.sdist))
            problems = failure("the installation", ended) or list(made.problems(""))
            if files and not problems and (other := files ^ made.files()):
                problems = [f"only in one of wheel and sdist: {', '.join(sorted(other))}"]
            report.add(problems, f"{where}, sdist")
            rows.append((f"{where}, sdist without extras", *_times(ended)))
    report.show(("installed", "seconds", "of processor time"), rows)
    report.targets.append(
        Target(
            what="all extras by the slowest pip of the supported Pythons",
            measured=slowest,
            limit=MAX_SECONDS,
            at_least=False,
            unit=" s",
        )
    )


def _times(ended: Ended) -> tuple[str, str]:
    return f"{ended.seconds:.1f}", f"{ended.busy:.1f}"


# -- extras --------------------------------------------------------------------------------------


def extras(report: Report) -> None:
    """Install each extra alone, let it do its job, and look at the lines about missing ones."""
    file = report.folder / "extras.xml"
    tests = ("tests/deploy/test_extras.py", f"--junitxml={file}", "-o", "junit_family=xunit1")
    ended = timed(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests),
        environment={"VIRALFX_TEST_WHEELS": "1"},
    )
    found = read(file)
    skipped = found.results.total() - found.results["passed"]
    report.add(
        failure("pytest", ended) or ([f"{skipped} tests did not run"] if skipped else []),
        f"extras, {found.results['passed']} tests",
    )
    rows = [(f"`{name}`", *values[0].split()) for name, values in found.figures.items()]
    report.show(("extra, installed alone by uv", "packages with this one", "MiB", "seconds"), rows)


# -- other packages ------------------------------------------------------------------------------


def beside(report: Report) -> None:
    """Resolve the wheel beside each other package, and run it beside those most likely there.

    A package that gets an older version beside this one is a problem, too: an application would
    be set back in silence.
    """
    found = list(_set_back(report))
    report.add(found, f"resolved beside each of {len(BESIDE)} packages, and beside all")
    made = report.environment("beside")
    python = ("--quiet", "--python", made.python)
    problems = failure("uv venv", uv("venv", "--quiet", "--python", report.python, made.folder))
    ended = uv("pip", "install", *python, f"{report.wheel}[all]", *POPULAR)
    problems = problems or failure("uv pip install", ended) or list(made.problems())
    if not problems:
        with postgres_server() as server:
            program, url = ROOT / "tests/deploy/beside_jobs.py", server.url()
            problems = failure(program.name, made.run(program, DATABASE_URL=url))
    where = f"in one environment with {', '.join(POPULAR)}"
    report.add(problems, where)
    report.show(
        ("beside `viralfx[all]`", "packages", "problems"),
        [
            ("resolved, each alone and all together", str(len(BESIDE)), str(len(found))),
            (where, str(len(POPULAR)), str(len(problems))),
        ],
    )


def _set_back(report: Report) -> Iterator[str]:
    ours = f"viralfx[all] @ {report.wheel.as_uri()}"
    together = _resolved(report, [ours, *BESIDE])
    if isinstance(together, str):
        yield together
    for name in (*BESIDE, *APART):
        alone, both = _resolved(report, [name]), _resolved(report, [name, ours])
        if isinstance(alone, str) or isinstance(both, str):
            yield f"{name}: {alone if isinstance(alone, str) else both}"
        elif alone[name] != both[name]:
            how = f"{name} is {both[name]} beside viralfx[all], and {alone[name]} alone"
            if name in APART:
                print(f"  {how}: {APART[name]}")
            else:
                yield how


def _resolved(report: Report, requirements: Sequence[str]) -> dict[str, str] | str:
    """Return the versions that uv finds for the requirements, or its message."""
    file = report.folder / "requirements.in"
    file.write_text("\n".join(requirements), encoding="utf-8")
    plain = ("--quiet", "--no-header", "--no-annotate")
    ended = uv("pip", "compile", *plain, "--python", report.python, file)
    if ended.code:
        return ended.output[-4000:]
    return dict(re.findall(r"^([\w.-]+)==(\S+)", ended.output, re.MULTILINE))


# -- bare machines -------------------------------------------------------------------------------


def bare(report: Report) -> None:
    """Install and serve without ensurepip, and with a home that cannot be written or is none."""
    locked_home = report.folder / "home"
    locked_home.mkdir(mode=0o555, exist_ok=True)
    wanted, rows = f"{report.wheel}[serve]", []
    quiet = ("install", "--quiet")
    for where, home, pip in (
        ("without ensurepip, by the pip of another environment", None, True),
        ("without ensurepip, by uv", None, False),
        ("a read-only home, by pip", locked_home, True),
        ("no home, by pip", Path("/proc/none"), True),
        ("a read-only home, by uv with --no-cache", locked_home, False),
    ):
        made = report.environment("bare")
        begin = _without_rights() if home else ()
        variables = {"TMPDIR": str(report.folder), **({"HOME": str(home)} if home else {})}
        venv = ("-m", "venv", "--without-pip", str(made.folder))
        prepared = timed(*begin, report.python, *venv, environment=variables)
        install = (
            (str(report.python), "-m", "pip", "--python", str(made.python), *quiet)
            if pip
            else (str(UV), "pip", *quiet, "--python", str(made.python))
        )
        cache = ("--no-cache",) if home and not pip else ()
        packages = {**index(), **variables}
        ended = timed(*begin, *install, *cache, wanted, environment=packages)
        problems = failure("venv", prepared) or failure("the installation", ended)
        if home and not timed(*begin, "touch", home / "written").code:
            problems.append(f"{home} can be written, so nothing is shown")
        problems = problems or _works(made, begin, variables)
        report.add(problems, where)
        rows.append((where, f"{ended.seconds:.1f}", str(len(problems))))
    report.show(("`viralfx[serve]`", "seconds", "problems"), rows)


def _works(made: Environment, begin: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Serve and stop, and run the doctor; return problems."""
    inside = (*begin, str(made.python))
    served = timed(*inside, JOBS, "serve", environment=variables, cwd=made.folder)
    ask = (*inside, "-m", "viralfx", "doctor", "--json")
    doctor = timed(*ask, environment={"PORT": "0", **variables}, cwd=made.folder)
    return [*failure("viralfx serve", served), *failure("viralfx doctor", doctor)]


def _without_rights() -> tuple[str, ...]:
    """Return the words before a command that may write only where the mode of a folder allows."""
    return ("setpriv", *_LIKE_OTHERS) if os.geteuid() == 0 else ()


# -- the tutorial --------------------------------------------------------------------------------


def stranger(report: Report) -> None:
    """Run the commands of the tutorial in an empty folder; `just tutorial` records each."""
    steps = tutorial.run(report.folder / "tutorial", report.wheel)
    missed = [target for target in tutorial.targets(steps) if not target.met]
    report.add([f"{each.what}: {each.measured:g}" for each in missed], "the tutorial")
    report.targets += tutorial.targets(steps)


PARTS: dict[str, Callable[[Report], None]] = {
    "installers": installers,
    "extras": extras,
    "beside": beside,
    "bare": bare,
    "tutorial": stranger,
}


def main() -> int:
    """Run the parts, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just check-packaging", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--record", action="store_true", help="publish the tables in RESULTS.md")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.record and options.parts:
        parser.error("--record needs a run of all parts: leave out their names")
    # An exit lets the installer that runs be killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Beside the environment, which has the same packages: /tmp may be small.
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        os.environ.setdefault("VIRALFX_TEST_SERVERS", "wheels")
        report = Report(*packages_of_checkout(Path(folder)), Path(folder), dict(interpreters()))
        print(f"{report.wheel.name}, Python {', '.join(report.pythons)}", flush=True)
        if next(iter(report.pythons), None) != VERSIONS[0]:
            parser.error(f"Python {VERSIONS[0]} with ensurepip is not on PATH and not in pyenv")
        for name in options.parts or PARTS:
            PARTS[name](report)
    return _published(report, record=options.record)


def _published(report: Report, *, record: bool) -> int:
    missing = ", ".join(sorted(set(VERSIONS) - report.pythons.keys())) or "none"
    problems = Target(what="problems", measured=len(report.problems), limit=0, at_least=False)
    targets = [*report.targets, problems]
    lines = [
        *circumstances(
            command("check-packaging"),
            f"Versions of Python that this machine lacks: {missing}",
            "Times depend on the caches of pip and uv, and on the index",
        ),
        *report.lines,
        "",
        *target_table(targets),
    ]
    for each in report.problems:
        print(f"PROBLEM {each}")
    recorded = record and not report.problems
    return publish("check_packaging.py", lines, targets, check=True, record=recorded)


if __name__ == "__main__":
    sys.exit(main())
