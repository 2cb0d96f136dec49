"""The commands of the package below Litestar's own command."""

import json
import subprocess
from pathlib import Path

import pytest
from tests import forked
from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.system.service import ROOT, clean_environment

from viralfx.settings.doctor import plain_environment

SHOP = """
from litestar import Litestar
from viralfx import OperationsConfig, OperationsPlugin, task

@task("pack")
async def pack(order: int) -> int:
    return order

def create_app() -> Litestar:
    config = OperationsConfig(env_prefix="OPS_", tasks=[pack], checks={"shop": has_stock})
    return Litestar(plugins=[OperationsPlugin(config)])

def has_stock() -> bool:
    return True
"""


def litestar(
    *arguments: str, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of an application."""
    environ = {**clean_environment(), **environment}
    return forked.litestar("--app-dir", str(folder), *arguments, environ=environ, cwd=folder)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Return a folder with an application behind a factory, whose variables have a prefix."""
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


def test_doctor_checks_the_application(shop: Path) -> None:
    """It finds what Litestar's command was given, with the application's own check."""
    given = ("--app", "shop:create_app", "viralfx", "doctor", "--json")
    settings = {"OPS_HEALTH_CRITICAL": "shop", "OPS_PORT": str(free_port())}
    result = litestar(*given, folder=shop, **settings, HEALTH_CRITICAL="nothing")

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["findings"]


def test_jobs_of_the_application(shop: Path, database: Database) -> None:
    """A task that only the application knows is submitted to the ledger of its settings."""
    command = ("--app", "shop:create_app", "viralfx", "jobs")
    submitted = litestar(
        *command, "submit", "pack", "7", folder=shop, OPS_DATABASE_URL=database.url
    )
    listed = litestar(*command, "list", "--json", folder=shop, OPS_DATABASE_URL=database.url)

    assert submitted.returncode == 0, submitted.stderr
    assert '"pack"' in listed.stdout


def test_a_command_that_fails_has_its_own_exit_code() -> None:
    """There is no database, and one line says so."""
    result = litestar("--app", "docs.examples.orders:app", "viralfx", "migrate", "--check")

    assert result.returncode == 2
    assert "DATABASE_URL: not set" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.each_python
def test_each_command_has_the_help_of_the_program() -> None:
    """And is listed by Litestar's."""
    listed = litestar("--app", "docs.examples.orders:app", "viralfx", "--help").stdout
    helped = litestar("--app", "docs.examples.orders:app", "viralfx", "env", "--help").stdout

    for name in ("doctor", "env", "jobs", "migrate"):
        assert f"  {name}" in listed
    assert "viralfx env" in helped


def test_variables_without_the_prefix_belong_to_others() -> None:
    """A command must not migrate the database of the application."""
    environ = {
        "DATABASE_URL": "postgresql://other",
        "REDIS_HOST": "other",
        "OPS_REDIS_HOST": "own",
        "OPS_DATABASE_URL_FILE": "/own",
        "PATH": "/bin",
        "OTEL_SERVICE_NAME": "shop",
    }

    assert plain_environment(environ, "") == environ
    assert plain_environment(environ, "OPS_") == {
        "REDIS_HOST": "own",
        "OPS_REDIS_HOST": "own",
        "DATABASE_URL_FILE": "/own",
        "OPS_DATABASE_URL_FILE": "/own",
        "PATH": "/bin",
        "OTEL_SERVICE_NAME": "shop",
    }
