"""Creates the service's own application, and the jobs API for one of another framework.

Every path with GET also serves HEAD, and ``Allow`` lists every method of a path (RFC 9110).
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeAlias, cast

from litestar import Litestar, Router
from litestar.connection import ASGIConnection
from litestar.enums import HttpMethod
from litestar.exceptions import NotAuthorizedException
from litestar.handlers.base import BaseRouteHandler
from litestar.openapi.spec import Components
from litestar.plugins import ReceiveRoutePlugin
from litestar.routes import BaseRoute, HTTPRoute
from litestar.types import ASGIApp as LitestarASGIApp

from viralfx.server.interface import ASGIApp, Message, Receive, Scope, Send
from viralfx.settings import Exposure, Settings
from viralfx.telemetry import hide_packages
from viralfx.web.api_docs import ApiDocsPlugin
from viralfx.web.client_address import is_on_this_machine
from viralfx.web.jobs.changes import jobs_router
from viralfx.web.jobs.openapi import COMPONENTS, JobsDocument
from viralfx.web.layer import OperationsConfig, OperationsLayer
from viralfx.web.plugin import BoundedCaches, OperationsPlugin, keep_error
from viralfx.web.problems import problem_handlers
from viralfx.web.responses import has_credentials, peer_of
from viralfx.web.routes import StableOpenAPIConfig

AnyConnection: TypeAlias = ASGIConnection[Any, Any, Any, Any]


class HeadAsGet:
    """ASGI middleware that serves HEAD as GET without the body.

    Once the head of the response is sent, the application receives a disconnect, so that an event
    stream ends.
    """

    __slots__ = ("_app",)

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    # Not async: one more coroutine would cost 1 % of an ordinary request.
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one ASGI scope."""
        is_head = scope["type"] == "http" and scope["method"] == HttpMethod.HEAD
        return (self._head if is_head else self._app)(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        head_sent = asyncio.Event()

        async def send_head(message: Message) -> None:
            if message["type"] != "http.response.start":
                return
            # The server drops the body if the method in the scope is HEAD.
            scope["method"] = HttpMethod.HEAD.value
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            head_sent.set()

        async def receive_until_head_sent() -> Message:
            if head_sent.is_set():
                return {"type": "http.disconnect"}
            received = asyncio.ensure_future(receive())
            sent = asyncio.ensure_future(head_sent.wait())
            try:
                await asyncio.wait((received, sent), return_when=asyncio.FIRST_COMPLETED)
                return received.result() if received.done() else {"type": "http.disconnect"}
            finally:
                received.cancel()
                sent.cancel()

        scope["method"] = HttpMethod.GET.value
        try:
            await self._app(scope, receive_until_head_sent, send_head)
        finally:
            scope["method"] = HttpMethod.HEAD.value


class CompleteOptions(ReceiveRoutePlugin):
    """Makes OPTIONS list every method of a path.

    Litestar creates its OPTIONS handler with the first handler of a path and does not add the
    methods of handlers that are registered later.
    """

    __slots__ = ()

    def receive_route(self, route: BaseRoute) -> None:
        """Replace the OPTIONS handler of a route by one for all its handlers."""
        if not isinstance(route, HTTPRoute):
            return
        if HttpMethod.GET in route.methods:
            route.methods.add(HttpMethod.HEAD.value)
        stale, _ = route.route_handler_map[HttpMethod.OPTIONS.value]
        complete = route.create_options_handler(route.path)
        complete.owner = stale.owner
        complete.on_registration(stale.app)
        model = complete.create_kwargs_model(path_parameters=route.path_parameters)
        route.route_handler_map[HttpMethod.OPTIONS.value] = (complete, model)


def create_app(settings: Settings) -> Litestar:
    """Create the application of the ViralFX backend."""
    plugin = OperationsPlugin(OperationsConfig(settings=settings))
    secured = settings.has_api_tokens
    # If these packages are installed, Litestar loads a plugin for each. This application uses
    # msgspec types only, and the gate's middleware records its traces (ADR-0026).
    with hide_packages("attr", "attrs", "opentelemetry", "pydantic"):
        app = Litestar(
            [jobs_router(plugin)],
            plugins=[plugin, CompleteOptions()],
            exception_handlers=problem_handlers(),
            logging_config=None,
            openapi_config=StableOpenAPIConfig(
                title="ViralFX Backend",
                version=plugin.operations.version,
                openapi_router=_document_router(settings, plugin),
                components=COMPONENTS if secured else Components(),
                render_plugins=[ApiDocsPlugin()],
                finish=JobsDocument(lambda: plugin.assembly.jobs, settings.queues).finish,
            ),
        )
    inner = cast("ASGIApp", app.asgi_handler)
    app.asgi_handler = cast("LitestarASGIApp", HeadAsGet(inner))
    return app


def _document_router(settings: Settings, plugin: OperationsPlugin) -> Router:
    """Return the router of the API document, which is as open as the jobs API or details."""
    exposure = max(settings.api_exposure, settings.details_exposure())

    async def require_token(connection: AnyConnection, _: BaseRouteHandler) -> None:
        scope, endpoints = cast("Scope", connection.scope), plugin.endpoints
        if exposure is Exposure.MACHINE and is_on_this_machine(scope):
            return
        # Each holder of a token may know the API. A browser sends the session of the console.
        if endpoints.access.caller(scope["headers"]) is not None:
            return
        console = endpoints.console
        if console is not None and await console.has_session(scope["headers"]):
            return
        if exposure is Exposure.MACHINE:
            endpoints.address_warning.log(peer_of(scope), scope["path"])
        headers = {"WWW-Authenticate": "Bearer"}
        if has_credentials(scope) and not await endpoints.brake.hold(peer_of(scope), "jobs"):
            headers["Connection"] = "close"
        raise NotAuthorizedException(
            "Send a token as a bearer token, or log in to the console first.", headers=headers
        )

    return Router(
        "/api/docs",
        route_handlers=[],
        guards=None if exposure is Exposure.OPEN else [require_token],
        include_in_schema=False,
    )


def create_jobs_api(layer: OperationsLayer) -> ASGIApp:
    """Create an application that serves the jobs API of a layer, and nothing else."""
    app = Litestar(
        [jobs_router(layer)],
        plugins=[CompleteOptions()],
        exception_handlers=problem_handlers(),
        after_exception=[keep_error],
        logging_config=None,
        openapi_config=None,
    )
    return BoundedCaches(HeadAsGet(cast("ASGIApp", app)), lambda: app)
