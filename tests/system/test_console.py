"""The console of real processes: its stream during a stop, a frozen database, a killed process."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import wait_until
from tests.system.service import Service, request, running
from tests.system.workers import api, environment_of, worker

TOKEN = "a-management-token-of-some-length"
STREAMS = 20
RECEIVE_BYTES = 1
"""The buffer of the client that does not read; the kernel takes its least instead."""


def session(port: int) -> dict[str, str]:
    """Log in, and return the headers of the console's own requests to a port."""
    origin = {"Origin": "http://test"}  # the Host of each request
    path, body = "/health/ui/session", {"token": TOKEN}
    answer = request(port, path, method="POST", json_body=body, headers=origin)
    assert answer.status == 204, answer
    return {**origin, "Cookie": answer.headers["set-cookie"].split(";")[0]}


class Page:
    """An open page: reads the stream of a port until its end."""

    def __init__(self, port: int, path: str = "/health/events") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        head = f"GET {path} HTTP/1.1\r\nHost: test\r\nAccept: text/event-stream\r\n\r\n"
        self.socket.sendall(head.encode())
        self.raw = b""
        self.ended = False
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            while chunk := self.socket.recv(65536):
                self.raw += chunk
        except OSError:
            pass
        self.ended = True

    def events(self) -> list[tuple[str, Any]]:
        """Return the events so far with their data."""
        found = []
        for frame in self.raw.decode(errors="replace").split("\n\n"):
            lines = [line.strip("\r") for line in frame.split("\n")]
            name = [line[7:] for line in lines if line.startswith("event: ")]
            data = [line[6:] for line in lines if line.startswith("data: ")]
            if name and data:
                try:
                    found.append((name[0], json.loads(data[0])))
                except ValueError:  # the end of it has not arrived
                    break
        return found

    def names(self) -> list[str]:
        """Return the names of the events so far."""
        return [name for name, _ in self.events()]


@contextmanager
def page(port: int) -> Iterator[Page]:
    """Open a page that has got its snapshot."""
    opened = Page(port)
    try:
        wait_until(lambda: "snapshot" in opened.names(), what=lambda: str(opened.raw[:500]))
        yield opened
    finally:
        opened.socket.close()


@pytest.mark.each_python
def test_a_page_on_the_management_port_sees_each_stage_to_the_end() -> None:
    """Each stage is named while it runs, `bye` is the last event, and the process ends with 0."""
    environment = {"MANAGEMENT_TOKEN": TOKEN, "SHUTDOWN_READINESS_DELAY": "300"}
    with running(management=True, environment=environment) as service:
        service.wait_ready()
        assert service.management_port is not None
        with page(service.management_port) as watched, page(service.port) as api_page:
            service.signal(signal.SIGTERM)
            assert service.exit_code() == 0
            wait_until(lambda: watched.ended, what="the stream ends")
            wait_until(lambda: api_page.ended, what="the stream of the API port ends")
            events = watched.events()

    states = [data["new"] for name, data in events if name == "state"]
    assert states == ["lame_duck", "draining"]
    running_stages: list[str] = []
    for name, data in events:
        if name == "stop":
            for stage in data["stages"]:
                for part in stage["parts"]:
                    if part["state"] == "running" and part["name"] not in running_stages:
                        running_stages.append(part["name"])
    assert running_stages[0] == "listeners"
    assert {"requests", "jobs", "state", "application", "server"} <= set(running_stages)
    assert events[-1][0] == "bye"
    assert events[-1][1]["left"] == ["management server"]
    assert [stage["state"] for stage in events[-1][1]["stop"]["stages"]][:3] == ["done"] * 3


def test_open_pages_do_not_delay_the_drain() -> None:
    """Of twenty streams one never reads: the drain ends at once, without cutting anything."""
    with running(environment={"MANAGEMENT_TOKEN": TOKEN}) as service, ExitStack() as stack:
        service.wait_ready()
        unread = stack.enter_context(_unread(service))
        pages = [stack.enter_context(page(service.port)) for _ in range(STREAMS - 1)]
        wait_until(lambda: _is_full(unread, service), what="bytes wait for it")
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        for each in pages:
            wait_until(lambda each=each: each.ended, what="a stream ends")  # type: ignore[misc]
            assert each.names()[-1] == "bye"
        stages = {line["stage"]: line["outcome"] for line in service.logged("Shutdown stage ended")}
        assert stages["requests"] == "ok"
        assert stages["console"] == "ok"


@contextmanager
def _unread(service: Service) -> Iterator[socket.socket]:
    """Ask for a stream with a small buffer, and never read it."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        client.connect(("127.0.0.1", service.port))
        client.sendall(b"GET /health/events HTTP/1.1\r\nHost: test\r\n\r\n")
        yield client


def _is_full(client: socket.socket, service: Service) -> bool:
    """Return whether bytes for a client wait in the kernel of the server."""
    own = client.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        here, there = (int(fields[n].split(":")[1], 16) for n in (1, 2))
        if (here, there) == (service.port, own):
            return int(fields[4].split(":")[0], 16) > 0
    return False


def test_a_worker_has_the_console_and_the_stop_can_be_begun_in_it(database: Database) -> None:
    """By its exact name, with one log line; another process shows that it stopped."""
    environment = environment_of(database, MANAGEMENT_TOKEN=TOKEN)
    with api(environment) as service, worker(environment) as process:
        assert process.management_port is not None
        with page(process.management_port) as opened:
            snapshot = opened.events()[0][1]
            assert snapshot["role"] == "worker"
            own = session(process.management_port)

            def begin(instance: str) -> int:
                path = f"/health/ui/data/stop/{instance}/begin"
                answer = process.manage(path, method="POST", headers=own, json_body={})
                return answer.status

            assert [begin("x"), begin(snapshot["instance"])] == [409, 202]
            assert process.exit_code() == 0
            wait_until(lambda: "bye" in opened.names(), what=lambda: str(opened.names()))

        acted = [
            (each["action"], each["outcome"], each["address"])
            for each in process.logged("Audit event")
            if each["action"] == "process.stop"
        ]
        assert acted == [("process.stop", word, "127.0.0.1") for word in ("refused", "done")]
        fleet, headers = "/health/ui/data/fleet", session(service.port)
        assert service.get(fleet, headers=headers).json()["kept"] == "postgres"

        def by_role() -> dict[str, str]:
            found = service.get(fleet, headers=headers).json()["items"]
            return {each["role"]: each["state"] for each in found}

        # A process reports its change to ready a moment later.
        wait_until(
            lambda: by_role() == {"api": "ready", "worker": "stopped"},
            what=lambda: str(by_role()),
        )


@pytest.mark.timeout(120)
def test_a_frozen_database_is_shown_while_it_lasts(own_postgres: PostgresServer) -> None:
    """The stream goes on; the views of the database say that it does not answer."""
    environment = environment_of(
        own_postgres,
        MANAGEMENT_TOKEN=TOKEN,
        HEALTH_CHECK_INTERVAL="300",
        HEALTH_CHECK_TIMEOUT="1000",
        DB_HEALTH_CHECK_INTERVAL="300",
    )
    with api(environment) as service, page(service.port) as opened:
        headers = session(service.port)

        def jobs() -> tuple[int, bool, str | None]:
            answer = service.get("/health/ui/data/jobs", headers=headers)
            body = answer.json()
            return answer.status, body["available"], body.get("code")

        def changes() -> list[str]:
            found = [data for name, data in opened.events() if name == "change"]
            return [each["new"] for each in found if each["check"] == "database"]

        own_postgres.freeze()
        try:
            wait_until(lambda: changes() == ["fail"], what=lambda: str(changes()))
            assert jobs() == (200, False, "ledger")
            beats = opened.names().count("beat")
            wait_until(lambda: opened.names().count("beat") > beats, what="the beat goes on")
        finally:
            own_postgres.thaw()
        wait_until(
            lambda: changes() == ["fail", "pass"],
            what=lambda: f"{changes()} {service.output[-5:]}",
        )
        wait_until(
            lambda: jobs() == (200, True, None),
            what="the database answers",
        )
