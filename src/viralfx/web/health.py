"""The operations endpoints as Litestar routes: documented, and served where no gate stands."""

from dataclasses import dataclass
from typing import Annotated, cast

from litestar import Controller, HttpMethod, Request, Response, Router, get, post, put, route
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    RequestBody,
    Schema,
)
from litestar.params import FromPath, QueryParameter
from litestar.routes import BaseRoute, HTTPRoute

from viralfx.telemetry.log_levels import LEVELS
from viralfx.web import schemas
from viralfx.web.answers import OperationsAnswers
from viralfx.web.asgi import Receive, Scope
from viralfx.web.problems import PROBLEM_MEDIA_TYPE, Problem
from viralfx.web.replies import Answer, complete

ANSWERS = "operations_answers"
"""Where the application's state holds what these routes give."""

_OURS = "viralfx.operations"
"""The key in ``opt`` by which these routes are told from the application's."""

AnyRequest = Request[object, object, State]


def _problem(description: str) -> ResponseSpec:
    return ResponseSpec(
        Problem, description=description, media_type=PROBLEM_MEDIA_TYPE, generate_examples=False
    )


def _body(schema: type, description: str) -> ResponseSpec:
    return ResponseSpec(schema, description=description, generate_examples=False)


_TOKEN_PROBLEMS = {
    401: _problem("The management token is missing or wrong."),
    403: _problem("No management token is configured."),
}
_DETAILS_PROBLEMS = {
    401: _problem("HEALTH_DETAILS=authorized, and the management token is missing or wrong.")
}
_NO_LOGGER = {404: _problem("There is no logger of that name.")}


@dataclass
class ChangeOperation(Operation):
    """Describes the body, which is read as the gate reads it."""

    def __post_init__(self) -> None:
        """Add it."""
        level = Schema(
            type=[OpenAPIType.STRING, OpenAPIType.NULL],
            enum=[*LEVELS, None],
            description="null: what it was before all changes",
        )
        schema = Schema(
            type=OpenAPIType.OBJECT,
            title="NewLevel",
            required=["level"],
            additional_properties=False,
            properties={"level": level},
        )
        content = {"application/json": OpenAPIMediaType(schema=schema)}
        self.request_body = RequestBody(required=True, content=content)


def _response(answer: Answer) -> Response[bytes]:
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    media_type = headers.pop("content-type")
    headers.pop("content-length")
    return Response(answer.body, status_code=answer.status, headers=headers, media_type=media_type)


class HealthController(Controller):
    """Probes and details.

    Behind a gate they are never reached; without one the application's own guards and middleware
    apply to them.
    """

    path = "/"

    @get(
        "/",
        operation_id="health",
        summary="Quick check for load balancers",
        responses={
            200: _body(schemas.BasicHealth, "The process serves."),
            503: _body(schemas.BasicHealth, "Shutdown began."),
        },
    )
    async def basic(self, request: AnyRequest) -> Response[bytes]:
        return await _give(request)

    @get(
        "/live",
        operation_id="healthLive",
        summary="Liveness probe",
        responses={200: _body(schemas.Liveness, "The event loop runs.")},
    )
    async def live(self, request: AnyRequest) -> Response[bytes]:
        return await _give(request)

    @get(
        "/ready",
        operation_id="healthReady",
        summary="Readiness probe",
        responses={
            200: _body(schemas.Readiness, "Traffic may come."),
            503: _body(schemas.Readiness, "Starting, draining or failing."),
        },
    )
    async def ready(self, request: AnyRequest) -> Response[bytes]:
        return await _give(request)

    @get(
        "/startup",
        operation_id="healthStartup",
        summary="Startup probe",
        responses={
            200: _body(schemas.Startup, "Start-up is over."),
            503: _body(schemas.Startup, "Start-up goes on."),
        },
    )
    async def startup(self, request: AnyRequest) -> Response[bytes]:
        return await _give(request)

    @get(
        "/detailed",
        operation_id="healthDetailed",
        summary="Every check with its details",
        responses={
            200: _body(schemas.DetailedHealth, "Healthy or degraded."),
            503: _body(schemas.DetailedHealth, "Unhealthy: a critical check fails."),
            **_DETAILS_PROBLEMS,
        },
    )
    async def detailed(
        self,
        request: AnyRequest,
        fresh: Annotated[
            str | None,
            QueryParameter(description="1 waits for one new round of checks, then answers"),
        ] = None,
    ) -> Response[bytes]:
        del fresh  # read from the query string; declared for the documentation
        return await _give(request)

    @get(
        "/shutdown",
        operation_id="healthShutdownStatus",
        summary="How far the shutdown is; never triggers one",
        responses={
            200: _body(schemas.ShutdownStatus, "The shutdown, or that there is none."),
            **_TOKEN_PROBLEMS,
        },
    )
    async def shutdown_status(self, request: AnyRequest) -> Response[bytes]:
        return await _give(request)

    @post(
        "/shutdown",
        operation_id="healthShutdown",
        summary="Begin the ordered shutdown",
        status_code=202,
        responses={
            202: _body(schemas.ShutdownAccepted, "The shutdown began."),
            200: _body(schemas.ShutdownAccepted, "It had begun already."),
            409: _problem("This server is not run by `viralfx serve`."),
            **_TOKEN_PROBLEMS,
        },
    )
    async def shutdown(self, request: AnyRequest) -> Response[bytes]:
        return await _give(request)

    @get(
        "/loggers",
        operation_id="loggers",
        summary="Every logger and its level",
        responses={200: _body(schemas.Loggers, "The loggers by name."), **_DETAILS_PROBLEMS},
    )
    async def loggers(self, request: AnyRequest) -> Response[bytes]:
        return await _give(request)

    @get(
        "/loggers/{name:str}",
        operation_id="logger",
        summary="One logger and its level",
        responses={
            200: _body(schemas.LoggerState, "The logger."),
            **_NO_LOGGER,
            **_DETAILS_PROBLEMS,
        },
    )
    async def logger(self, request: AnyRequest, name: FromPath[str]) -> Response[bytes]:
        del name  # as for a check
        return await _give(request)

    @put(
        "/loggers/{name:str}",
        operation_id="loggerChange",
        operation_class=ChangeOperation,
        summary="Change the level of a logger until the process ends",
        responses={
            200: _body(schemas.LoggerState, "The level is changed."),
            400: _problem("The body is not a level."),
            408: _problem("The body did not come in time."),
            413: _problem("The body is longer than any level."),
            **_NO_LOGGER,
            **_TOKEN_PROBLEMS,
        },
    )
    async def change_logger(self, request: AnyRequest, name: FromPath[str]) -> Response[bytes]:
        del name  # likewise
        return await _give(request)

    @get(
        "/{check:str}",
        operation_id="healthCheck",
        summary="One check",
        responses={
            200: _body(schemas.NamedCheckState, "The check passes or warns."),
            503: _body(schemas.NamedCheckState, "The check fails."),
            404: _problem("There is no check of that name."),
            **_DETAILS_PROBLEMS,
        },
    )
    async def check(self, request: AnyRequest, check: FromPath[str]) -> Response[bytes]:
        del check  # read from the path; declared for routing and documentation
        return await _give(request)

    @route(
        [
            "/",
            "/live",
            "/ready",
            "/startup",
            "/detailed",
            "/shutdown",
            "/loggers",
            "/loggers/{name:str}",
            "/{check:str}",
        ],
        http_method=HttpMethod.HEAD,
        include_in_schema=False,  # HTTP itself says what HEAD is
    )
    async def head(self, request: AnyRequest) -> Response[bytes]:
        return await _give(request)


async def _give(request: AnyRequest) -> Response[bytes]:
    answers: OperationsAnswers = request.app.state[ANSWERS]
    # The path as the client wrote it: Litestar ignores a trailing slash, a probe must not.
    raw_path, _, _ = request.scope["raw_path"].partition(b"?")
    path = raw_path.decode("latin-1").removeprefix(request.scope.get("root_path", ""))
    endpoint = answers.find(path)
    if endpoint is None:
        raise NotFoundException
    answer = endpoint(request.method, request.scope["query_string"], request.scope["headers"])
    if not isinstance(answer, Answer):
        answer = await complete(
            answer, cast("Scope", request.scope), cast("Receive", request.receive)
        )
    return _response(answer)


def is_ours(route: BaseRoute) -> bool:
    """Tell whether a route is one of these alone."""
    return isinstance(route, HTTPRoute) and all(
        _OURS in handler.opt for handler in route.route_handlers
    )


def health_router(*, prefix: str, tag: str) -> Router:
    """Make the routes of every endpoint; the application's state must hold the answers."""
    return Router(prefix, route_handlers=[HealthController], tags=[tag], opt={_OURS: True})
