"""The units of systemd on one machine: systemd accepts them, and their restart loses no request."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
from tests.servers.fixtures import or_skip
from tests.servers.haproxy import Proxy, haproxy
from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.soak import SOAK, Record, cycles
from tests.system.load import Load
from tests.system.service import ROOT, request
from tests.system.test_rolling_update import RATES, TRAFFIC, manifests
from tests.system.units import UNITS, Manager, Unit, installed

REQUESTS = 10_000 if SOAK else 200
"""The least number of requests of a rolling restart."""
ANY_PORT = "viralfx-api@3001"


@contextmanager
def machine(
    folder: Path, environment: dict[str, str], *more: str
) -> Iterator[tuple[Manager, Proxy, list[str]]]:
    """Run two instances behind HAProxy, with more units; yield the names of the instances."""
    installed(folder, environment)
    ports = {"a": free_port(), "b": free_port()}
    instances = [f"viralfx-api@{port}" for port in ports.values()]
    with Manager(folder) as manager, or_skip():
        for name in (*more, *instances):
            assert manager.start(name), (folder / f"{name}.log").read_text(encoding="utf-8")
        with haproxy(free_port(), ports, folder) as proxy:
            wait_until(lambda: proxy.is_up("a") and proxy.is_up("b"), what="both are healthy")
            yield manager, proxy, instances


def rolling_restart(
    manager: Manager, proxy: Proxy, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as an operator does, with the stand-in for systemctl."""
    with manager.systemctl() as folder:
        command: list[str | Path] = [
            UNITS / "rolling-restart",
            "--socket",
            proxy.statistics,
            *arguments,
        ]
        environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=False
        )


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_rolling_restart_loses_no_request(
    database: Database, tmp_path: Path, record_property: Record
) -> None:
    """API, worker and migration are started by their units, and restarted under load."""
    environment = {
        "DATABASE_URL": database.url,
        "POOL_PROFILE": "medium",
        "ENVIRONMENT": "test",
        "ARGUMENTS": "--app tests.system.backend_app:app",
    }
    worker = f"viralfx-worker@{free_port()}"
    database.execute("CREATE TABLE written (id bigserial PRIMARY KEY)")
    with machine(tmp_path, environment, "viralfx-migrate", worker) as (manager, proxy, instances):
        with Load(proxy.port, RATES) as load:
            wait_until(lambda: len(load.responses) > TRAFFIC, what="load")
            for _round in cycles(3):
                done = rolling_restart(manager, proxy, *instances, worker)
                assert (done.returncode, done.stderr) == (0, "")
                print(done.stdout)  # noqa: T201
            wait_until(lambda: len(load.responses) >= REQUESTS, seconds=120, what="all requests")
        hidden = proxy.hidden()

    statuses = Counter(response.status for response in load.responses)
    record_property("units: requests", len(load.responses))
    record_property("units: requests that failed", len(load.responses) - statuses[HTTPStatus.OK])
    record_property("units: requests that the proxy repeated, or that had no answer", hidden)
    record_property("units: restarts of a unit", len(manager.codes))
    assert set(statuses) == {HTTPStatus.OK}
    assert hidden == 0
    assert {code for _, code in manager.codes} == {0}
    assert {name for name, _ in manager.codes} == {*instances, worker}


@pytest.mark.timeout(180)
def test_a_failed_restart_is_the_last_one(tmp_path: Path) -> None:
    """An instance with a wrong setting ends the restart; the other one serves, and stays."""
    environment = {
        "ENVIRONMENT": "development",
        "ARGUMENTS": "",
        "SHUTDOWN_READINESS_DELAY": "1000",
    }
    with machine(tmp_path, environment) as (manager, proxy, (first, second)):
        installed(tmp_path, {**environment, "LOG_LEVEL": "loud"})
        failed = rolling_restart(manager, proxy, first, second)
        wait_until(lambda: not proxy.is_up("a"), what="the proxy sees one instance")
        alone = rolling_restart(manager, proxy, "--wait", "0.5", second)
        unknown = rolling_restart(manager, proxy, "viralfx-api@1")
        silent = rolling_restart(manager, proxy, "--socket", str(tmp_path / "none"), second)
        answer = request(proxy.port, "/health/ready")

    assert failed.returncode == 1
    assert f"{first}: the restart failed" in failed.stderr
    assert alone.returncode == 1
    assert "no server but" in alone.stderr
    assert (unknown.returncode, silent.returncode) == (1, 1)
    assert unknown.stderr.startswith("HAProxy has no server with port 1; it has ")
    assert silent.stderr.startswith(f"{second}: {tmp_path / 'none'} does not answer: ")
    assert answer.status == HTTPStatus.OK
    assert second not in {name for name, _ in manager.codes}
    assert "LOG_LEVEL: 'loud'" in (tmp_path / f"{first}.log").read_text(encoding="utf-8")


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """Each unit and each directive is known; a wrong one is noticed."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not on PATH; Debian's package systemd has it")

    def verify(*units: Path) -> str:
        command: list[str | Path] = [program, "verify", "--man=no", *units]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stderr

    installed(tmp_path, {})
    units = sorted(tmp_path.glob("*.service"))
    assert len(units) == len(list(UNITS.glob("*.service")))
    assert verify(*units) == ""

    wrong = tmp_path / "viralfx-wrong.service"
    wrong.write_text(units[0].read_text(encoding="utf-8").replace("KillMode", "KilMode"))
    assert "KilMode" in verify(wrong)


def test_the_units_expose_little(tmp_path: Path) -> None:
    """By systemd's measure of 0 to 10: the host's files, networks and users are left."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not on PATH; Debian's package systemd has it")

    installed(tmp_path, {})
    for unit in tmp_path.glob("*.service"):
        command: list[str | Path] = [program, "security", "--offline=true", "--threshold=15", unit]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_owner_of_the_tables_is_known_to_migrations_alone(tmp_path: Path) -> None:
    """Their file is optional: without it they connect as the service does."""
    shared, own = {"DATABASE_URL": "service"}, {"DATABASE_MIGRATION_URL": "owner"}
    installed(tmp_path, shared, own)
    names = {unit.name.replace("@", "@3001") for unit in tmp_path.glob("*.service")}
    knowing = {name for name in names if own.items() <= Unit(tmp_path, name).environment().items()}
    assert knowing == {"viralfx-migrate.service"}

    (tmp_path / "migrate.env").unlink()
    assert Unit(tmp_path, "viralfx-migrate").environment()["DATABASE_URL"] == "service"


def test_a_process_of_a_unit_makes_no_code(tmp_path: Path) -> None:
    """The stand-in obeys the directive: memory that is writable is not executable."""
    installed(tmp_path, {"ARGUMENTS": ""})
    prefix = Unit(tmp_path, ANY_PORT).main_command()[:3]
    mapping = "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)"
    command = [*prefix, sys.executable, "-c", mapping]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    if done.returncode == 0:
        pytest.skip("this kernel cannot deny it; Linux 6.3 can")
    assert "PermissionError" in done.stderr


@pytest.mark.parametrize("name", ["viralfx-api@3001", "viralfx-worker@3101"])
def test_the_times_of_a_unit_fit_together(name: str, tmp_path: Path) -> None:
    """Systemd waits as long as the program has, and the delay is that of the manifests."""
    installed(tmp_path, {})
    unit = Unit(tmp_path, name)
    environment = unit.environment()
    command = unit.command("ExecStartPost", MAINPID="1")
    waits = float(command[command.index("--wait") + 1])

    assert unit.seconds("TimeoutStopSec") == float(environment["SHUTDOWN_GRACE_PERIOD"]) / 1000
    assert environment["SHUTDOWN_GRACE_PERIOD"] == manifests()["SHUTDOWN_GRACE_PERIOD"]
    if name == ANY_PORT:
        delay = manifests()["SHUTDOWN_READINESS_DELAY"]
        assert environment["SHUTDOWN_READINESS_DELAY"] == delay
    assert waits < (unit.seconds("TimeoutStartSec") or 0)


def test_the_proxy_has_the_variables_of_its_configuration() -> None:
    """The drop-in sets those that deploy/haproxy.cfg reads."""
    drop_in = (UNITS / "haproxy.service.d/viralfx.conf").read_text(encoding="utf-8")
    configuration = (ROOT / "deploy/haproxy.cfg").read_text(encoding="utf-8")

    given = set(re.findall(r"\b([A-Z][A-Z_]+)=", drop_in))
    assert given == set(re.findall(r"\$\{([A-Z_]+)-", configuration))
