"""A real Alertmanager, configured by the file that is shipped."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.servers.processes import ProcessHost, reachable
from tests.servers.server import Server
from tests.servers.supply import UnavailableError

CONFIGURATION = Path(__file__).parents[2] / "deploy/observability/alertmanager.yml"
_PACKAGE = "prometheus-alertmanager"


class Alertmanager(Server):
    """Sends messages to receivers by their names. Raises ``UnavailableError`` without a program.

    The waits of the shipped file become one second, and the addresses of receivers those of
    the test.
    """

    def __init__(self, receivers: Mapping[str, int]) -> None:
        """``receivers``: the port of each receiver."""
        super().__init__(ProcessHost(reachable(program())))
        self._receivers = receivers

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.port}"

    def send(self, *alerts: Mapping[str, str]) -> None:
        """Send alerts by their labels, as Prometheus does."""
        body = [{"labels": labels, "annotations": {}} for labels in alerts]
        httpx.post(f"{self.url}/api/v2/alerts", json=body, timeout=10).raise_for_status()

    def alerts(self) -> dict[str, dict[str, Any]]:
        """Return the alerts that it has, by the value of ``alertname``."""
        found = httpx.get(f"{self.url}/api/v2/alerts", timeout=10).raise_for_status().json()
        return {alert["labels"]["alertname"]: alert for alert in found}

    def _prepare(self) -> None:
        configuration = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
        for each in configuration["receivers"]:
            address = f"http://127.0.0.1:{self._receivers[each['name']]}/alerts"
            (webhook,) = each["webhook_configs"]
            name = Path(webhook["url_file"]).name
            webhook["url_file"] = self._host.write(name, address.encode())
        for route in (configuration["route"], *configuration["route"]["routes"]):
            route |= {name: "1s" for name in ("group_wait", "group_interval") if name in route}
        self._host.write("alertmanager.yml", json.dumps(configuration).encode())

    def _arguments(self) -> Sequence[str]:
        folder = Path(self._host.folder)
        return [
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'data'}",
            f"--web.listen-address={self._host.listen}:{self._host.listen_port}",
            "--cluster.listen-address=",
        ]

    def _responds(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).is_success
        except httpx.TransportError:
            return False


def program() -> Path:
    """Return Alertmanager. Raises ``UnavailableError`` where there is none on this machine."""
    return _found(_PACKAGE, "alertmanager")


def amtool() -> Path:
    """Return its command line. Raises ``UnavailableError`` where there is none on this machine."""
    return _found("amtool")


def _found(*names: str) -> Path:
    for name in names:
        if found := shutil.which(name):
            return Path(found)
    raise UnavailableError(f"{names[0]} is not on PATH; Debian's package {_PACKAGE} has it")
