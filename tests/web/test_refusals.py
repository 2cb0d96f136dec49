"""Who is refused at the management endpoints is logged, and not once for each guess."""

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
from viralfx.web.access import Verdict
from viralfx.web.refusals import Refusals

SETTINGS = Settings(management_token=Secret("planted"), health_details="authorized")
WRONG = {"Authorization": "Bearer guessed"}
MESSAGE = "Management access refused"


@pytest.fixture(params=["gate", "routes"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    """Return a client of an application behind a gate, or with its routes alone."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar(plugins=[plugin], logging_config=None)
    transport = ASGITransport(app=cast("Any", app), client=("192.0.2.7", 1))
    served = AsyncClient(transport=transport, base_url="http://test")
    if request.param == "routes":
        yield served
        return
    async with AsyncTestClient(app):
        yield served


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[object, ...]]:
    """Return what was logged of refusals."""
    names = ("method", "path", "client", "status", "others")
    records = [record for record in caplog.records if record.message == MESSAGE]
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
    """With where it was sent and from where, but not what was sent."""
    answers = [await client.request(method, path, headers=WRONG) for _ in range(20)]

    assert {answer.status_code for answer in answers} == {401}
    assert told(caplog) == [(method, path, "192.0.2.7", 401, 0)]
    assert "guessed" not in str([vars(record) for record in caplog.records])


async def test_a_right_token_is_not_logged(
    client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor what needs none."""
    right = {"Authorization": "Bearer planted"}
    for path in ("/health/detailed", "/health/loggers", "/health/shutdown", "/health/live"):
        await client.get(path, headers=right)

    assert told(caplog) == []


def refuse(refusals: Refusals, path: str = "/planted", verdict: Verdict = Verdict.FORBIDDEN) -> int:
    """Refuse a request that came by a Unix socket."""
    refused = refusals.of(verdict)
    assert refused is not None
    refused.tell({"method": "GET", "path": path, "client": None}, refused.answer.status)
    return refused.answer.status


async def test_the_next_line_of_a_minute_counts_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However many there were, and also when nothing was in between."""
    clock = ManualClock()
    refusals = Refusals(clock)
    assert refuse(refusals, "/" + "x" * 10_000) == 403
    for _ in range(1000):
        refuse(refusals)
    await clock.advance(59)
    refuse(refusals)
    await clock.advance(1)
    refuse(refusals, verdict=Verdict.UNAUTHORIZED)
    await clock.advance(60)
    refuse(refusals)

    assert told(caplog) == [
        ("GET", "/" + "x" * 199, None, 403, 0),
        ("GET", "/planted", None, 401, 1001),
        ("GET", "/planted", None, 403, 0),
    ]


async def test_what_was_not_told_is_told_though_nobody_comes_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At the end of the period, about the last one; then there is nothing more to tell."""
    refusals = Refusals(ManualClock(), period=0.01)
    for path in ("/first", "/second", "/third"):
        refuse(refusals, path)
    async with asyncio.timeout(20):
        while len(told(caplog)) < 2:  # noqa: ASYNC110 - a log sets no event
            await asyncio.sleep(0.001)

    assert told(caplog) == [("GET", "/first", None, 403, 0), ("GET", "/third", None, 403, 1)]
