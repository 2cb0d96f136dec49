"""A real proxy in front of two backends, configured by the file that is shipped."""

import csv
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers.sockets import socket_folder
from tests.servers.supply import UnavailableError
from tests.servers.waiting import wait_until

CONFIGURATION = Path(__file__).parents[2] / "deploy/haproxy.cfg"


@dataclass(frozen=True)
class Proxy:
    """A running one; ``a`` and ``b`` are its servers."""

    port: int
    statistics: Path

    def of(self, name: str) -> dict[str, str]:
        """Return the statistics of a server, or of a backend by ``BACKEND``."""
        return next(row for row in self._rows() if row["svname"] == name)

    def is_up(self, server: str) -> bool:
        """Return whether it sends requests there."""
        return self.of(server)["status"].startswith("UP")

    def sent(self, server: str) -> int:
        """Return the number of requests that it has sent there."""
        return int(self.of(server)["stot"])

    def hidden(self) -> int:
        """Return the number of requests that it repeated, or that a server did not answer."""
        counts = ("wretr", "wredis", "eresp")
        return sum(int(self.of(name)[count]) for name in ("a", "b", "BACKEND") for count in counts)

    def _rows(self) -> list[dict[str, str]]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.statistics))
            connection.sendall(b"show stat viralfx -1 -1\n")
            said = b"".join(iter(lambda: connection.recv(65536), b""))
        rows = list(csv.DictReader(said.decode().removeprefix("# ").splitlines()))
        return [row for row in rows if row["pxname"] == "viralfx"]


@contextmanager
def haproxy(
    port: int, servers: dict[str, int], folder: Path, configuration: Path = CONFIGURATION
) -> Iterator[Proxy]:
    """Run one on a port, in front of servers ``a`` and ``b`` at ports of this machine.

    It writes into the folder. Raises ``UnavailableError`` where there is none on this machine.
    """
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise UnavailableError("haproxy is not on PATH; Debian's package haproxy has it")
    with socket_folder() as sockets:
        proxy = Proxy(port, sockets / "haproxy.sock")
        environment = {
            "PATH": os.environ["PATH"],
            "PROXY_LISTEN": f"127.0.0.1:{port}",
            "STATS_SOCKET": str(proxy.statistics),
            **{f"BACKEND_{name.upper()}": f"127.0.0.1:{at}" for name, at in servers.items()},
        }
        with (folder / "haproxy.log").open("wb") as log:
            process = subprocess.Popen(
                [program, "-db", "-f", str(configuration)], env=environment, stdout=log, stderr=log
            )
        try:
            wait_until(proxy.statistics.exists, what="the proxy runs")
            yield proxy
        finally:
            process.terminate()
            process.wait(10)
