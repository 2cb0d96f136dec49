"""Servers as containers of an engine."""
# ruff: noqa: D102 - the class Host documents these methods

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from docker.errors import APIError  # type: ignore[import-untyped]  # it has no types
from docker.models.containers import Container  # type: ignore[import-untyped]  # it has no types
from testcontainers.core.container import DockerContainer
from tests.servers.host import Host, PortTakenError
from tests.servers.ports import free_port
from tests.servers.supply import Image, UnavailableError
from tests.servers.waiting import wait_until

LOCAL = "127.0.0.1"
TAKEN = ("already allocated", "already in use")


class ContainerHost(Host):
    """One server as a container, published on a port that stays the same."""

    listen = "0.0.0.0"  # noqa: S104 - the container's own addresses
    folder = "/srv/viralfx"

    def __init__(
        self,
        image: Image,
        *,
        program: str,
        user: str,
        inside: int,
        environment: Mapping[str, str] | None = None,
        anchor: DockerContainer | None = None,
    ) -> None:
        """Prepare a container of ``program``, which listens on the port ``inside``.

        The entry point of the image lets it run as ``user``. With an ``anchor`` it shares the
        network of that container, which has to publish the port.
        """
        self.address = LOCAL
        self.port = inside if anchor else free_port()
        self._image, self._program, self._user, self._inside = image, program, user, inside
        self._environment, self._anchor = dict(environment or {}), anchor
        self._files: dict[str, bytes] = {}
        self._made: DockerContainer | None = None

    @property
    def listen_port(self) -> int:
        return self._inside

    def write(self, name: str, content: bytes) -> str:
        path = f"{self.folder}/{name}"
        self._files[path] = content
        if self._made is not None:
            self._made.copy_into_container(content, path, 0o600)
        return path

    def start(self, arguments: Sequence[str]) -> None:
        if self._made is not None:
            self._container.start()
            return
        # The files come as root's; the entry point itself gives up being root.
        prepare = f'chown -R {self._user} {self.folder} && exec docker-entrypoint.sh "$@"'
        made = DockerContainer(self._image.name, env=self._environment)
        made.with_command(["sh", "-c", prepare, "sh", self._program, *arguments])
        for path, content in self._files.items():
            made.with_copy_into_container(content, path, 0o600)
        if self._anchor is not None:
            made.with_kwargs(network_mode=f"container:{self._anchor.get_container_id()}")
        else:
            publish(made, self._inside, self.port)
        begin(made)
        self._made = made
        self.address = address_of(made)

    def stop(self) -> None:
        if self.running():
            self.thaw()
            self._container.stop(timeout=10)
        self._wait_closed()

    def kill(self) -> None:
        if self.running():
            self._container.kill()
            self._container.wait(timeout=10)
        self._wait_closed()

    def freeze(self) -> None:
        self._container.pause()

    def thaw(self) -> None:
        if self._status() == "paused":
            self._container.unpause()

    def running(self) -> bool:
        return self._status() in {"running", "paused"}

    def listens(self) -> bool:
        return True  # the engine gives a port to one container only

    def pids(self) -> list[int]:
        if not self.running():
            return []
        table = self._container.top()
        column = table["Titles"].index("PID")
        return [int(row[column]) for row in table["Processes"]]

    def log(self) -> str:
        if self._made is None:
            return ""
        return bytes(self._container.logs()).decode(errors="replace")

    def close(self) -> None:
        if self._made is not None:
            self._made.stop()
            self._made = None

    @property
    def _container(self) -> Container:
        assert self._made is not None, "it was never started"
        return self._made.get_wrapped_container()

    def _status(self) -> str:
        if self._made is None:
            return "created"
        self._container.reload()
        return str(self._container.status)

    def _wait_closed(self) -> None:
        # The port forwarder ends a little after the container.
        if self._anchor is None:
            wait_until(lambda: not _listens(self.address, self.port), what="the port is closed")


def publish(container: DockerContainer, inside: int, port: int) -> None:
    """Forward a port of the engine's machine, from that machine alone where it is this one."""
    if address_of(container) == LOCAL:
        # The engine takes an address too, which the type does not know.
        container.ports[str(inside)] = (LOCAL, port)  # type: ignore[assignment]
    else:
        container.with_bind_ports(inside, port)


def address_of(container: DockerContainer) -> str:
    """Return where this machine reaches what the engine publishes."""
    address = container.get_docker_client().host()
    return LOCAL if address == "localhost" else address


def begin(container: DockerContainer) -> None:
    """Start a container; remove it if the start fails."""
    # A kept connection to the engine would count as a leak of the program under test.
    container.get_docker_client().client.api.headers["Connection"] = "close"
    try:
        container.start()
    except APIError as error:
        with suppress(APIError):
            container.stop()
        if any(reason in str(error) for reason in TAKEN):
            raise PortTakenError(str(error)) from error
        raise


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def neighbours(image: Image, *, program: str, user: str, count: int) -> Iterator[list[Host]]:
    """Prepare containers that reach each other under the addresses which this machine uses.

    They share the network of one more container, which publishes the port of each under the
    same number. Raises ``UnavailableError`` where that cannot be.
    """
    for _ in range(5):
        anchor = DockerContainer(image.name).with_command(["sleep", "infinity"])
        if address_of(anchor) != LOCAL:
            raise UnavailableError("the engine is on another machine, where 127.0.0.1 leads to it")
        ports = [free_port() for _ in range(count)]
        for port in ports:
            publish(anchor, port, port)
        with suppress(PortTakenError):
            begin(anchor)
            break
    else:
        raise PortTakenError("lost each race for ports")
    try:
        yield [
            ContainerHost(image, program=program, user=user, inside=port, anchor=anchor)
            for port in ports
        ]
    finally:
        anchor.stop()
