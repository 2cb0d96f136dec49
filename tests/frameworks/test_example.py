"""The example for FastAPI: a durable job with a retry, in a process that is killed in between."""

import ast
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.service import ROOT, command, running
from tests.system.workers import api, environment_of, worker

APP = "docs.examples.parcels:app"
EXAMPLE = ROOT / "docs/examples/parcels.py"


class Labels(ThreadingHTTPServer):
    """The service that the example asks for labels; its first answer is an error."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.orders: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Labels

    def do_POST(self) -> None:
        """Record the order."""
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.orders.append(json.loads(body)["order"])
        self.send_response(503 if len(self.server.orders) == 1 else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as above
        """Log nothing."""


@contextmanager
def labels() -> Iterator[Labels]:
    """Run the service."""
    with Labels() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_accepted_order_outlives_its_process(migrated_database: Database) -> None:
    """``serve`` is killed after it accepted; ``worker --app`` runs the job, with a retry."""
    with labels() as server:
        # httpx asks a proxy for the address of the example, so it needs no option for the test.
        environment = environment_of(
            migrated_database,
            TASK_MODULES="none",
            HTTP_PROXY=f"http://127.0.0.1:{server.server_port}",
        )
        with api(environment, "--app", APP, "--no-worker") as service:
            placed = service.get("/orders/A7", method="POST")
            probes = [service.status(path) for path in ("/health/live", "/health/ready")]
            service.signal(signal.SIGKILL)
            service.exit_code()
        with worker(environment, "--app", APP) as process:
            shown = wait_until(lambda: completed(environment, placed.json()["job"]))
            process.signal(signal.SIGTERM)
            code = process.exit_code()

    assert (placed.status, probes, code) == (202, [200, 200], 0)
    assert server.orders == ["A7", "A7"], "one retry within the task"
    assert shown["attempts"] == 1, "the retry is within the first attempt"


def completed(environment: dict[str, str], job_id: str) -> dict[str, object] | None:
    """Return the job once it has completed."""
    shown = command("jobs", "show", job_id, "--json", environment=environment)
    job: dict[str, object] = json.loads(shown.stdout)
    return job if job["state"] == "completed" else None


def test_the_stop_finishes_the_job() -> None:
    """In memory the job of a request before SIGTERM runs in the same process."""
    with labels() as server:
        proxy = {"HTTP_PROXY": f"http://127.0.0.1:{server.server_port}"}
        with running("--app", APP, environment=proxy) as service:
            service.wait_ready()
            placed = service.get("/orders/B8", method="POST")
            service.signal(signal.SIGTERM)
            code = service.exit_code()

    assert (placed.status, code) == (202, 0)
    assert server.orders == ["B8", "B8"]


def test_the_example_is_short() -> None:
    """It has at most 15 lines of code, and the document shows them."""
    source = EXAMPLE.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    code = "\n".join(source.splitlines()[docstring.end_lineno :]).strip()
    shown = (ROOT / "docs/asgi.md").read_text(encoding="utf-8")

    assert len([line for line in code.splitlines() if line]) <= 15
    assert f"```python\n{code}\n```" in shown
