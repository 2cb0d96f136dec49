"""The console of real processes: its stream during a stop, a frozen database, a killed process."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import wait_until
from tests.system.service import running
from tests.system.workers import api, environment_of, worker

TOKEN = "a management token of some length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


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
    """Also one that never reads: the drain ends at once, without cutting anything."""
    with running(environment={"MANAGEMENT_TOKEN": TOKEN}) as service:
        service.wait_ready()
        with page(service.port):
            unread = socket.create_connection(("127.0.0.1", service.port))
            unread.sendall(b"GET /health/events HTTP/1.1\r\nHost: test\r\n\r\n")
            service.signal(signal.SIGTERM)
            assert service.exit_code() == 0
            unread.close()
        stages = {line["stage"]: line["outcome"] for line in service.logged("Shutdown stage ended")}
        assert stages["requests"] == "ok"
        assert stages["console"] == "ok"


def test_a_worker_has_the_console_and_the_stop_can_be_begun_in_it(database: Database) -> None:
    """By its exact name, with one log line; another process shows that it stopped."""
    environment = environment_of(database, MANAGEMENT_TOKEN=TOKEN)
    with api(environment) as service, worker(environment) as process:
        assert process.management_port is not None
        with page(process.management_port) as opened:
            snapshot = opened.events()[0][1]
            assert snapshot["role"] == "worker"
            body = {"instance": snapshot["instance"]}
            wrong = process.manage(
                "/health/console/stop", method="POST", headers=BEARER, json_body={"instance": "x"}
            )
            assert wrong.status == 409
            begun = process.manage(
                "/health/console/stop", method="POST", headers=BEARER, json_body=body
            )
            assert begun.status == 202
            assert process.exit_code() == 0
            wait_until(lambda: "bye" in opened.names(), what=lambda: str(opened.names()))

        acted = [(each["action"], each["outcome"]) for each in process.logged("Console action")]
        assert acted == [("begin stop", "refused"), ("begin stop", "ok")]
        assert service.get("/health/console/fleet").json()["kept"] == "postgres"

        def by_role() -> dict[str, str]:
            found = service.get("/health/console/fleet").json()["items"]
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

        def changes() -> list[str]:
            found = [data for name, data in opened.events() if name == "change"]
            return [each["new"] for each in found if each["check"] == "database"]

        own_postgres.freeze()
        try:
            wait_until(lambda: changes() == ["fail"], what=lambda: str(changes()))
            answer = service.get("/health/console/jobs", headers=BEARER)
            assert (answer.status, answer.json()["code"]) == (503, "ledger")
            beats = opened.names().count("beat")
            wait_until(lambda: opened.names().count("beat") > beats, what="the beat goes on")
        finally:
            own_postgres.thaw()
        wait_until(
            lambda: changes() == ["fail", "pass"],
            what=lambda: f"{changes()} {service.output[-5:]}",
        )
        wait_until(
            lambda: service.get("/health/console/jobs", headers=BEARER).status == 200,
            what="the database answers",
        )
