"""Starts the compared servers on a core of their own, and reads their processor time and memory."""

import atexit
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil
from tests.servers.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
_CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = _CORES[0], _CORES[-1]
_POLL_SECONDS = 0.001
_OWN_VARIABLE = re.compile(
    r"(DB|REDIS|SHUTDOWN|HEALTH|POOL|JOB|READINESS|MANAGEMENT|LOG|ACCESS|LOOP|OTEL)_"
    r"|HTTP_(MAX|HEAD|KEEP|BODY)_|QUEUE|PORT$"
)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Pin this thread and its children to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A server program; ``{port}`` in arguments and environment stands for its port."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    executable: str = sys.executable


def uvicorn(name: str, module: str, **environment: str) -> Program:
    """Run an application under plain uvicorn, with the protocol and loop that we use."""
    options = "--http httptools --loop uvloop --no-access-log --log-level warning"
    where = "--host 127.0.0.1 --port {port}"
    arguments = ("-m", "uvicorn", f"{module}:app", *options.split(), *where.split())
    return Program(name=name, arguments=arguments, environment=environment)


def worker(name: str, **environment: str) -> Program:
    """Run ``viralfx worker``; its port is the management port."""
    more = {**environment, "MANAGEMENT_PORT": "{port}"}
    return Program(name=name, arguments=("-m", "viralfx", "worker"), environment=more)


def viralfx(name: str, module: str | None = None, **environment: str) -> Program:
    """Run the backend, or another application, under ``viralfx serve``."""
    app = () if module is None else ("--app", f"{module}:app")
    arguments = ("-m", "viralfx", "serve", "--host", "127.0.0.1", "--port", "{port}", *app)
    return Program(name=name, arguments=arguments, environment=environment)


@cache
def net_http() -> Program | None:
    """Build Go's net/http with a probe's response; None without a Go compiler."""
    go = shutil.which("go")
    if go is None:
        return None
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = ROOT / "benchmarks/peers/nethttp/main.go"
    environment = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    subprocess.run([go, "build", "-o", folder / "nethttp", source], check=True, env=environment)
    return Program(
        name="Go net/http",
        arguments=("{port}",),
        environment={"GOMAXPROCS": "1"},
        executable=str(folder / "nethttp"),
    )


BARE_ASGI = uvicorn("bare ASGI", "benchmarks.peers.bare_asgi")
BARE_LITESTAR = uvicorn("bare Litestar", "benchmarks.peers.bare_litestar")
# With details open to all, as on the management port of production: the server answers them itself.
BACKEND = viralfx("viralfx serve", HEALTH_DETAILS="always")
# Without an access log, like its peers; benchmarks/telemetry.py measures that log.
MOUNTED = viralfx("viralfx serve --app", "benchmarks.peers.mounted", ACCESS_LOG="false")


class ServerError(Exception):
    """A server did not meet the needs of the measurement; the message holds its output."""


class Server:
    """A running program; it is killed at the end of the block if it still runs.

    It has a core of its own unless ``anywhere`` is set. A shell runs ``before`` in the process that
    becomes the program, for example to set a resource limit.
    """

    def __init__(self, program: Program, *, anywhere: bool = False, before: str = "") -> None:
        self.program = program
        self.port = free_port()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        kept = {name: value for name, value in os.environ.items() if not _OWN_VARIABLE.match(name)}
        # Each start would compile all modules, which an installation has done.
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        environment = {
            name: value.format(port=self.port) for name, value in program.environment.items()
        }
        with nullcontext() if anywhere else on_core(SERVER_CORE):
            self.started_at = time.monotonic()
            self._process = subprocess.Popen(
                [
                    *(["sh", "-c", f'{before}; exec "$@"', "sh"] if before else []),
                    program.executable,
                    *(a.format(port=self.port) for a in program.arguments),
                ],
                cwd=ROOT,
                env={**kept, **environment},
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()

    def wait_for_200(self, path: str, *, seconds: float = 20.0) -> float:
        """Request until the status is 200; return the seconds since the process began."""
        deadline = self.started_at + seconds
        while not _answers_200(self.port, path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{self.program.name}: no 200 from {path}\n{self.output()}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - self.started_at

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Return the processor time used since the process began."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def rss(self) -> int:
        """Return its resident memory in bytes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def uss(self) -> int:
        """Return its unique memory in bytes."""
        return int(psutil.Process(self._process.pid).memory_full_info().uss)

    def terminate(self) -> None:
        """Send SIGTERM and return at once."""
        self._terminated_at = time.monotonic()
        self._process.send_signal(signal.SIGTERM)

    def wait_for_exit(self, *, seconds: float = 20.0) -> tuple[int, float]:
        """Wait for the end; return the exit code and the seconds since :meth:`terminate`.

        Call it before the process can end, or the time is wrong.
        """
        descriptor = os.pidfd_open(self._process.pid)
        try:
            # Popen.wait with a timeout polls up to 50 ms late; this wakes up immediately.
            exits = select.poll()  # select() takes no descriptor above 1023
            exits.register(descriptor, select.POLLIN)
            ended = exits.poll(seconds * 1000)
        finally:
            os.close(descriptor)
        if not ended:
            raise ServerError(f"{self.program.name}: still running\n{self.output()}")
        took = time.monotonic() - self._terminated_at
        return self._process.wait(), took

    def output(self) -> str:
        """Return its output so far."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")


def _answers_200(port: int, path: str) -> bool:
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request)
            return connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False
