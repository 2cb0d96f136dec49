"""Each framework under each server: probes, a stop under load, and the exit code.

The table of docs/asgi.md is made from the expectations of these tests.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.service import READY_WITHIN, ROOT, Reply, clean_environment, request
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


@dataclass(frozen=True)
class Server:
    """A server: its command, and its own behaviour during a stop."""

    command: Callable[[str, int], list[str]]
    ready: str
    """The readiness probe during the stop."""
    close_code: int
    """The close code of a WebSocket during the stop."""
    exit_code: int
    may_keep: bool = False
    """Whether it waits for the client to close a WebSocket, from Python 3.12 on."""

    @property
    def keeps(self) -> bool:
        """Whether it does so here."""
        return self.may_keep and sys.version_info[:2] != (3, 11)


def module(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a module."""
    return [sys.executable, "-m", name, *arguments]


SERVERS = {
    "viralfx serve": Server(
        lambda app, port: module("viralfx", "serve", "--app", app, "--port", str(port)),
        "503",
        1012,
        0,
    ),
    "uvicorn": Server(
        lambda app, port: module("uvicorn", app, "--port", str(port)), "refused", 1012, -15
    ),
    "granian": Server(
        lambda app, port: module("granian", "--interface", "asgi", "--port", str(port), app),
        "refused",
        1006,
        0,
    ),
    "hypercorn": Server(
        # Its grace is three seconds, and a WebSocket uses all of it.
        lambda app, port: module(
            "hypercorn", "--graceful-timeout", "1", "--bind", f"127.0.0.1:{port}", app
        ),
        "no answer",
        1011,
        0,
        may_keep=True,
    ),
    "gunicorn": Server(
        lambda app, port: module(
            "gunicorn", "-k", "uvicorn_worker.UvicornWorker", "--bind", f"127.0.0.1:{port}", app
        ),
        "refused",
        1012,
        0,
    ),
}
FRAMEWORKS = {
    "Litestar": "litestar_app",
    "FastAPI": "fastapi_app",
    "Starlette": "starlette_app",
    "Django": "django_app",
    "plain ASGI": "plain_app",
}
_USUAL = ("FastAPI", "Litestar", "Starlette", "Django", "plain ASGI")
_ALSO = [("viralfx serve", "Django"), ("viralfx serve", "plain ASGI")]
PAIRS = [*product(SERVERS, FRAMEWORKS)] if SOAK else [*zip(SERVERS, _USUAL, strict=True), *_ALSO]
"""Every pair in a soak run, else each server and each framework once, and two more.

Django and plain ASGI have no lifespan under ``viralfx serve``. tests/system has Litestar there, and
FastAPI is made of Starlette.
"""
WITHOUT_WEBSOCKETS = {"Django"}
WITHOUT_LIFESPAN = {"Django", "plain ASGI"}
PROBES = ("/health", "/health/live", "/health/ready", "/health/startup", "/metrics")


@contextmanager
def started(
    server: Server, app: str, folder: Path
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run an application under a server until the end of the block; yield process and port."""
    port, log = free_port(), folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.command(f"tests.frameworks.{app}:app", port),
            cwd=ROOT,
            env={
                **clean_environment(),
                "SCENE_FOLDER": str(folder),
                # Only `viralfx serve` has this delay.
                "SHUTDOWN_READINESS_DELAY": "300",
            },
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: process.poll() is not None or probe(port) == "200",
            seconds=READY_WITHIN,
            what=log.read_text,
        )
        assert process.poll() is None, log.read_text()
        yield process, port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # some servers have children
        process.wait()


def probe(port: int) -> str | None:
    """Return the result of one readiness probe; None if the connection was cut."""
    try:
        return str(request(port, "/health/ready", timeout=0.3).status)
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "no answer"
    except OSError:
        return None


def probe_during_stop(port: int) -> str | None:
    """Return the result of a readiness probe if it differs from that before the stop."""
    return None if (seen := probe(port)) == "200" else seen


class Held:
    """A request that is in flight until the test releases it."""

    def __init__(self, port: int, folder: Path) -> None:
        self._folder = folder
        self._replies: list[Reply | OSError] = []
        self._thread = threading.Thread(target=self._send, args=(port,), daemon=True)
        self._thread.start()
        wait_until((folder / "held").exists, what="the request is in flight")

    def _send(self, port: int) -> None:
        try:
            self._replies.append(request(port, "/hold", timeout=30))
        except OSError as error:
            self._replies.append(error)

    def release(self) -> Reply | OSError:
        """Let the application respond, and return its response."""
        (self._folder / "release").touch()
        self._thread.join(30)
        return self._replies[0]


class Socket:
    """A WebSocket that the server ends."""

    def __init__(self, port: int) -> None:
        self._connection = connect(f"ws://127.0.0.1:{port}/echo", legacy=True)
        self._connection.send("hello")
        self.echo = self._connection.recv(timeout=10)

    def close(self) -> None:
        """Close it as the client."""
        self._connection.close()

    def close_code(self) -> int:
        """Wait for the end and return its code; 1006 stands for none."""
        with pytest.raises(ConnectionClosed) as closed:
            self._connection.recv(timeout=15)
        return 1006 if closed.value.rcvd is None else closed.value.rcvd.code


@pytest.mark.soak
@pytest.mark.parametrize(("server_name", "framework"), PAIRS)
def test_an_application_under_a_server(framework: str, server_name: str, tmp_path: Path) -> None:
    """Probes, routes, a job, and a stop with a request and a WebSocket; the stages run.

    A client behind a proxy gets the probes, and no metrics, which need a token beyond the machine.
    The check of clients that the application's start-up opens does not run before it is complete.
    """
    server = SERVERS[server_name]
    with started(server, FRAMEWORKS[framework], tmp_path) as (process, port):
        probes = [request(port, path).status for path in PROBES]
        elsewhere = [
            request(port, path, headers={"X-Forwarded-For": "192.0.2.7"}).status for path in PROBES
        ]
        item = request(port, "/items/7", headers={"X-Correlation-ID": "given-1"})
        job = request(port, "/jobs", method="POST")
        held = Held(port, tmp_path)
        socket = None if framework in WITHOUT_WEBSOCKETS else Socket(port)
        process.send_signal(signal.SIGTERM)
        ready = wait_until(lambda: probe_during_stop(port), what="the stop begins")
        reply = held.release()
        close_code = None
        if socket is not None and server.keeps:
            socket.close()
        elif socket is not None:
            close_code = socket.close_code()
        exit_code = process.wait(15)

    assert probes == [200] * len(PROBES)
    assert elsewhere == [200, 200, 200, 200, 403]
    assert (item.status, item.headers["x-correlation-id"]) == (200, "given-1")
    assert b"7" in item.body  # in a chunk, unless the framework sets the length
    assert job.status in {200, 201}
    assert isinstance(reply, Reply), reply
    assert (reply.status, b"done" in reply.body) == (200, True)
    assert (ready, exit_code) == (server.ready, server.exit_code)
    if socket is not None and server_name == "viralfx serve":
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        ended = [line for line in lines if line["message"] == "WEBSOCKET /echo 1012"]
        assert [(x["requestSize"], x["responseSize"], x["status"]) for x in ended] == [(5, 5, 101)]
    if socket is not None:
        assert socket.echo == "hello"
        assert close_code == (None if server.keeps else server.close_code)
    assert (tmp_path / "job").read_text() == "written"
    assert (tmp_path / "left").exists(), "the last stage ran"
    assert (tmp_path / "checked").exists() == (framework not in WITHOUT_LIFESPAN)
    assert not (tmp_path / "checked too early").exists()


WITHOUT_LITESTAR = """
import sys
sys.modules["litestar"] = None
from viralfx.__main__ import main
sys.exit(main())
"""


def test_viralfx_serve_needs_no_litestar(tmp_path: Path) -> None:
    """An application of another framework starts and stops where Litestar is not installed."""
    command = [sys.executable, "-c", WITHOUT_LITESTAR, "serve", "--app"]
    server = Server(lambda app, port: [*command, app, "--port", str(port)], "503", 1012, 0)
    with started(server, "fastapi_app", tmp_path) as (process, port):
        item = request(port, "/items/7")
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(15)

    assert (item.status, exit_code) == (200, 0), (tmp_path / "log").read_text()


SERVERS_OF_OWN_TASKS = {
    "python": Server(
        lambda app, port: module(app.partition(":")[0], str(port)), "refused", 1012, 0
    ),
    **SERVERS,
}


def completed(port: int, paths: Sequence[str]) -> list[Any] | None:
    """Return jobs when all of them are completed."""
    jobs = [request(port, path).json() for path in paths]
    return jobs if all(job["state"] == "completed" for job in jobs) else None


@pytest.mark.parametrize(
    "server_name", SERVERS_OF_OWN_TASKS if SOAK else ["viralfx serve", "uvicorn", "python"]
)
def test_a_job_of_a_task_of_the_module(server_name: str, tmp_path: Path) -> None:
    """Tasks that the application's module declares after the plugin, too, need no list."""
    with started(SERVERS_OF_OWN_TASKS[server_name], "own_app", tmp_path) as (_, port):
        jobs = [
            request(port, "/api/v1/jobs", method="POST", json_body={"task": task, "payload": 7})
            for task in ("own.above", "own.below")
        ]
        paths = [job.json()["links"]["self"] for job in jobs]
        found = wait_until(lambda: completed(port, paths))
        results = [job["result"] for job in found]

    assert ([job.status for job in jobs], results) == ([202, 202], [8, 6])


def cell(framework: str, server: Server) -> str:
    """Return what the documentation says about a framework under a server."""
    close_code = f"{server.close_code} or kept" if server.may_keep else f"{server.close_code}"
    if framework in WITHOUT_WEBSOCKETS:
        close_code = "none"
    return f"{server.ready}, 200, {close_code}, {server.exit_code}"


def test_the_documentation_has_these_results() -> None:
    """The table of docs/asgi.md is the one that the tests above prove."""
    lines = [
        f"| | {' | '.join(SERVERS)} |",
        f"|---|{'---|' * len(SERVERS)}",
        *(
            f"| {framework} | {' | '.join(cell(framework, each) for each in SERVERS.values())} |"
            for framework in FRAMEWORKS
        ),
    ]

    assert "\n".join(lines) in (ROOT / "docs/asgi.md").read_text(encoding="utf-8")
