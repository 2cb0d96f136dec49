"""TLS in front of a server that speaks none itself."""
# ruff: noqa: D102 - the class Host documents these methods

from collections.abc import Sequence

from tests.servers.certificates import Certificates
from tests.servers.fault_proxy import PASS, REFUSE, FaultProxy
from tests.servers.host import Host


class TlsTerminator(Host):
    """The place of a plain server, with a proxy in front that speaks TLS to its clients.

    The proxy refuses connections while the server is down.
    """

    terminates_tls = True

    def __init__(self, behind: Host, certificates: Certificates) -> None:
        self.address = FaultProxy.host
        self.listen = behind.listen
        self.folder = behind.folder
        self._behind = behind
        self._proxy = FaultProxy(behind.port, tls=certificates.server_context())

    @property
    def port(self) -> int:
        return self._proxy.port

    @port.setter
    def port(self, port: int) -> None:
        self._behind.port = port

    @property
    def listen_port(self) -> int:
        return self._behind.listen_port

    def write(self, name: str, content: bytes) -> str:
        return self._behind.write(name, content)

    def start(self, arguments: Sequence[str]) -> None:
        self._behind.start(arguments)
        self._proxy.upstream = self._behind.address, self._behind.port
        self._proxy.mode = PASS

    def stop(self) -> None:
        self._behind.stop()
        self._proxy.mode = REFUSE

    def kill(self) -> None:
        self._behind.kill()
        self._proxy.mode = REFUSE

    def freeze(self) -> None:
        self._behind.freeze()

    def thaw(self) -> None:
        self._behind.thaw()

    def running(self) -> bool:
        return self._behind.running()

    def listens(self) -> bool:
        return self._behind.listens()

    def pids(self) -> list[int]:
        return self._behind.pids()

    def log(self) -> str:
        return self._behind.log()

    def close(self) -> None:
        self._behind.close()
        self._proxy.close()
