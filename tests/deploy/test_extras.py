"""Each extra alone does its job, and a missing one is one line.

Every day the packages of other extras are hidden from an interpreter. With VIRALFX_TEST_WHEELS=1,
as `just check-packaging` sets it, the tests install the built wheel into an environment for each
extra.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from tests.deploy.extra_jobs import JOBS
from tests.deploy.extras import ROOT, declared, environment_of, packages_of, table
from tests.deploy.wheels import Ended, Environment, failure, uv, wheel_of_checkout
from tests.servers.postgres import Database
from tests.soak import Record

from viralfx.core.extras import EXTRAS, extra_of, is_installed

PROGRAM = ROOT / "tests/deploy/extra_jobs.py"
WITH = {"docs": "litestar", "migrate": "postgres", "otel-grpc": "otel"}
"""Extras that need no module of their own."""
SMALL = {"msgspec", "psutil", "prometheus-client"}

TRACED = "OTEL_EXPORTER_OTLP_ENDPOINT"
DATABASE = {"DATABASE_URL": "postgresql://viralfx@127.0.0.1:1/viralfx"}
REDIS = {"REDIS_URL": "redis://127.0.0.1:1"}
TRACES = {TRACED: "http://127.0.0.1:1"}
GRPC = {**TRACES, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
SERVICE = ("serve",)


WHEELS = os.environ.get("VIRALFX_TEST_WHEELS") == "1"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Return the wheel to install; None if packages are hidden in its place."""
    return wheel_of_checkout(tmp_path_factory.mktemp("wheel")) if WHEELS else None


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(wheel: Path | None, tmp_path: Path) -> Run:
    """Return a function that runs Python with the packages of some extras alone."""

    def run(
        extras: tuple[str, ...], *arguments: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        if wheel is None:
            python, environment = Path(sys.executable), environment_of(extras, tmp_path)
        else:
            python = installed(wheel, extras)[0].python
            environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        return subprocess.run(
            [python, *arguments],
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=80,
            check=False,
        )

    return run


@functools.cache
def installed(wheel: Path, extras: tuple[str, ...]) -> tuple[Environment, Ended, float]:
    """Install the wheel with extras by uv; return the environment, how that ended, and its MiB."""
    made = Environment(wheel.parent / "-".join(["with", *extras]))
    assert failure("uv venv", uv("venv", "--quiet", "--python", sys.executable, made.folder)) == []
    wanted = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    ended = uv("pip", "install", "--quiet", "--python", made.python, wanted)
    assert failure("uv pip install", ended) == []
    sizes = (path.stat().st_size for path in made.packages.rglob("*") if path.is_file())
    return made, ended, sum(sizes) / 2**20


def line(asked_by: str, extras: str) -> str:
    """Return the one line about missing extras, with this installation as the source."""
    installed = distribution("viralfx").read_text("direct_url.json")
    assert installed is not None
    assert json.loads(installed)["url"] == ROOT.as_uri()
    return f"{asked_by} needs viralfx[{extras}]: pip install -e '{ROOT}[{extras}]'"


def without_source(text: str) -> str:
    """Return lines without the path that pip installs from: with wheels there is another one."""
    return re.sub(r"pip install (?:-e )?'[^\[']*\[", "pip install '[", text)


def test_without_an_extra_there_are_three_packages() -> None:
    """They have no dependencies."""
    assert packages_of([]) == SMALL


def test_all_holds_every_extra() -> None:
    """The image and the environment of the tests install it."""
    (everything,) = declared()["all"]

    assert everything.extras == declared().keys() - {"", "all"}
    assert declared().keys() == JOBS.keys()


def test_the_document_shows_the_extras() -> None:
    """docs/installation.md has a row for each, with about as many packages and their size."""
    text = (ROOT / "docs/installation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?([\w-]+)`? \| .* \| (\d+) \| (\d+) MiB \|$", text, re.MULTILINE)
    shown = {"" if name == "none" else name: (int(n), float(size)) for name, n, size in rows}

    # Versions of Python differ in what they need, and in their byte code.
    measured = {name: (number, size) for name, number, size in table()}
    assert shown.keys() == measured.keys()
    for name, (number, size) in shown.items():
        assert number == pytest.approx(measured[name][0], abs=3), name
        assert size == pytest.approx(measured[name][1], rel=0.4, abs=2), name


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_code_names_the_packages_of_an_extra(extra: str) -> None:
    """Each package that the code asks for is installed here, and its first one leads to it."""
    assert is_installed(extra)
    assert extra_of(EXTRAS[extra][0]) == WITH.get(extra, extra)
    assert EXTRAS.keys() <= declared().keys()


@pytest.mark.parametrize("extra", JOBS)
def test_an_extra_alone_does_its_job(
    extra: str,
    run: Run,
    wheel: Path | None,
    request: pytest.FixtureRequest,
    record_property: Record,
) -> None:
    """No package of another extra is imported for it."""
    variables = {}
    if extra in {"postgres", "asyncpg", "migrate"}:
        variables["DATABASE_URL"] = request.getfixturevalue("database").url
    if extra == "redis":
        variables["REDIS_URL"] = request.getfixturevalue("redis").url()
    extras = (extra,) if extra else ()
    done = run(extras, str(PROGRAM), extra, **variables)

    assert done.returncode == 0, done.stderr
    if wheel is not None:
        made, ended, size = installed(wheel, extras)
        packages = len(list(made.packages.glob("*.dist-info")))
        record_property(extra or "none", f"{packages} {size:.0f} {ended.seconds:.1f}")


@pytest.mark.parametrize(
    ("extras", "arguments", "variables", "expected"),
    [
        ((), ["serve"], {}, [line("viralfx serve", "serve")]),
        (("litestar",), ["worker"], {}, [line("viralfx worker", "serve")]),
        ((), ["migrate"], DATABASE, [line("viralfx migrate", "migrate")]),
        ((), ["jobs", "list"], DATABASE, [line("viralfx jobs", "postgres")]),
        (("litestar",), ["doctor"], {}, [line("viralfx doctor", "serve")]),
        (("asyncpg",), ["migrate"], DATABASE, [line("viralfx migrate", "migrate")]),
        (
            SERVICE,
            ["serve"],
            {**DATABASE, **REDIS},
            [
                line("DATABASE_URL is set, which", "postgres"),
                line("REDIS_URL is set, which", "redis"),
                line("REDIS_URL and DATABASE_URL are set, which", "jobs"),
            ],
        ),
        (SERVICE, ["worker"], TRACES, [line(f"{TRACED} is set, which", "otel")]),
        (
            (*SERVICE, "otel"),
            ["serve"],
            GRPC,
            [line(f"{TRACED} is set, which", "otel-grpc")],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple | list | dict) else None,
)
def test_a_missing_extra_is_one_line(
    extras: tuple[str, ...],
    arguments: list[str],
    variables: dict[str, str],
    expected: list[str],
    run: Run,
) -> None:
    """The command exits with 2, and the line can be pasted into a shell."""
    ended = run(extras, "-m", "viralfx", *arguments, **variables)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert without_source(ended.stderr).splitlines() == [
        f"viralfx: {without_source(each)}" for each in expected
    ]


def test_the_doctor_names_missing_extras(run: Run) -> None:
    """The other checks run, and the remedy is the command."""
    ended = run(SERVICE, "-m", "viralfx", "doctor", PORT="0", **DATABASE, **REDIS, **TRACES)

    assert ended.returncode == 1, ended.stderr
    for asked_by, extra in (
        ("DATABASE_URL", "postgres"),
        ("REDIS_URL", "redis"),
        (TRACED, "otel"),
    ):
        found, _, remedy = line(f"{asked_by} is set, which", extra).partition(": ")
        # The table breaks long lines.
        shown = " ".join(without_source(ended.stdout).split())
        assert shown.count(found) == 1
        assert shown.count(f"-> {without_source(remedy)}") == 1


_JOBS_API = """\
import viralfx.asgi
    viralfx.asgi.OperationsMiddleware(print, viralfx.OperationsConfig(jobs_api=True))"""

USES = {
    "viralfx.OperationsPlugin": ("import viralfx; viralfx.OperationsPlugin", "litestar"),
    "OperationsConfig.jobs_api": (_JOBS_API, "litestar"),
    "HttpCheck": ("from viralfx.checks import HttpCheck; HttpCheck('http://shop')", "webhooks"),
    "viralfx.taskiq": ("import viralfx.taskiq", "jobs"),
    "@task('t', cron=...)": (
        "from viralfx.jobs.schedule import Schedule; Schedule(task='t', cron='1 * * * *')",
        "cron",
    ),
    "a heap report": ("from viralfx.runner.diagnostics import _report; _report()", "heap"),
}


@pytest.mark.parametrize("name", USES)
def test_a_missing_extra_is_an_import_error_in_a_program(name: str, run: Run) -> None:
    """A program may catch it; the message names the extra."""
    code, extra = USES[name]
    caught = f"try:\n    {code}\nexcept ImportError as error:\n    print(error)"
    said = run((), "-c", caught)

    assert said.stderr == ""
    assert without_source(said.stdout) == without_source(f"{line(name, extra)}\n")


def test_tracing_of_an_application_does_not_need_the_extra(run: Run) -> None:
    """The plugin logs one warning: the variables may be those of the application."""
    code = "import logging; logging.basicConfig(); import viralfx; viralfx.OperationsPlugin()"
    ended = run(("litestar",), "-c", code, **TRACES)

    assert ended.returncode == 0, ended.stderr
    warned = f"Nothing is traced: {line(f'{TRACED} is set, which', 'otel')}"
    assert [without_source(each) for each in ended.stderr.splitlines() if "WARNING" in each] == [
        without_source(f"WARNING:viralfx.tracing:{warned}")
    ]


# -- without Litestar ----------------------------------------------------------------------------

DURABLE = ("serve-app", "postgres")
"""The extras of an application of another framework with durable jobs."""


COMMANDS = (
    ["migrate"],
    ["jobs", "submit", "default.prune", "null", "--json"],
    ["jobs", "list", "--json"],
    ["jobs", "list"],
    ["jobs", "queues", "--json"],
    ["jobs", "pause", "default", "--json"],
    ["jobs", "resume", "default"],
    ["jobs", "schedules", "--json"],
)


def test_jobs_need_no_litestar(run: Run, database: Database) -> None:
    """``viralfx jobs`` works in an environment that has none, in each form of its output."""
    code = (
        "import sys; from viralfx.cli import main;"
        f"print([main(each) for each in {COMMANDS!r}], 'litestar' in sys.modules)"
    )
    ended = run(DURABLE, "-c", code, DATABASE_URL=database.url)

    assert (ended.returncode, ended.stderr) == (0, "")
    *shown, codes = ended.stdout.splitlines()
    assert codes == f"{[0] * len(COMMANDS)} False"
    ids = re.findall(r'"id": "([0-9a-f-]{36})"', "\n".join(shown))
    assert len(ids) == 2
    assert len(set(ids)) == 1


def test_the_doctor_needs_no_litestar(run: Run) -> None:
    """It examines an application of another framework, or the operations layer alone."""
    for options, skipped in (((), 1), (("--app", "beside:app"), 0)):
        code = (
            "import sys; from pathlib import Path; Path('beside.py').write_text("
            "'async def app(scope, receive, send): ...'); sys.path.insert(0, '.');"
            f"from viralfx.cli import main; sys.exit(main(['doctor', '--json', *{options!r}]))"
        )
        ended = run(("serve-app",), "-c", code, PORT="0")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        found = json.loads(ended.stdout)["findings"]
        of_endpoints = [each["status"] for each in found if each["area"] == "health endpoints"]
        assert of_endpoints == ["pass", *["skip"] * skipped]
