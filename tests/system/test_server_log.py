"""Tests of the rate limit for log lines about invalid requests."""

import logging
import signal
import socket

import pytest
from tests.servers.waiting import wait_until
from tests.system.connections import send
from tests.system.service import running

from viralfx.server.limits import ThrottledLog

CONNECTIONS = 3000
REJECTED = "HTTP request rejected"
UPGRADE = "HTTP upgrade ignored"


def read(connection: socket.socket) -> bytes:
    """Read until a response has begun, and disconnect."""
    with connection:
        return connection.recv(65536)


def test_thousands_of_invalid_requests_are_a_line_a_minute() -> None:
    """The first is logged at once, and the number of the others at the end at the latest."""
    with running("--app", "tests.system.apps:plain", management=True) as service:
        service.wait_ready()
        for number in range(CONNECTIONS):
            response = read(send(service, b"M%d /work HTTP/1.1\r\nHost: test\r\n\r\n" % number))
            assert response.startswith(b"HTTP/1.1 400 ")
            if number == 0:
                wait_until(lambda: service.logged(REJECTED), what="the first line")
        head = b"GET /work HTTP/1.1\r\nHost: test\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n"
        for _ in range(10):
            assert read(send(service, head)).startswith(b"HTTP/1.1 200 ")
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        first, *rest = service.logged(REJECTED)
        upgrades = service.logged(UPGRADE)

    assert (first["level"], first["context"], first["reason"]) == ("warn", "http", "invalid")
    assert (first["status"], first["client"], first["others"]) == (400, "127.0.0.1", 0)
    assert sum(1 + line["others"] for line in rest) == CONNECTIONS - 1
    assert len(rest) <= 3, "no more than minutes"
    assert sum(1 + line["others"] for line in upgrades) == 10
    assert len(upgrades) <= 3
    assert {line["upgrade"] for line in upgrades} == {"other"}


@pytest.mark.each_python
def test_suppressed_lines_are_logged_once_a_period(caplog: pytest.LogCaptureFixture) -> None:
    """Each kind has its own period, and a line counts those suppressed since the last."""
    log = ThrottledLog(logging.getLogger("tests.throttled"), "Refused", period=0.2)

    def lines() -> list[tuple[object, object, object]]:
        return [(vars(r)["kind"], vars(r)["number"], vars(r)["others"]) for r in caplog.records]

    for number in range(5):
        log.add("a", logging.WARNING, kind="a", number=number)
    log.add("b", logging.WARNING, kind="b", number=0)
    log.flush()
    before = lines()

    def more() -> bool:
        log.flush()
        return len(lines()) > len(before)

    wait_until(more, what="the rest is logged")
    log.add("a", logging.WARNING, kind="a", number=5)
    log.flush(now=True)
    log.flush(now=True)

    assert before == [("a", 0, 0), ("b", 0, 0)]
    assert lines()[2:] == [("a", 4, 3), ("a", 5, 0)]
