"""Errors that nobody handled are in the log, in anybody's application, and each of them once."""

import logging
from collections.abc import Callable
from contextlib import suppress

import pytest
from litestar import Litestar, MediaType, Request, Response, WebSocket, get, websocket
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException, InternalServerException
from litestar.logging import LoggingConfig
from litestar.testing import AsyncTestClient, TestClient
from litestar.types import ControllerRouterHandler

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Settings


class HandledError(Exception):
    """One that the application has an answer for."""


@get("/broken")
async def broken() -> None:
    """Fail as nobody expected."""
    raise RuntimeError("planted")


@get("/internal")
async def internal() -> None:
    """Fail in Litestar's own words."""
    raise InternalServerException("planted")


@get("/handled")
async def handled() -> None:
    """Fail as the application expected."""
    raise HandledError("planted")


@get("/wrong")
async def wrong() -> None:
    """Refuse a request."""
    raise ClientException("planted")


@get("/unavailable")
async def unavailable() -> None:
    """Put a client off, on purpose."""
    raise HTTPException(status_code=503)


@get("/said", status_code=500)
async def said() -> str:
    """Answer 500 without any error."""
    return "not today"


@websocket("/socket")
async def socket(socket: WebSocket[object, object, object]) -> None:  # type: ignore[type-var]
    """Accept, then fail."""
    await socket.accept()
    raise RuntimeError("planted")


HANDLERS: list[ControllerRouterHandler] = [
    broken,
    internal,
    handled,
    wrong,
    unavailable,
    said,
    socket,
]


def answer(_: Request[object, object, State], error: HandledError) -> Response[str]:
    """Answer what was expected."""
    return Response(str(error), status_code=409, media_type=MediaType.TEXT)


def with_the_plugin(logging_config: LoggingConfig | None = None) -> Litestar:
    """Return an application that was made with the plugin."""
    return Litestar(
        HANDLERS,
        plugins=[OperationsPlugin(OperationsConfig(settings=Settings()))],
        exception_handlers={HandledError: answer},
        logging_config=logging_config,
    )


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return what was logged of errors, with the error."""
    return [
        (record.getMessage(), str(record.exc_info[1]) if record.exc_info else "")
        for record in caplog.records
        if record.name == "viralfx.web"
    ]


@pytest.mark.parametrize("path", ["/broken", "/internal"])
async def test_an_error_that_nobody_handled_is_one_line(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With what was raised, and where."""
    async with AsyncTestClient(with_the_plugin()) as client:
        reply = await client.get(path)

    assert reply.status_code == 500
    ((message, error),) = logged(caplog)
    assert (message, error.rpartition(" ")[2]) == ("Request failed", "planted")
    (record,) = [one for one in caplog.records if one.name == "viralfx.web"]
    assert (vars(record)["method"], vars(record)["path"]) == ("GET", path)


@pytest.mark.parametrize(
    ("path", "status"), [("/handled", 409), ("/wrong", 400), ("/unavailable", 503), ("/said", 500)]
)
async def test_what_is_meant_is_not_logged(
    path: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever was raised for it."""
    async with AsyncTestClient(with_the_plugin()) as client:
        reply = await client.get(path)

    assert reply.status_code == status
    assert logged(caplog) == []


def test_an_error_of_a_websocket_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It has no answer that tells of it."""
    with (
        TestClient(with_the_plugin()) as client,
        suppress(Exception),
        client.websocket_connect("/socket") as connection,
    ):
        connection.receive_text()

    assert logged(caplog) == [("Request failed", "planted")]


async def test_what_an_application_logs_itself_is_not_logged_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It said so to Litestar."""
    told: list[object] = []

    def tell(*arguments: object) -> None:
        told.append(arguments)

    handler: Callable[..., None] = tell
    always = LoggingConfig(
        log_exceptions="always", exception_logging_handler=handler, configure_root_logger=False
    )
    async with AsyncTestClient(with_the_plugin(always)) as client:
        assert (await client.get("/broken")).status_code == 500

    assert len(told) == 1
    assert logged(caplog) == []
    assert logging.getLogger("viralfx.web").isEnabledFor(logging.ERROR)
