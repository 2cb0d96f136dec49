"""Two backends behind a real proxy, replaced one by one under load: no request fails."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Self

import pytest
from tests import forked
from tests.servers.fixtures import or_skip
from tests.servers.haproxy import Proxy, haproxy
from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.load import Answer, Load, TooSlowError
from tests.system.service import ROOT, Service, running

APP = ("--app", "tests.system.backend_app:app")
RATES = {"/query": 150.0, "POST /retried": 40.0, "/slow-query/0.5": 10.0}
"""Requests a second: short ones, writes, and some that are under way whenever a backend stops."""
ROUNDS = 3
OK = HTTPStatus.OK


def manifests() -> dict[str, str]:
    """Return the shutdown's variables as the manifests set them."""
    text = (ROOT / "deploy/kustomize/base/settings.env").read_text(encoding="utf-8")
    lines = (line.split("=", 1) for line in text.splitlines() if line.startswith("SHUTDOWN_"))
    return dict(lines)


class Fleet:
    """Backends at two ports, each of which can be replaced by a new process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.ports = {"a": free_port(), "b": free_port()}
        self._environment = environment
        self._running: dict[str, tuple[Service, ExitStack]] = {}

    def start(self, name: str) -> Service:
        """Start one, and return once it is ready."""
        stack, port = ExitStack(), self.ports[name]
        variables = {**self._environment, "PORT": str(port)}
        service = stack.enter_context(running(*APP, environment=variables))
        service.port = port
        self._running[name] = (service, stack)
        return service.wait_ready()

    def stop(self, name: str) -> tuple[int, float]:
        """Ask one to end as an orchestrator does; return its exit code and the seconds it took."""
        service, stack = self._running.pop(name)
        with stack:
            began = time.monotonic()
            service.signal(signal.SIGTERM)
            return service.exit_code(seconds=75), time.monotonic() - began

    def __enter__(self) -> Self:
        for name in self.ports:
            self.start(name)
        return self

    def __exit__(self, *_: object) -> None:
        for _service, stack in self._running.values():
            stack.close()


@contextmanager
def proxied(database: Database, folder: Path, **more: str) -> Iterator[tuple[Fleet, Proxy]]:
    """Run two backends on a database, behind a proxy that believes in both."""
    environment = {"DATABASE_URL": database.url, "POOL_PROFILE": "medium", **manifests(), **more}
    assert forked.viralfx("migrate", environ=environment).returncode == 0
    database.execute("CREATE TABLE written (id bigserial PRIMARY KEY)")
    with Fleet(environment) as fleet, or_skip(), haproxy(free_port(), fleet.ports, folder) as proxy:
        wait_until(proxy.statistics.exists, what="the proxy runs")
        wait_until(lambda: proxy.is_up("a") and proxy.is_up("b"), what="both are believed in")
        yield fleet, proxy


def counted(told: dict[str, str]) -> tuple[int, int, int]:
    """Return how many requests were sent again, sent elsewhere, and answered wrongly."""
    return int(told["wretr"]), int(told["wredis"]), int(told["eresp"])


def replace(fleet: Fleet, proxy: Proxy, name: str, load: Load) -> str:
    """Replace one backend, and wait until it has its share; return what was seen."""
    sent = len(load.answers)
    code, seconds = fleet.stop(name)
    fleet.start(name)
    wait_until(lambda: proxy.is_up(name), what=f"the proxy believes in {name} again")
    had = int(proxy.of(name)["stot"])
    wait_until(lambda: int(proxy.of(name)["stot"]) > had + 100, what=f"{name} has its share")
    assert code == 0
    # The delay was needed by nobody for all of it, and nothing was left to wait for after it.
    assert 5.0 <= seconds < 20.0
    return f"{name} replaced: exit 0 after {seconds:.1f} s, {len(load.answers) - sent} answers"


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_no_request_fails_while_both_backends_are_replaced(
    database: Database, tmp_path: Path
) -> None:
    """Three times in a row at 200 requests a second, with the times of the manifests."""
    with proxied(database, tmp_path) as (fleet, proxy):
        began = time.monotonic()
        with Load(proxy.port, RATES) as load:
            wait_until(lambda: len(load.answers) > 200, what="load")
            for number in range(ROUNDS):
                for name in fleet.ports:
                    print(f"round {number + 1}: {replace(fleet, proxy, name, load)}")  # noqa: T201
            seconds = time.monotonic() - began
        told = {name: proxy.of(name) for name in ("a", "b", "BACKEND")}

    failed: list[Answer] = [answer for answer in load.answers if answer.status != OK]
    statuses = Counter(answer.status for answer in load.answers)
    print(f"{len(load.answers)} requests in {seconds:.1f} s: {dict(statuses)}")  # noqa: T201
    assert failed == []
    if len(load.answers) < 0.9 * seconds * sum(RATES.values()):
        raise TooSlowError(f"{len(load.answers)} requests in {seconds:.1f} s are too few")
    # Nothing was hidden by the proxy: each request was sent once, and to one that took it.
    assert {counted(one) for one in told.values()} == {(0, 0, 0)}
    assert all(int(one["chkdown"]) >= ROUNDS for name, one in told.items() if name != "BACKEND")


@pytest.mark.alone
def test_without_the_delay_the_proxy_meets_closed_doors(database: Database, tmp_path: Path) -> None:
    """It is the readiness delay that the test above shows: one stop without it is noticed."""
    with (
        proxied(database, tmp_path, SHUTDOWN_READINESS_DELAY="0") as (fleet, proxy),
        Load(proxy.port, RATES) as load,
    ):
        wait_until(lambda: len(load.answers) > 200, what="load")
        fleet.stop("a")
        wait_until(lambda: not proxy.is_up("a"), what="the proxy has seen it")
        again, elsewhere, wrong = counted(proxy.of("a"))

    assert again + elsewhere + wrong > 0
