"""The common parts of Postgres and Redis as servers of tests."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from tests.servers.host import Host, PortTakenError
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until


class Server(ABC):
    """A server that a test can start, stop, kill and freeze.

    The methods block; an asynchronous test calls them through ``asyncio.to_thread``.
    """

    def __init__(self, host: Host, *, may_move: bool = True) -> None:
        """Prepare a server; its host's port is another one when taken, if it ``may_move``."""
        self._host = host
        self._attempts = 5 if may_move else 1

    @property
    def host(self) -> str:
        """The address that clients use."""
        return self._host.address

    @property
    def port(self) -> int:
        """The port that clients use; it stays the same."""
        return self._host.port

    @property
    def pids(self) -> list[int]:
        """The ids of its processes on this machine, the first one first."""
        return self._host.pids()

    def log(self) -> str:
        """Return what the server wrote since it was started."""
        return self._host.log()

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        for attempt in range(self._attempts):
            if attempt:
                self._host.port = free_port()
            self._prepare()
            with suppress(PortTakenError):
                self.start()
                return
        raise PortTakenError(f"port {self._host.port} is taken: {self.log()}")

    def start(self) -> None:
        """Start it on the same port with the data it has; return when it answers."""
        self._host.start(self._arguments())
        self._wait(self._responds)

    def stop(self) -> None:
        """End it in its quick orderly way, even when it is frozen."""
        self._host.stop()

    def kill(self) -> None:
        """End it and its children by SIGKILL; return when they are gone."""
        self._host.kill()

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Suspend it and its children: connections stay open without answers."""
        self._host.freeze()

    def thaw(self) -> None:
        """Resume it after ``freeze``."""
        self._host.thaw()

    def close(self) -> None:
        """End it and remove its data."""
        self._host.close()

    def _wait(self, answers: Callable[[], bool]) -> None:
        def poll() -> bool:
            self._host.check_port()
            assert self._host.running(), f"ended early: {self.log()}"
            return self._host.listens() and answers()

        wait_until(poll, what=lambda: f"server answers; {self.log()}")

    @abstractmethod
    def _prepare(self) -> None:
        """Write what the program needs into its folder, before its first start."""

    @abstractmethod
    def _arguments(self) -> Sequence[str]:
        """Return the arguments of the program."""

    @abstractmethod
    def _responds(self) -> bool:
        """Return whether it serves clients now."""
