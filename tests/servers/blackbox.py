"""A real blackbox_exporter, configured by the file that is shipped."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
from tests.servers.processes import ProcessHost, reachable
from tests.servers.server import Server
from tests.servers.supply import UnavailableError

CONFIGURATION = Path(__file__).parents[2] / "deploy/observability/blackbox.yml"
_PACKAGE = "prometheus-blackbox-exporter"


class BlackboxExporter(Server):
    """Asks addresses on request. Raises ``UnavailableError`` where there is none."""

    def __init__(self) -> None:
        super().__init__(ProcessHost(reachable(program())))

    def probe(self, module: str, target: str) -> Mapping[str, float]:
        """Ask an address as a module says; return the metrics without labels."""
        response = httpx.get(
            f"http://{self.host}:{self.port}/probe",
            params={"module": module, "target": target},
            timeout=20,
        )
        found = re.findall(r"(?m)^(\w+) (\S+)$", response.raise_for_status().text)
        return {name: float(value) for name, value in found}

    def _prepare(self) -> None:
        self._host.write("blackbox.yml", CONFIGURATION.read_bytes())

    def _arguments(self) -> Sequence[str]:
        return [
            f"--config.file={Path(self._host.folder) / 'blackbox.yml'}",
            f"--web.listen-address={self._host.listen}:{self._host.listen_port}",
        ]

    def _responds(self) -> bool:
        try:
            return httpx.get(f"http://{self.host}:{self.port}/-/healthy", timeout=5).is_success
        except httpx.TransportError:
            return False


def program() -> Path:
    """Return the exporter. Raises ``UnavailableError`` where there is none on this machine."""
    for name in (_PACKAGE, "blackbox_exporter"):
        if found := shutil.which(name):
            return Path(found)
    raise UnavailableError(f"{_PACKAGE} is not on PATH; Debian's package of that name has it")
