"""What a client sends that is no request costs a line, however often it does."""

import logging
import signal
import socket

import pytest
from tests.servers.waiting import wait_until
from tests.system.connections import send
from tests.system.service import running

from viralfx.runner.server_log import ServerLog

CONNECTIONS = 3000
INVALID = "Invalid HTTP request received."
UPGRADE = "Unsupported upgrade request."


def read(connection: socket.socket) -> bytes:
    """Read until an answer has begun, and leave."""
    with connection:
        return connection.recv(65536)


def test_ten_thousand_requests_that_are_none_are_a_line_a_minute() -> None:
    """The first is told of at once, and how many there were since then at the end at the latest."""
    with running("--app", "tests.system.apps:plain", management=True) as service:
        service.wait_ready()
        for number in range(CONNECTIONS):
            answer = read(send(service, b"M%d /work HTTP/1.1\r\nHost: test\r\n\r\n" % number))
            assert answer.startswith(b"HTTP/1.1 400 ")
            if number == 0:
                wait_until(lambda: service.logged(INVALID), what="the first line")
        head = b"GET /work HTTP/1.1\r\nHost: test\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n"
        for _ in range(10):
            assert read(send(service, head)).startswith(b"HTTP/1.1 200 ")
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        first, *rest = service.logged(INVALID)
        upgrades = service.logged(UPGRADE)

    assert (first["level"], first["context"]) == ("warn", "uvicorn.error")
    assert first["others"] == 0
    assert sum(1 + line["others"] for line in rest) == CONNECTIONS - 1
    assert len(rest) <= 3, "no more than minutes"
    assert sum(1 + line["others"] for line in upgrades) == 10
    assert len(upgrades) <= 3


def test_what_was_said_again_is_told_when_it_is_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the next time counts from there; what an application logs there is its own affair."""
    logger, log = logging.getLogger("uvicorn.error"), ServerLog(period=0.2)
    # A server that a test before this one had in this process has a filter as well.
    monkeypatch.setattr(logger, "filters", [])
    log.install()
    try:
        for number in range(5):
            logger.warning(INVALID)
            logger.warning("The application's own %d", number)
        log.tell_rest()
        before = [record.getMessage() for record in caplog.records]

        def told() -> bool:
            log.tell_rest()
            return len(caplog.records) > len(before)

        wait_until(told, what="the rest is told")
        logger.warning(INVALID)
        log.tell_rest(now=True)
        log.tell_rest(now=True)
    finally:
        logger.removeFilter(log)
    rest = caplog.records[len(before) :]

    assert before == [INVALID, *[f"The application's own {number}" for number in range(5)]]
    assert [record.getMessage() for record in rest] == [INVALID, INVALID]
    assert [vars(record)["others"] for record in rest] == [3, 0]
