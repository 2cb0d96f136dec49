"""Tests of a process' log: access lines, users, levels, and a blocked reader."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from typing import Any

import pytest
from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.service import ROOT, Service, clean_environment, request, running
from tests.system.workers import environment_of

APP = ("--app", "tests.system.log_app:app")
TOKEN = {"MANAGEMENT_TOKEN": "planted-token"}
BEARER = {"Authorization": "Bearer planted-token"}


def access_lines(service: Service, count: int) -> list[dict[str, Any]]:
    """Wait for that many access lines and return them."""

    def read() -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in list(service.output)]
        found = [line for line in parsed if line["context"] == "access"]
        return found if len(found) >= count else []

    return wait_until(read, what=lambda: f"{count} access lines; {service.output}")


@pytest.mark.each_python
def test_each_request_of_the_application_is_one_line() -> None:
    """The line has route, status, duration, sizes, ids and the user, but no long client data."""
    ids = {"X-Correlation-ID": "order-1"}
    with running(*APP, environment=TOKEN) as service:
        service.wait_ready()
        service.get("/orders/17", headers={**ids, "X-User": "user-123"})
        service.get("/echo", method="POST", json_body={"a": "b"}, headers=ids)
        service.get("/none/" + "x" * 5000, headers=ids)
        service.get("/orders/18", method="BREW", headers=ids)
        for path in ("/health", "/health/live", "/metrics", "/health/loggers", "/health/none"):
            service.get(path, headers=ids)
        lines = access_lines(service, 3)
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        lines = access_lines(service, 3)
        own = service.logged("Order read")
    for line in lines:
        assert 0 < line.pop("duration") < 1000
        assert line.pop("timestamp")
        assert line.pop("responseSize") > 0
    shared = {"level": "info", "context": "access", "correlationId": "order-1"}

    assert lines[0] == {
        **shared,
        "message": "GET /orders/{order} 200",
        "userId": "user-123",
        "method": "GET",
        "route": "/orders/{order}",
        "status": 200,
    }
    assert lines[1] == {
        **shared,
        "message": "POST /echo 200",
        "method": "POST",
        "route": "/echo",
        "status": 200,
        "requestSize": 10,
    }
    assert lines[2]["message"] == "GET unmatched 404"
    assert max(len(line) for line in service.output) < 1000
    assert [(line["userId"], line["correlationId"]) for line in own] == [("user-123", "order-1")]


@pytest.mark.each_python
@pytest.mark.parametrize("program", ["serve", "worker"])
def test_the_format_survives_other_logging_configurations(database: Database, program: str) -> None:
    """Applications configure logging at creation and start; task modules may as well."""
    module = "tests.system.noisy_app"
    environment = environment_of(database, API_TOKEN="planted-token", TASK_MODULES=module)
    arguments = ("--app", f"{module}:made") if program == "serve" else ()
    with running(*arguments, program=program, management=True, environment=environment) as service:
        service.wait_ready()
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
    messages = [json.loads(line)["message"] for line in service.output]

    expected = ["Made with ***", "Made at postgres://***@db/shop"]
    expected += ["Made with structlog and ***", "Made by dictConfig"]
    expected += ["Starting with ***", "Listening"] if program == "serve" else ["Working"]
    assert [message for message in messages if message in expected] == expected
    assert messages[-1] == "Process ends"
    assert service.errors == []


def test_the_access_log_can_be_turned_off() -> None:
    """Use ``ACCESS_LOG=false`` or the level of its logger."""
    with running(*APP, environment={"ACCESS_LOG": "false"}) as service:
        service.wait_ready()
        service.get("/orders/17")
        wait_until(lambda: service.logged("Order read"), what="the application's own line")
        service.signal(signal.SIGTERM)
        service.exit_code()
        assert not [line for line in service.output if '"context":"access"' in line]


def test_the_level_of_a_logger_can_be_changed_at_run_time() -> None:
    """A change adds lines of one logger and can be reverted; each change is logged."""
    with running(*APP, environment=TOKEN) as service:
        service.wait_ready()
        service.get("/orders/1")
        path = "/health/loggers/shop.orders"
        assert service.get(path).json() == {"level": None, "effectiveLevel": "log"}
        changed = service.get(path, method="PUT", json_body={"level": "debug"}, headers=BEARER)
        assert (changed.status, changed.json()) == (
            200,
            {"level": "debug", "effectiveLevel": "debug"},
        )
        service.get("/orders/2")
        reset = service.get(path, method="PUT", json_body={"level": None}, headers=BEARER)
        assert reset.json() == {"level": None, "effectiveLevel": "log"}
        service.get("/orders/3")
        wait_until(lambda: len(service.logged("Order read")) == 3, what="all three")
        debug_lines = service.logged("Order was in the cache")
        changes = service.logged("Logger level changed")

    assert [line["order"] for line in debug_lines] == [2]
    assert [line["logger"] for line in changes] == ["shop.orders", "shop.orders"]


@pytest.mark.soak
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["pipe", "terminal"] if SOAK else ["pipe"])
def test_a_blocked_reader_delays_no_request(kind: str) -> None:
    """Requests and the stop do not wait for the reader; the loss is reported afterwards."""
    if kind == "pipe":
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    else:
        reader, writer = pty.openpty()
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "viralfx", "serve", *APP],
        cwd=ROOT,
        env={**clean_environment(), "PORT": str(port)},
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    service = Service(process, port, None)  # type: ignore[arg-type] # its output is not text
    try:
        service.wait_ready()
        for _ in range(60):  # all of them before the first byte is read
            assert request(port, "/flood?lines=1000", timeout=30).status == 200
            assert request(port, "/health/live", timeout=30).status == 200
        output = bytearray()

        def complete() -> bool:
            while select.select([reader], [], [], 0.2)[0]:
                output.extend(os.read(reader, 65536))
            request(port, "/orders/1")  # a new line, so that the loss can be reported
            lost = sum(map(int, re.findall(rb'"lost":(\d+)', output)))
            return lost > 20_000 and output.count(b'"message":"Flood"') + lost >= 60_000

        wait_until(complete, seconds=120, what="all lines are written or reported as lost")
        for line in output.splitlines():
            assert json.loads(line)["message"]
        for _ in range(2):  # fills the pipe again before the shutdown
            request(port, "/flood?lines=1000", timeout=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        if process.stderr is not None:
            process.stderr.close()


def test_a_full_disk_fails_no_request() -> None:
    """Standard output is a device that is always full."""
    port = free_port()
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123 - a device
        process = subprocess.Popen(
            [sys.executable, "-m", "viralfx", "serve", *APP],
            cwd=ROOT,
            env={**clean_environment(), "PORT": str(port)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    service = Service(process, port, None)
    try:
        service.wait_ready()
        for _ in range(20):
            assert request(port, "/flood?lines=100").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
