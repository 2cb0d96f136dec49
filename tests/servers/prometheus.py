"""A real Prometheus that scrapes what a test names."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from tests.servers.debian import prometheus
from tests.servers.processes import ProcessHost, make_folder, reachable
from tests.servers.server import Server
from tests.servers.supply import UnavailableError

Targets = Mapping[str, Sequence[int]]
"""Ports of this machine, by the name of their job."""


@dataclass(frozen=True)
class Series:
    """One line of a graph."""

    labels: Mapping[str, str]
    values: Sequence[float]


class PrometheusServer(Server):
    """Scrapes every target once in ``seconds``. Raises ``UnavailableError`` where there is none."""

    def __init__(
        self,
        targets: Targets,
        *,
        seconds: int = 1,
        rules: object = None,
        alertmanager: int | None = None,
    ) -> None:
        """``rules``: the content of a rule file; its alerts go to the port ``alertmanager``."""
        super().__init__(ProcessHost(_placed(prometheus())))
        self.seconds = seconds
        self._targets = targets
        self._rules = rules
        self._alertmanager = alertmanager

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.port}"

    def ask(self, path: str, **parameters: str | float) -> Any:
        """Ask its API; return the data of the answer."""
        response = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        assert response.is_success, f"{path} {parameters}: {response.text}"
        return response.json()["data"]

    def range(self, expression: str, *, begin: float, end: float, step: float) -> list[Series]:
        """Evaluate an expression at every ``step`` seconds between two times since 1970."""
        found = self.ask("query_range", query=expression, start=begin, end=end, step=step)
        return [
            Series(series["metric"], [float(value) for _, value in series["values"]])
            for series in found["result"]
        ]

    def retarget(self, targets: Targets) -> None:
        """Scrape these from now on, within some seconds."""
        self._targets = targets
        self._write_targets()

    def _prepare(self) -> None:
        self._write_targets()
        pause = f"{self.seconds}s"
        configuration: dict[str, object] = {
            "global": {"scrape_interval": pause, "evaluation_interval": pause},
            "scrape_configs": [
                {
                    "job_name": job,
                    "file_sd_configs": [{"files": [f"{job}.json"], "refresh_interval": "1s"}],
                }
                for job in self._targets
            ],
        }
        if self._rules is not None:
            configuration["rule_files"] = ["rules.yml"]
            self._host.write("rules.yml", json.dumps(self._rules).encode())
        if self._alertmanager is not None:
            targets = [f"127.0.0.1:{self._alertmanager}"]
            managers = [{"static_configs": [{"targets": targets}]}]
            configuration["alerting"] = {"alertmanagers": managers}
        self._host.write("prometheus.yml", json.dumps(configuration).encode())

    def _write_targets(self) -> None:
        for job, ports in self._targets.items():
            targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
            self._host.write(f"{job}.json", json.dumps(targets).encode())

    def _arguments(self) -> Sequence[str]:
        folder = Path(self._host.folder)
        return [
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._host.listen}:{self._host.listen_port}",
            "--enable-feature=exemplar-storage",
        ]

    def _responds(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).is_success
        except httpx.TransportError:
            return False


@cache
def _placed(program: Path) -> Path:
    """Return a program of one file, or a copy where the servers' user may go."""
    try:
        return reachable(program)
    except UnavailableError:
        folder = make_folder(programs=True)
        folder.chmod(0o711)
        return Path(shutil.copy2(program, folder))
