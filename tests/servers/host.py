"""Where a server runs, and what can be done to it there."""

from abc import ABC, abstractmethod
from collections.abc import Sequence


class PortTakenError(Exception):
    """Another program listens on the port."""


class Host(ABC):
    """A place for one server. It knows nothing of what that server speaks."""

    address: str
    """Where clients of this machine reach the server."""
    port: int
    """The port at ``address``: the same after each restart."""
    listen: str
    """The address on which the server itself has to listen."""
    folder: str
    """A folder that is the server's own, as the server sees it."""
    terminates_tls = False
    """Clients speak TLS to this place, and the server plain text."""

    @property
    @abstractmethod
    def listen_port(self) -> int:
        """The port on which the server itself has to listen."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> str:
        """Put a file into the folder, readable for the server alone; return its path there."""

    @abstractmethod
    def start(self, arguments: Sequence[str]) -> None:
        """Start the program with these arguments, without waiting for it to answer."""

    @abstractmethod
    def stop(self) -> None:
        """End it in its own orderly and quick way, frozen or not."""

    @abstractmethod
    def kill(self) -> None:
        """End it and all its children at once, frozen or not."""

    @abstractmethod
    def freeze(self) -> None:
        """Let it and all its children compute nothing, with their sockets open."""

    @abstractmethod
    def thaw(self) -> None:
        """Let it go on."""

    @abstractmethod
    def running(self) -> bool:
        """Say whether there is a process, frozen or not."""

    @abstractmethod
    def listens(self) -> bool:
        """Say whether it is this server that listens on the port, and not another program."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Return the ids of its processes, the first one first."""

    @abstractmethod
    def log(self) -> str:
        """Return what the program wrote."""

    @abstractmethod
    def close(self) -> None:
        """End it and leave nothing behind."""

    def check_port(self) -> None:
        """Raise ``PortTakenError`` when that is why the program ended."""
        if not self.running() and "already in use" in self.log():
            raise PortTakenError(self.port)
