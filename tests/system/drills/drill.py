"""One drill: a procedure of the runbook, carried out on a real fault."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import pytest
from tests.servers.supply import UnavailableError
from tests.servers.waiting import wait_until
from tests.system.drills.alerts import firing
from tests.system.drills.cluster import Cluster
from tests.system.drills.procedures import Console, procedure
from tests.system.service import request

QUICK = {
    "HEALTH_CHECK_INTERVAL": "500",
    "HEALTH_CHECK_TIMEOUT": "1000",
    "DB_HEALTH_CHECK_INTERVAL": "500",
}
"""Short check intervals, which keep a drill short."""


class Drill:
    """Carries out the parts of a procedure, and checks the alerts at the end."""

    def __init__(
        self, heading: str, cluster: Cluster, *, scraped: str = "INSTANCE", **environment: str
    ) -> None:
        """Start with the ``scraped`` variable, INSTANCE or WORKER, and the other variables."""
        self.procedure = procedure(heading)
        self._scraped = scraped
        known = {"INSTANCE": cluster.instance, "PGCONNECT_TIMEOUT": "2", **environment}
        self.console = Console(cluster.folder, known)
        self._before = self._quiet()
        self._during = ""

    def show_symptom(self, instead: Mapping[str, str] | None = None) -> None:
        """Check the symptom of the runbook, with the words of ``instead`` replaced."""
        self.console.follow(
            [step.with_words(instead or {}) for step in self.procedure.steps("Symptom")]
        )
        self._during = self._scrape()

    def diagnose(self) -> None:
        """Check that each command of the diagnosis prints its output."""
        self.console.follow(self.procedure.steps("Diagnosis"))

    def remedy(self) -> None:
        """Carry out the remedy."""
        self.console.follow(self.procedure.steps("Remedy"))

    def end(self) -> None:
        """Check the end of the fault, and that the named alerts fired."""
        self.console.follow(self.procedure.steps("Over"))
        try:
            during = firing(self._before, self._during)
        except UnavailableError as reason:
            pytest.skip(f"all was shown except the alerts: {reason}")
        assert self.procedure.alerts() <= during, during
        self._quiet()

    def _quiet(self) -> str:
        """Wait for a scrape for which no alert fires, and return it."""
        fires: set[str] = set()

        def quiet() -> str:
            nonlocal fires
            scrape = self._scrape()
            with suppress(UnavailableError):  # without promtool, any scrape will do
                fires = firing(scrape, scrape)
            return "" if fires else scrape

        try:
            return wait_until(quiet)
        except AssertionError:
            raise AssertionError(f"fires, though nothing is wrong: {fires}") from None

    def _scrape(self) -> str:
        return self.console.type(f"curl -sm 5 ${self._scraped}/metrics")


@contextmanager
def clients(instance: str, path: str, count: int, *, timeout: float = 20.0) -> Iterator[None]:
    """Run ``count`` clients that request a path repeatedly."""
    port, stopped = int(instance.rpartition(":")[2]), threading.Event()

    def ask() -> None:
        while not stopped.wait(0.01):
            try:
                request(port, path, timeout=timeout)
            except OSError:
                continue

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join(timeout + 1)
