"""A trace receiver in a process of its own, which can be killed, frozen, slowed or made to fail."""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.request import Request, urlopen

import psutil
from benchmarks.servers import CLIENT_CORE, ROOT, on_core
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.servers.ports import free_port

_OK = 200
_TIMEOUT_SECONDS = 20.0


class TraceReceiver:
    """Runs the program below; it is killed at the end of the block."""

    def __init__(self) -> None:
        self.port = free_port()
        with on_core(CLIENT_CORE):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.trace_receiver", str(self.port)], cwd=ROOT
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                self.received()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def received(self) -> int:
        """Return the numbers of received and accepted spans of requests."""
        with urlopen(f"http://127.0.0.1:{self.port}/", timeout=_TIMEOUT_SECONDS) as response:
            return int(json.load(response))

    def behave(self, *, status: int = _OK, delay: float = 0.0) -> None:
        """Answer with this status, after this delay in seconds."""
        command = json.dumps({"status": status, "delay": delay}).encode()
        address = f"http://127.0.0.1:{self.port}/behave"
        with urlopen(Request(address, command), timeout=_TIMEOUT_SECONDS):
            pass

    def freeze(self) -> None:
        """Suspend it: the kernel still accepts connections, but no process reads from them."""
        self._process.send_signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """Return the processor time used since the process began; 0 once it has ended."""
        if self._process.poll() is not None:
            return 0.0
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def kill(self) -> None:
        """End it; later connections are refused."""
        self._process.kill()
        self._process.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    spans = 0
    status = _OK
    delay = 0.0

    def do_GET(self) -> None:
        """Return the number of accepted spans."""
        self._answer(_OK, json.dumps(_Handler.spans).encode())

    def do_POST(self) -> None:
        """Accept spans, or a command."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/behave":
            command = json.loads(body)
            _Handler.status, _Handler.delay = command["status"], command["delay"]
            self._answer(_OK)
            return
        status = _Handler.status
        if status == _OK:
            with self.lock:
                _Handler.spans += _requests(ExportTraceServiceRequest.FromString(body))
        time.sleep(_Handler.delay)
        with suppress(ConnectionError):  # the client has timed out
            self._answer(status)

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its own name
        """Log nothing."""


def _requests(sent: ExportTraceServiceRequest) -> int:
    """Count the spans of requests, without those of the shutdown."""
    return sum(
        span.name.startswith("GET")
        for resource in sent.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    )


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler) as server:
        server.serve_forever()
