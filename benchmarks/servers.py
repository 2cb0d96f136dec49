"""Starts the servers under comparison on a core of their own, and reads what they cost."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil
from tests.servers.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
_CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = _CORES[0], _CORES[-1]
_POLL_SECONDS = 0.001
_OURS = re.compile(
    r"(DB|REDIS|SHUTDOWN|HEALTH|POOL|JOB|READINESS|MANAGEMENT|LOG|ACCESS|LOOP|OTEL)_|QUEUE|PORT$"
)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run this thread, and have its children run, on one core."""
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


def uvicorn(name: str, module: str) -> Program:
    """Run an application under plain uvicorn, on the protocol and loop that we use."""
    options = "--http httptools --loop uvloop --no-access-log --log-level warning"
    where = "--host 127.0.0.1 --port {port}"
    arguments = ("-m", "uvicorn", f"{module}:app", *options.split(), *where.split())
    return Program(name=name, arguments=arguments)


def worker(name: str, **environment: str) -> Program:
    """Run ``viralfx worker``; its port is that of its management."""
    more = {**environment, "MANAGEMENT_PORT": "{port}"}
    return Program(name=name, arguments=("-m", "viralfx", "worker"), environment=more)


def viralfx(name: str, module: str | None = None, **environment: str) -> Program:
    """Run the backend, or an application of somebody else, under ``viralfx serve``."""
    app = () if module is None else ("--app", f"{module}:app")
    arguments = ("-m", "viralfx", "serve", "--host", "127.0.0.1", "--port", "{port}", *app)
    return Program(name=name, arguments=arguments, environment=environment)


BARE_ASGI = uvicorn("bare ASGI", "benchmarks.peers.bare_asgi")
BARE_LITESTAR = uvicorn("bare Litestar", "benchmarks.peers.bare_litestar")
BACKEND = viralfx("viralfx serve")
# As its peers: without a log of requests, whose cost benchmarks/telemetry.py has by itself.
MOUNTED = viralfx("viralfx serve --app", "benchmarks.peers.mounted", ACCESS_LOG="false")


class ServerError(Exception):
    """A server did not do what the measurement needs; the message holds its output."""


class Server:
    """A running program; on leaving the block it is killed if it still runs.

    It has a core of its own unless it is to run ``anywhere``.
    """

    def __init__(self, program: Program, *, anywhere: bool = False) -> None:
        self.program = program
        self.port = free_port()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        kept = {name: value for name, value in os.environ.items() if not _OURS.match(name)}
        environment = {
            name: value.format(port=self.port) for name, value in program.environment.items()
        }
        with nullcontext() if anywhere else on_core(SERVER_CORE):
            self.started_at = time.monotonic()
            self._process = subprocess.Popen(
                [sys.executable, *(a.format(port=self.port) for a in program.arguments)],
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
        """Ask until the answer is 200; return the seconds since the process began."""
        deadline = self.started_at + seconds
        while not _answers_200(self.port, path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{self.program.name}: no 200 from {path}\n{self._said()}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - self.started_at

    def cpu_seconds(self) -> float:
        """Return the processor time used since the process began."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def rss(self) -> int:
        """Return the bytes of its memory that are resident."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def uss(self) -> int:
        """Return the bytes of its memory that no other process shares."""
        return int(psutil.Process(self._process.pid).memory_full_info().uss)

    def terminate(self) -> None:
        """Send SIGTERM and return at once."""
        self._terminated_at = time.monotonic()
        self._process.send_signal(signal.SIGTERM)

    def wait_for_exit(self, *, seconds: float = 20.0) -> tuple[int, float]:
        """Wait for the end; return the exit code and the seconds since :meth:`terminate`.

        To be called before the end may come, or the moment of it is not seen.
        """
        descriptor = os.pidfd_open(self._process.pid)
        try:
            # Popen.wait with a limit polls up to 50 ms late; this wakes up at the moment.
            ended, _, _ = select.select([descriptor], [], [], seconds)
        finally:
            os.close(descriptor)
        if not ended:
            raise ServerError(f"{self.program.name}: still running\n{self._said()}")
        took = time.monotonic() - self._terminated_at
        return self._process.wait(), took

    def _said(self) -> str:
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
