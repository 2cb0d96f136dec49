"""A real OpenTelemetry collector, which forwards spans to a recording one."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.servers.ports import free_port
from tests.servers.processes import ProcessHost, reachable
from tests.servers.server import Server
from tests.servers.supply import UnavailableError


class Rotel(Server):
    """Receives spans on its port in one protocol, and sends them by OTLP over HTTP to another."""

    def __init__(self, protocol: str, target: int) -> None:
        """``protocol`` is that of ``OTEL_EXPORTER_OTLP_PROTOCOL``; ``target`` a port."""
        super().__init__(ProcessHost(reachable(program())))
        self._protocol = protocol
        self._target = target
        self._unused = free_port()

    @property
    def url(self) -> str:
        """The endpoint for ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
        return f"http://{self.host}:{self.port}"

    def _prepare(self) -> None:
        """Write nothing: arguments configure it."""

    def _arguments(self) -> Sequence[str]:
        folder = Path(self._host.folder)
        ports = {"grpc": self._unused, "http": self._unused}
        ports["grpc" if self._protocol == "grpc" else "http"] = self._host.listen_port
        return [
            "start",
            f"--pid-file={folder / 'rotel.pid'}",
            f"--log-file={folder / 'rotel.log'}",
            *(f"--otlp-{kind}-endpoint=127.0.0.1:{port}" for kind, port in ports.items()),
            "--exporter=otlp",
            "--otlp-exporter-protocol=http",
            f"--otlp-exporter-endpoint=http://127.0.0.1:{self._target}",
            "--traces-batch-timeout=50ms",
        ]

    def _responds(self) -> bool:
        with closing(socket.socket()) as client:
            return client.connect_ex((self.host, self.port)) == 0


def program() -> Path:
    """Return the agent. Raises ``UnavailableError`` where the wheel has none for this machine."""
    spec = find_spec("rotel")
    for place in spec.submodule_search_locations or () if spec else ():
        path = Path(place) / "rotel-agent"
        if path.exists():
            return path
    raise UnavailableError("the package rotel is not installed, or not for this machine")


@contextmanager
def rotel(protocol: str, target: int) -> Iterator[Rotel]:
    """Run a collector; the arguments are those of :class:`Rotel`. Raises ``UnavailableError``."""
    with Rotel(protocol, target) as collector:
        yield collector
