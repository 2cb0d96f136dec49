"""Denied management requests are logged, at most once a minute."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from httpx import ASGITransport, AsyncClient
from litestar import Litestar
from litestar.testing import AsyncTestClient
from tests.manual_clock import ManualClock

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Secret, Settings
from viralfx.web.auth import AccessVerdict
from viralfx.web.responses import DenialLog

SETTINGS = Settings(management_token=Secret("planted"), health_details="authorized")
WRONG = {"Authorization": "Bearer guessed"}
MESSAGE = "Management access refused"


@pytest.fixture(params=["gate", "routes"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    """Return a client of an application behind a gate, or of the routes alone."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar(plugins=[plugin], logging_config=None)
    transport = ASGITransport(app=cast("Any", app), client=("192.0.2.7", 1))
    served = AsyncClient(transport=transport, base_url="http://test")
    if request.param == "routes":
        yield served
        return
    async with AsyncTestClient(app):
        yield served


def denials(caplog: pytest.LogCaptureFixture) -> list[tuple[object, ...]]:
    """Return the fields of the logged denials."""
    names = ("method", "path", "client", "status", "others")
    records = [record for record in caplog.records if record.message.partition(":")[0] == MESSAGE]
    assert {record.levelno for record in records} <= {logging.WARNING}
    return [tuple(vars(record)[name] for name in names) for record in records]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/health/loggers/root"),
        ("GET", "/health/loggers"),
        ("POST", "/health/shutdown"),
        ("GET", "/health/detailed"),
        ("GET", "/health/memory"),
    ],
)
async def test_a_wrong_token_is_logged_once(
    client: AsyncClient, method: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The line has the method, path and client address, but not the token."""
    responses = [await client.request(method, path, headers=WRONG) for _ in range(9)]

    assert {response.status_code for response in responses} == {401}
    assert denials(caplog) == [(method, path, "192.0.2.7", 401, 0)]
    assert "guessed" not in str([vars(record) for record in caplog.records])


async def test_a_right_token_is_not_logged(
    client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that need no token are not logged either."""
    right = {"Authorization": "Bearer planted"}
    for path in ("/health/detailed", "/health/loggers", "/health/shutdown", "/health/live"):
        await client.get(path, headers=right)

    assert denials(caplog) == []


def deny(
    denial_log: DenialLog, path: str = "/planted", verdict: AccessVerdict = AccessVerdict.FORBIDDEN
) -> int:
    """Deny a request over a Unix socket, which has no client address; return the status."""
    denied = denial_log.of(verdict)
    assert denied is not None
    denied.log({"method": "GET", "path": path, "client": None}, denied.response.status)
    return denied.response.status


async def test_the_next_line_of_a_minute_counts_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``others`` has no upper limit, and is 0 after a minute without denials."""
    clock = ManualClock()
    denial_log = DenialLog(clock)
    assert deny(denial_log, "/" + "x" * 10_000) == 403
    for _ in range(1000):
        deny(denial_log)
    await clock.advance(59)
    deny(denial_log)
    await clock.advance(1)
    deny(denial_log, verdict=AccessVerdict.UNAUTHORIZED)
    await clock.advance(60)
    deny(denial_log)

    assert denials(caplog) == [
        ("GET", "/" + "x" * 199, None, 403, 0),
        ("GET", "/planted", None, 401, 1001),
        ("GET", "/planted", None, 403, 0),
    ]


async def test_suppressed_denials_are_logged_without_another_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The line comes at the end of the period and describes the latest denial."""
    denial_log = DenialLog(ManualClock(), period=0.01)
    for path in ("/first", "/second", "/third"):
        deny(denial_log, path)
    async with asyncio.timeout(20):
        while len(denials(caplog)) < 2:  # noqa: ASYNC110 - a log sets no event
            await asyncio.sleep(0.001)

    assert denials(caplog) == [("GET", "/first", None, 403, 0), ("GET", "/third", None, 403, 1)]
