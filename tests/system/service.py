"""Runs the program as a process and probes it from outside, as a kubelet does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests import forked
from tests.forked import FRESH, ForkedProcess
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until

ROOT = Path(__file__).parents[2]
READY_WITHIN = 60.0
"""Seconds that a start may take on a busy machine."""
_SHOWN = 100
"""Lines of each stream of a process that a failed test shows."""


@dataclass(frozen=True)
class Reply:
    """One HTTP response as received."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Decode the body."""
        return json.loads(self.body)


def request(
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    raw_headers: bytes = b"",
    json_body: object = None,
    timeout: float = 10.0,
) -> Reply:
    """Send a request over a new connection. Raises ``OSError`` if no complete response arrives."""
    sent = {"Host": "test", "User-Agent": "kube-probe/1.34", "Connection": "close"}
    body = b"" if json_body is None else json.dumps(json_body).encode()
    if body:
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{name}: {value}" for name, value in {**sent, **(headers or {})}.items()]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines]).encode() + b"\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(head + raw_headers + b"\r\n" + body)
        received = b""
        # Read up to the announced length: a forked child may keep the connection open.
        while not _whole(received, method) and (chunk := connection.recv(65536)):
            received += chunk
    if b"\r\n\r\n" not in received:
        raise ConnectionResetError("the connection closed without a response")
    head_part, _, response = received.partition(b"\r\n\r\n")
    status_line, *header_lines = head_part.decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in header_lines)
    parsed = {name.lower(): value for name, value in pairs}
    return Reply(int(status_line.split(" ")[1]), parsed, response)


def _whole(received: bytes, method: str) -> bool:
    head, blank, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(blank and length and (method == "HEAD" or len(body) >= int(length[1])))


@dataclass
class Service:
    """A running ``viralfx`` process."""

    process: subprocess.Popen[str] | ForkedProcess
    port: int
    management_port: int | None
    output: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    serves: bool = True
    """Whether it listens on ``port``; a worker has only its management port."""
    readers: Sequence[threading.Thread] = ()
    """The threads that read standard output and error until the process ends."""

    def get(self, path: str, **more: Any) -> Reply:
        """Send a request to the API port."""
        return request(self.port, path, **more)

    def manage(self, path: str, **more: Any) -> Reply:
        """Send a request to the management port."""
        assert self.management_port is not None
        return request(self.management_port, path, **more)

    def status(self, path: str) -> int | None:
        """Return the status of the response, or None without a response."""
        try:
            return (self.get if self.serves else self.manage)(path).status
        except OSError:
            return None

    def wait_ready(self) -> "Service":
        """Return once ``/health/ready`` answers 200."""
        wait_until(
            lambda: self.process.poll() is not None or self.status("/health/ready") == 200,
            seconds=READY_WITHIN,
            what=lambda: f"ready; {self.output} {self.errors}",
        )
        assert self.process.poll() is None, f"ended early: {self.output} {self.errors}"
        return self

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def exit_code(self, *, seconds: float = 20.0) -> int:
        """Wait for the process to end and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.output} {self.errors}") from None

    def logged(self, message: str) -> list[dict[str, Any]]:
        """Return the JSON log lines with a message: all of them if the process has ended.

        A running process writes lines with a delay (ADR-0027), so wait for them.
        """
        if self.process.poll() is not None:
            for reader in self.readers:
                reader.join(5)
        lines = [json.loads(line) for line in list(self.output) if line.startswith("{")]
        return [line for line in lines if line["message"] == message]


@contextmanager
def running(
    *arguments: str,
    management: bool = False,
    environment: Mapping[str, str] | None = None,
    closed_output: bool = False,
    program: str = "serve",
    descriptors: int | None = None,
    cgroup: Path | None = None,
    module: str = "viralfx",
    fresh: bool = FRESH,
) -> Iterator[Service]:
    """Run ``viralfx serve`` with more arguments; kill it if it still runs at the end.

    ``program`` may be ``worker`` instead. ``descriptors`` is its hard limit of open files,
    ``cgroup`` the folder of its control group. ``module`` may be another module that runs the
    command line. ``fresh``: the process imports its modules itself, for tests of that.
    """
    limit = "" if cgroup is None else f"echo $$ > {cgroup}/cgroup.procs; "
    limit += "" if descriptors is None else f"ulimit -n {descriptors}; "
    close = " >&-" if closed_output else ""
    shell = ["sh", "-c", f'{limit}exec "$@"{close}', "sh"] if limit or close else []
    port = free_port()
    management_port = free_port() if management else None
    variables = {**clean_environment(), "PORT": str(port), **(environment or {})}
    if management_port is not None:
        variables["MANAGEMENT_PORT"] = str(management_port)
    assert variables["PORT"] != variables.get("MANAGEMENT_PORT"), "one port for both"
    process: subprocess.Popen[str] | ForkedProcess
    # The heap of a forked process contains the modules of all commands.
    fresh = fresh or "HEAP_SNAPSHOT_DIR" in variables
    if shell or fresh or module != "viralfx":
        process = subprocess.Popen(
            [*shell, sys.executable, "-m", module, program, *arguments],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    else:
        process = ForkedProcess([program, *arguments], environ=variables, cwd=ROOT)
    service = Service(process, port, management_port, serves=program == "serve")
    service.readers = [
        threading.Thread(target=service.output.extend, args=(process.stdout,), daemon=True),
        threading.Thread(target=service.errors.extend, args=(process.stderr,), daemon=True),
    ]
    for reader in service.readers:
        reader.start()
    try:
        yield service
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for reader in service.readers:
            reader.join(5)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        # pytest shows this if the test fails.
        sys.stdout.write(f"viralfx {program} ended with {process.poll()}:\n")
        sys.stdout.writelines([*service.output[-_SHOWN:], *service.errors[-_SHOWN:]])


def command(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    fresh: bool = FRESH,
) -> subprocess.CompletedProcess[str]:
    """Run one ``viralfx`` command to its end; see :func:`running` for ``fresh``."""
    if not fresh:
        environ = {**clean_environment(), **(environment or {})}
        return forked.viralfx(*arguments, environ=environ, seconds=READY_WITHIN, cwd=cwd)
    return subprocess.run(
        [sys.executable, "-m", "viralfx", *arguments],
        cwd=cwd,
        env={**clean_environment(), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=READY_WITHIN,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """Return this environment without the variables that configure the program."""
    configuring = re.compile(
        r"(DB|DATABASE|REDIS|SHUTDOWN|HEALTH|POOL|JOB|READINESS|MANAGEMENT|LOG|ACCESS|HEAP|LOOP|API|WEBHOOK"
        r"|ALERT|TASK|AUDIT|TRUSTED)_|CONSOLE|HTTP_(MAX|HEAD|KEEP|BODY)_|QUEUE|PORT$|OTEL_"
    )
    kept = {name: value for name, value in os.environ.items() if not configuring.match(name)}
    for name in (
        "ENVIRONMENT",
        "ALLOW_OPEN_API",
        "TOKENS",
        "REVISION",
        "STATE_DIR",
        "HOST",
        "KUBERNETES_SERVICE_HOST",
    ):
        kept.pop(name, None)
    return {**kept, "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Sighting:
    """The result of one probe; ``status`` is None if the connection was refused or failed."""

    at: float
    status: int | None
    seconds: float


class Prober:
    """Probes one path as a kubelet does: sequentially, with a new connection each time."""

    def __init__(self, port: int, path: str, *, period: float = 0.04, timeout: float = 1.0) -> None:
        self.seen: list[Sighting] = []
        self._port, self._path, self._period, self._timeout = port, path, period, timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                status = request(self._port, self._path, timeout=self._timeout).status
            except OSError:
                status = None
            self.seen.append(Sighting(began, status, time.monotonic() - began))
            self._stop.wait(self._period)

    def order(self) -> list[int | None]:
        """Return the statuses without repetitions, in the order they were first seen."""
        changes: list[int | None] = []
        for sighting in self.seen:
            if not changes or changes[-1] != sighting.status:
                changes.append(sighting.status)
        return changes


def percentile(values: list[float], share: float) -> float:
    """Return the percentile ``share`` (0 to 1) of the values."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
