"""The container engine of this machine, driven by its command line."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tests.servers.ports import free_port
from tests.servers.supply import UnavailableError
from tests.servers.waiting import wait_until
from tests.system.service import Reply, request

ROOT = Path(__file__).parents[2]
BASE_IMAGE = os.environ.get("VIRALFX_TEST_BASE_IMAGE", "python:3.13-slim")
ON_BASE = f"--build-arg=BASE_IMAGE={BASE_IMAGE}"

CONSTRAINED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")
"""The options that the image supports: no write access, no capabilities."""
IN_MEMORY = ("--env=ALLOW_MEMORY_ADAPTERS=true", "--env=API_TOKEN=planted-Qw7rT2zXk9Lm4vNc")
"""The settings that production requires if there is neither Postgres nor Redis."""
PORT = 3000


class EngineError(Exception):
    """A command of the engine failed; holds its output."""


def docker(*arguments: str | Path, seconds: float = 60, **environment: str) -> str:
    """Run ``docker`` and return what it prints. Raises :class:`EngineError`."""
    ran = attempt(*arguments, seconds=seconds, **environment)
    if ran.returncode != 0:
        output = f"docker {' '.join(map(str, arguments))}\n{ran.stdout}{ran.stderr}"
        raise EngineError(output.strip())
    return ran.stdout.strip()


def attempt(
    *arguments: str | Path, seconds: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``docker`` and return the result."""
    program = shutil.which("docker")
    if program is None:
        raise UnavailableError("no container engine: there is no docker on PATH")
    return subprocess.run(
        [program, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@cache
def require(*images: str) -> None:
    """Require an engine that answers and has these images.

    Raises ``UnavailableError`` with the missing part.
    """
    try:
        docker("version", "--format", "{{.Server.Version}}", seconds=10)
        docker("buildx", "version", seconds=10)
        docker("compose", "version", seconds=10)
    except (EngineError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"no container engine that builds: {_last_line(error)}") from None
    for image in images:
        try:
            if attempt("image", "inspect", image).returncode != 0:
                docker("pull", "--quiet", image, seconds=120)
        except (EngineError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(
                f"the image {image} cannot be had: {_last_line(error)}"
            ) from None


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1]


def inspected(name: str) -> dict[str, Any]:
    """Return the details of an image or a container."""
    found: list[dict[str, Any]] = json.loads(docker("inspect", name))
    return found[0]


class Container:
    """A container of the image, queried from outside."""

    def __init__(self, name: str, port: int) -> None:
        """``port`` is where the engine publishes port 3000."""
        self.name, self.port = name, port

    def get(self, path: str, **more: Any) -> Reply:
        """Send a request to the API."""
        return request(self.port, path, **more)

    def answers(self, path: str) -> Reply | None:
        """Send a request to the API; return None without a response."""
        try:
            return self.get(path)
        except OSError:
            return None

    def state(self) -> dict[str, Any]:
        """Return the engine's ``State``: Status, ExitCode, OOMKilled, Health."""
        found: dict[str, Any] = inspected(self.name)["State"]
        return found

    def python(self, code: str) -> str:
        """Run Python inside, as another process."""
        return docker("exec", self.name, "python", "-c", code)

    def log(self) -> str:
        """Return its whole log."""
        ran = attempt("logs", self.name)
        return ran.stdout + ran.stderr

    def logged(self, message: str) -> list[dict[str, Any]]:
        """Return its JSON lines with a message."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == message]

    def wait(self, poll: Callable[[], Any], what: str, *, seconds: float = 30) -> Any:
        """Poll until the result is true, and return it."""
        return wait_until(poll, seconds=seconds, what=lambda: f"{what}\n{self.log()}")

    def wait_healthy(self) -> "Container":
        """Return once its HEALTHCHECK passed."""
        self.wait(lambda: self.state()["Health"]["Status"] == "healthy", "healthy")
        return self

    def wait_ended(self, *, seconds: float = 30) -> dict[str, Any]:
        """Return its state once it ended by itself."""
        self.wait(lambda: self.state()["Status"] == "exited", "the end", seconds=seconds)
        return self.state()


@contextmanager
def container(image: str, *command: str, options: Sequence[str] = ()) -> Iterator[Container]:
    """Run the image with these constraints; remove the container afterwards."""
    port = free_port()
    publish = f"--publish=127.0.0.1:{port}:{PORT}"
    name = docker("run", "--detach", publish, *CONSTRAINED, *options, image, *command)
    try:
        yield Container(name, port)
    finally:
        docker("rm", "--force", "--volumes", name)
