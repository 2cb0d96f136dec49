"""The import rules, the cost of imports, and the public names."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.soak import only_in_soak

import viralfx

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/viralfx"
MODULES = sorted(PACKAGE.rglob("*.py"))
INNER = ("core", "domain", "jobs", "resilience")
STORES = {("jobs", "memory"), ("jobs", "postgres")}
"""Where the jobs are kept."""
CORE = [
    module
    for module in MODULES
    if (parts := module.relative_to(PACKAGE).parts)[0] in INNER and parts[:2] not in STORES
]

SLOW = {"litestar", "asyncpg", "redis", "taskiq", "msgspec", "uvicorn", "psutil", "structlog"}
PUBLIC = {
    "Accepted",
    "ApiDocsPlugin",
    "Backoff",
    "BackoffPolicy",
    "Bulkhead",
    "BulkheadFullError",
    "Cache",
    "CheckConfig",
    "CircuitBreaker",
    "CircuitOpenError",
    "ConfigurationError",
    "Deadline",
    "Discard",
    "DiskCheck",
    "HealthCheck",
    "HttpCheck",
    "InvalidFilterError",
    "Job",
    "JobContext",
    "JobFilter",
    "JobNotFoundError",
    "JobService",
    "JobState",
    "JobStateError",
    "KeyConflictError",
    "KeyHeldError",
    "LedgerUnavailableError",
    "Observation",
    "OperationsConfig",
    "OperationsLayer",
    "OperationsPlugin",
    "PayloadError",
    "PayloadTooLargeError",
    "PostgresDatabase",
    "Principal",
    "RedisClient",
    "RetryPolicy",
    "Right",
    "Settings",
    "ShutdownStage",
    "Snooze",
    "SqlAlchemyCheck",
    "Status",
    "TaskMiddleware",
    "TcpCheck",
    "TransactionError",
    "UnknownQueueError",
    "UnknownScheduleError",
    "UnknownTaskError",
    "UnstorableError",
    "ViralFXError",
    "bind_user_id",
    "circuit_breaker",
    "read_settings",
    "retry",
    "task",
    "with_fallback",
}
CALCULATIONS = {"cronsim"}
"""Libraries that only calculate, and import the standard library alone (ADR-0055)."""
HOMES = {
    "cronsim": {"jobs/schedule.py"},
    "psutil": {"adapters/process_memory.py"},
    "structlog": {"telemetry/logging/handler.py"},
    "uvicorn": {
        "server/http_server.py",
        "server/protocol.py",
        "server/response.py",
    },
}
GOING_AWAY = {
    "litestar.contrib",
    "litestar.repository",
    "litestar.plugins.InitPluginProtocol",
    "litestar.plugins.CLIPluginProtocol",
    "litestar.plugins.structlog",
    "litestar.logging",
    "litestar.middleware.AbstractMiddleware",
    "litestar.middleware.MiddlewareProtocol",
    "litestar.openapi.OpenAPIController",
    "litestar.params.Dependency",
    "litestar.params.Parameter",
}
OTHER_WAITS = {"timeout", "timeout_at", "wait_for", "gather", "as_completed", "sleep"}


def name_of(module: Path) -> str:
    """Return a module's path below the package."""
    return module.relative_to(PACKAGE).as_posix()


def tree(module: Path) -> ast.Module:
    """Return a module's syntax."""
    return ast.parse(module.read_text(encoding="utf-8"))


@functools.cache
def imports(module: Path) -> Sequence[str]:
    """Return the dotted name of everything a module imports, wherever it does so."""
    names: list[str] = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return names


def lint(folder: Path, package: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package that lies in ``package``."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package), "PYTHONUTF8": "1", "COLUMNS": "200"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def modules_after(code: str) -> set[str]:
    """Return the names of the packages that a new interpreter has imported after ``code``."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(); print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in shown.stdout.splitlines()[-1].split()}


def test_the_contracts_are_kept() -> None:
    """import-linter finds no import that a decision forbids."""
    result = lint(ROOT, ROOT / "src")

    assert (result.returncode, result.stderr) == (0, ""), result.stdout


INDEPENDENT = "ADR-0002: adapters do not know each other"
BITES = [
    ("utils.py", '"""A stray module."""', "ADR-0002: dependencies point inwards"),
    ("bootstrap.py", "import viralfx.web.app", "ADR-0002: dependencies point inwards"),
    ("core/clock.py", "import uvloop", "ADR-0002: the domain knows no technology"),
    ("web/app.py", "import viralfx.adapters.memory", "ADR-0002: only bootstrap picks adapters"),
    (
        "jobs/service.py",
        "import viralfx.settings.model",
        "ADR-0079: the jobs know neither settings nor telemetry nor HTTP",
    ),
    (
        "web/layer.py",
        "import viralfx.postgres.pool",
        "ADR-0079: the connections of Postgres serve its adapters and its ledger",
    ),
    ("server/protocol.py", "import viralfx.web.gate", "ADR-0079: the server knows no operations"),
    ("resilience/retry.py", "import viralfx.domain.cache", "ADR-0079: resilience stands alone"),
    ("runner/commands.py", "import litestar", "ADR-0004: Litestar stays in web"),
    ("web/gate.py", "import uvicorn", "ADR-0008: uvicorn stays in the server"),
    ("telemetry/logging/handler.py", "import redis", "ADR-0018: redis stays in its adapter"),
    ("runner/process.py", "import taskiq", "ADR-0023: taskiq stays in its adapter"),
    ("core/events.py", "import viralfx.domain.health.monitor", "ADR-0002: no cycles"),
    (
        "bootstrap/task_modules.py",
        "import asyncpg",
        "ADR-0017: asyncpg stays in the packages of Postgres",
    ),
    (
        "postgres/migrate.py",
        "import sqlalchemy",
        "ADR-0078: SQLAlchemy comes from the caller alone",
    ),
    ("bootstrap/jobs.py", "import httpcore", "ADR-0024: httpcore stays in its adapter"),
    (
        "web/endpoints.py",
        "import prometheus_client",
        "ADR-0025: Prometheus's client stays in telemetry",
    ),
    (
        "telemetry/__init__.py",
        "import opentelemetry",
        "ADR-0026: OpenTelemetry stays in telemetry",
    ),
    (
        "web/responses.py",
        "import litestar",
        "ADR-0063: the operations layer knows no framework",
    ),
    ("jobs/worker/maintenance.py", "import cronsim", "ADR-0055: cronsim stays in schedules"),
]
"""A module, an import that it must not have, and the contract that forbids it."""


def broken(folder: Path, *cases: tuple[str, str, str]) -> dict[str, str]:
    """Return the broken contracts of a copy with the imports of the cases, with their report."""
    shutil.copytree(PACKAGE, folder / "viralfx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for module, line, _ in cases:
        with (folder / "viralfx" / module).open("a") as file:
            file.write(f"\n{line}\n")
    result = lint(folder, folder)
    assert result.returncode == 1, result.stdout
    names = re.findall(r"^(.+) BROKEN(?: \(.+\))?$", result.stdout, re.MULTILINE)
    parts = re.split(r"^(.+)\n-+$", result.stdout, flags=re.MULTILINE)
    reports = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: reports[name] for name in names}


def test_the_contracts_bite(tmp_path: Path) -> None:
    """Each contract that names the decision is broken, and its report has the forbidden import."""
    reports = broken(tmp_path, *BITES)

    for module, line, contract in BITES:
        name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        _, imports, imported = line.partition("import ")
        wanted = f"viralfx.{name} -> {imported}" if imports else f"viralfx.{name}"
        if contract == "ADR-0002: no cycles":  # the report has the packages
            wanted = ".core -> .domain"
        assert wanted in reports[contract], (contract, reports[contract])


@only_in_soak
@pytest.mark.parametrize(("module", "line", "contract"), BITES)
def test_a_contract_bites(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """One forbidden import is enough."""
    assert contract in broken(tmp_path, (module, line, contract))


def test_each_contract_has_a_case_that_shows_it_bite() -> None:
    """A contract can neither be removed nor added without a case."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    contracts = {contract["name"] for contract in tools["importlinter"]["contracts"]}

    assert contracts == {contract for _, _, contract in BITES} | {INDEPENDENT}


def test_two_adapters_that_know_each_other_break_a_contract(tmp_path: Path) -> None:
    """A second adapter that imports the first one breaks the contract."""
    shutil.copytree(PACKAGE, tmp_path / "viralfx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "viralfx/adapters/other.py").write_text("import viralfx.adapters.memory\n")
    result = lint(tmp_path, tmp_path)

    assert f"{INDEPENDENT} BROKEN" in result.stdout


def test_the_domain_imports_the_standard_library_alone() -> None:
    """Every import of a domain module is the standard library's or the domain's own.

    Apart from libraries that only calculate.
    """
    foreign = {
        (name_of(module), name)
        for module in CORE
        for name in imports(module)
        if not name.startswith(tuple(f"viralfx.{part}." for part in INNER))
        and name.partition(".")[0] not in sys.stdlib_module_names | CALCULATIONS
    }

    assert foreign == set()


def test_each_driver_has_one_home() -> None:
    """A library that one module wraps is imported by that module alone."""
    users = {
        library: {
            name_of(module)
            for module in MODULES
            if any(name.partition(".")[0] == library for name in imports(module))
        }
        for library in HOMES
    }

    assert users == HOMES


def test_no_import_is_removed_in_litestar_3_0() -> None:
    """No module imports a name that Litestar 3.0 removes."""
    old = {
        (name_of(module), name)
        for module in MODULES
        for name in imports(module)
        if any(name == gone or name.startswith(f"{gone}.") for gone in GOING_AWAY)
    }

    assert old == set()


def test_there_is_one_process() -> None:
    """No module of the package starts a process."""
    makers = {"multiprocessing", "subprocess", "concurrent.futures.ProcessPoolExecutor"}
    used = {
        (name_of(module), name)
        for module in MODULES
        for name in imports(module)
        if name in makers or name.partition(".")[0] in makers
    }

    assert used == set()


def test_the_domain_waits_in_one_way() -> None:
    """The domain uses timers and limits of the clock, except for the listed ones."""
    used = {
        (name_of(module), node.attr)
        for module in CORE
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute)
        and (
            node.attr in {"call_at", "call_later"}
            or (
                isinstance(node.value, ast.Name)
                and (
                    (node.value.id == "asyncio" and node.attr in OTHER_WAITS)
                    or node.value.id == "time"
                    or (node.value.id == "datetime" and node.attr in {"now", "utcnow"})
                )
            )
        )
    }

    assert used == {
        ("core/clock.py", "monotonic"),
        ("core/clock.py", "now"),
        ("core/clock.py", "sleep"),
        ("core/clock.py", "call_at"),
        ("core/clock.py", "call_later"),
        # A slow call does not hold up the next batch.
        ("jobs/batching.py", "call_later"),
        # It announces a scheduled job when the job is due.
        ("jobs/notifier.py", "call_later"),
        # A job's id begins with the time at which it was made.
        ("core/ids.py", "time_ns"),
        # A deadline cancels the caller's own code, and so waits for its clean-up.
        ("resilience/deadline.py", "call_later"),
        # The default wait of plain functions; an argument.
        ("resilience/retry.py", "sleep"),
        # The system clock's own reading, without a call in between.
        ("resilience/_callables.py", "monotonic"),
    }


def test_only_the_program_configures_logging() -> None:
    """One module configures the root logger, and only programs call it."""
    callers = {
        name_of(module)
        for module in MODULES
        if any(
            name.endswith(
                (".configure_logging", ".enforce_logging", "logging.config", ".basicConfig")
            )
            for name in imports(module)
        )
    }

    callers.remove("telemetry/logging/handler.py")
    assert callers == {"runner/commands.py", "cli/__init__.py", "cli/audit.py", "cli/jobs.py"}


def test_importing_the_package_is_cheap() -> None:
    """``import viralfx`` brings in none of the libraries that its parts need."""
    assert modules_after("import viralfx") & SLOW == set()


def test_a_name_that_needs_litestar_imports_it() -> None:
    """The import happens on first use."""
    assert "litestar" in modules_after("from viralfx import OperationsPlugin")


@pytest.mark.parametrize("arguments", ["--help", "live --url http://127.0.0.1:1 --timeout 1"])
def test_a_probe_stays_cheap(arguments: str) -> None:
    """``viralfx probe``, which a kubelet runs every few seconds, imports no framework."""
    code = f"""
from viralfx.cli import main
try:
    main(["probe", *{arguments.split()!r}])
except SystemExit:
    pass
"""
    assert modules_after(code) & SLOW == set()


def test_signals_are_watched_before_anything_slow() -> None:
    """The signal handling imports the standard library alone."""
    assert modules_after("import viralfx.runner.signals") & SLOW == set()


def test_the_public_names_are_listed() -> None:
    """``__all__`` holds every public name in order."""
    existing = sorted(name for name in PUBLIC if hasattr(viralfx, name))

    assert existing == viralfx.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The error has the usual words of a module."""
    with pytest.raises(AttributeError, match="module 'viralfx' has no attribute 'nothing'"):
        _ = viralfx.nothing
