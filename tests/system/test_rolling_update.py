"""Two backends behind a real proxy, replaced one by one under load: no request fails."""

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Protocol, Self

import pytest
from tests import forked
from tests.servers.envoy import envoy
from tests.servers.fixtures import or_skip
from tests.servers.haproxy import haproxy
from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.soak import SOAK, Record, cycles, spread
from tests.system.load import Load, Response
from tests.system.service import ROOT, Service, running

APP = ("--app", "tests.system.backend_app:app")


def rates(pace: float) -> dict[str, float]:
    """Return requests a second: short ones, writes, and slow ones, in flight at each stop."""
    return {"/query": 25.0 * pace, "POST /retried": 10.0 * pace, "/slow-query/0.5": 5.0 * pace}


RATES = rates(5.0 if SOAK else 0.5)
ROUNDS = cycles(3)
REQUESTS = 10_000 if SOAK else 1000
"""The least number of requests of a rehearsal, for which one round lasts long enough."""
REHEARSED = rates(5.0 if SOAK else 2.0)
TRAFFIC = 40 if SOAK else 20
"""Requests before the first stop."""
DRAIN_SECONDS = 30.0
"""The default of SHUTDOWN_DRAIN_TIMEOUT."""
OK = HTTPStatus.OK


class Proxy(Protocol):
    """A proxy in front of the backends ``a`` and ``b``."""

    @property
    def port(self) -> int:
        """Where it listens."""

    def is_up(self, server: str) -> bool:
        """Return whether it sends requests to a backend."""

    def sent(self, server: str) -> int:
        """Return the number of requests that it has sent to a backend."""

    def hidden(self) -> int:
        """Return the number of requests that it repeated, or that a backend did not answer."""


class Starter(Protocol):
    """Runs a proxy on a port, in front of backends, with a folder for its files."""

    def __call__(
        self, port: int, servers: dict[str, int], folder: Path, /
    ) -> AbstractContextManager[Proxy]:
        """Run it. Raises ``UnavailableError`` where there is none on this machine."""


PROXIES: dict[str, Starter] = {"haproxy": haproxy, "envoy": envoy}


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
        """Start a backend and return once it is ready."""
        stack, port = ExitStack(), self.ports[name]
        variables = {**self._environment, "PORT": str(port)}
        service = stack.enter_context(running(*APP, environment=variables))
        service.port = port
        self._running[name] = (service, stack)
        return service.wait_ready()

    def stop(self, name: str) -> tuple[int, float]:
        """Send SIGTERM to a backend; return its exit code and the seconds until it ended."""
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
def proxied(
    start: Starter, database: Database, folder: Path, **more: str
) -> Iterator[tuple[Fleet, Proxy]]:
    """Run two backends on a database, behind a proxy that considers both healthy."""
    environment = {"DATABASE_URL": database.url, "POOL_PROFILE": "medium", **manifests(), **more}
    assert forked.viralfx("migrate", environ=environment).returncode == 0
    database.execute("CREATE TABLE written (id bigserial PRIMARY KEY)")
    with Fleet(environment) as fleet, or_skip(), start(free_port(), fleet.ports, folder) as proxy:
        wait_until(lambda: proxy.is_up("a") and proxy.is_up("b"), what="both are healthy")
        yield fleet, proxy


def replace(fleet: Fleet, proxy: Proxy, name: str, load: Load) -> float:
    """Replace one backend, wait until it gets its share, and return the seconds of its stop."""
    sent = len(load.responses)
    code, seconds = fleet.stop(name)
    assert not proxy.is_up(name)
    fleet.start(name)
    wait_until(lambda: proxy.is_up(name), what=f"the proxy considers {name} healthy again")
    had = proxy.sent(name)
    wait_until(lambda: proxy.sent(name) > had + 20, what=f"{name} has its share")
    assert code == 0
    # Not before the delay; a request that remained after it would take the budget of the drain.
    assert 5.0 <= seconds < 5.0 + DRAIN_SECONDS
    print(f"{name} replaced after {seconds:.1f} s, {len(load.responses) - sent} answers")  # noqa: T201
    return seconds


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PROXIES if SOAK else ["haproxy"])
def test_no_request_fails_while_both_backends_are_replaced(
    database: Database, tmp_path: Path, name: str, record_property: Record
) -> None:
    """With the times of the manifests; in a soak run three times, with more requests and Envoy."""
    with proxied(PROXIES[name], database, tmp_path) as (fleet, proxy):
        with Load(proxy.port, REHEARSED) as load:
            wait_until(lambda: len(load.responses) > TRAFFIC, what="load")
            stops = [replace(fleet, proxy, each, load) for _round in ROUNDS for each in fleet.ports]
            wait_until(lambda: len(load.responses) >= REQUESTS, seconds=120, what="all requests")
        hidden = proxy.hidden()

    failed: list[Response] = [response for response in load.responses if response.status != OK]
    record_property(f"{name}: requests", len(load.responses))
    record_property(f"{name}: requests that failed", len(failed))
    record_property(f"{name}: requests that the proxy repeated, or that had no answer", hidden)
    record_property(f"{name}: seconds of a stop", spread(stops))
    assert failed == []
    # The proxy hid no failure: it sent each request once, to a backend that accepted it.
    assert hidden == 0


@pytest.mark.parametrize("start", PROXIES.values(), ids=PROXIES)
def test_without_the_delay_requests_are_refused(
    database: Database, tmp_path: Path, start: Starter
) -> None:
    """Counter-test: a stop without the readiness delay causes connection errors."""
    with (
        proxied(start, database, tmp_path, SHUTDOWN_READINESS_DELAY="0") as (fleet, proxy),
        Load(proxy.port, RATES) as load,
    ):
        wait_until(lambda: len(load.responses) > TRAFFIC, what="load")
        fleet.stop("a")
        wait_until(proxy.hidden, what="a refused request")


def test_envoy_checks_too_seldom_before_its_first_request(
    database: Database, tmp_path: Path
) -> None:
    """Counter-test: with the default of ``no_traffic_interval`` the first stop comes too early.

    The delay is longer than the two seconds that deploy/envoy.yaml promises.
    """

    def start(port: int, servers: dict[str, int], folder: Path, /) -> AbstractContextManager[Proxy]:
        return envoy(port, servers, folder, without=["no_traffic_interval"])

    with (
        proxied(start, database, tmp_path, SHUTDOWN_READINESS_DELAY="2500") as (fleet, proxy),
        Load(proxy.port, RATES) as load,
    ):
        wait_until(lambda: len(load.responses) > TRAFFIC, what="load")
        fleet.stop("a")
        wait_until(proxy.hidden, what="a refused request")
