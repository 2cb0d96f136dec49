"""Unhandled errors of any Litestar application are logged exactly once."""

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
    """An error for which the application has an exception handler."""


@get("/broken")
async def broken() -> None:
    """Raise an unhandled error."""
    raise RuntimeError("planted")


@get("/internal")
async def internal() -> None:
    """Raise Litestar's exception for internal errors."""
    raise InternalServerException("planted")


@get("/handled")
async def handled() -> None:
    """Raise an error that the application handles."""
    raise HandledError("planted")


@get("/wrong")
async def wrong() -> None:
    """Raise a client error."""
    raise ClientException("planted")


@get("/unavailable")
async def unavailable() -> None:
    """Raise a 503 deliberately."""
    raise HTTPException(status_code=503)


@get("/returned", status_code=500)
async def returned() -> str:
    """Return a 500 without an error."""
    return "not today"


@websocket("/socket")
async def socket(socket: WebSocket[object, object, object]) -> None:  # type: ignore[type-var]
    """Accept, then raise an error."""
    await socket.accept()
    raise RuntimeError("planted")


HANDLERS: list[ControllerRouterHandler] = [
    broken,
    internal,
    handled,
    wrong,
    unavailable,
    returned,
    socket,
]


def handle(_: Request[object, object, State], error: HandledError) -> Response[str]:
    """Return a 409."""
    return Response(str(error), status_code=409, media_type=MediaType.TEXT)


def with_the_plugin(logging_config: LoggingConfig | None = None) -> Litestar:
    """Return an application with the plugin."""
    return Litestar(
        HANDLERS,
        plugins=[OperationsPlugin(OperationsConfig(settings=Settings()))],
        exception_handlers={HandledError: handle},
        logging_config=logging_config,
    )


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return message and error of each logged line."""
    return [
        (record.getMessage().partition(":")[0], str(record.exc_info[1]) if record.exc_info else "")
        for record in caplog.records
        if record.name == "viralfx.web"
    ]


@pytest.mark.parametrize("path", ["/broken", "/internal"])
async def test_an_unhandled_error_is_one_log_line(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The line has the exception, the method and the path."""
    async with AsyncTestClient(with_the_plugin()) as client:
        reply = await client.get(path)

    assert reply.status_code == 500
    ((message, error),) = logged(caplog)
    assert (message, error.rpartition(" ")[2]) == ("Request failed", "planted")
    (record,) = [one for one in caplog.records if one.name == "viralfx.web"]
    assert (vars(record)["method"], vars(record)["path"]) == ("GET", path)


@pytest.mark.parametrize(
    ("path", "status"),
    [("/handled", 409), ("/wrong", 400), ("/unavailable", 503), ("/returned", 500)],
)
async def test_deliberate_error_responses_are_not_logged(
    path: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """This includes a 500 that the application returns itself."""
    async with AsyncTestClient(with_the_plugin()) as client:
        reply = await client.get(path)

    assert reply.status_code == status
    assert logged(caplog) == []


def test_an_error_of_a_websocket_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A WebSocket has no response that could report the error."""
    with (
        TestClient(with_the_plugin()) as client,
        suppress(Exception),
        client.websocket_connect("/socket") as connection,
    ):
        connection.receive_text()

    assert logged(caplog) == [("Request failed", "planted")]


async def test_an_application_that_logs_errors_itself_has_no_second_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Litestar's ``log_exceptions`` decides whether the application logs errors."""
    logged_by_app: list[object] = []

    def log(*arguments: object) -> None:
        logged_by_app.append(arguments)

    handler: Callable[..., None] = log
    always = LoggingConfig(
        log_exceptions="always", exception_logging_handler=handler, configure_root_logger=False
    )
    async with AsyncTestClient(with_the_plugin(always)) as client:
        assert (await client.get("/broken")).status_code == 500

    assert len(logged_by_app) == 1
    assert logged(caplog) == []
    assert logging.getLogger("viralfx.web").isEnabledFor(logging.ERROR)
