"""The operations endpoints as Litestar routes: for OpenAPI, and for serving without a gate."""

import warnings
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, cast

from litestar import HttpMethod, Request, Response, Router, route
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    Components,
    Example,
    OpenAPI,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    RequestBody,
    Schema,
    SecurityScheme,
)
from litestar.params import PathParameter, QueryParameter
from litestar.routes import BaseRoute, HTTPRoute

from viralfx.server.interface import RawResponse, Receive, Scope
from viralfx.server.problems import PROBLEM_MEDIA_TYPE, Problem
from viralfx.settings import Exposure
from viralfx.telemetry.logging.lines import LEVELS
from viralfx.web import schemas
from viralfx.web.layer import OperationsLayer
from viralfx.web.responses import Deferred, EventStream, complete

MANAGEMENT_TOKEN = "managementToken"
"""The name of the security scheme of the operations endpoints."""

_MANAGEMENT_SCHEME = Components(
    security_schemes={
        MANAGEMENT_TOKEN: SecurityScheme(
            type="http", scheme="bearer", description="MANAGEMENT_TOKEN, or a token of TOKENS"
        )
    }
)

Document = dict[str, Any]


def problem_spec(description: str) -> ResponseSpec:
    """Return the description of an error response."""
    return ResponseSpec(
        Problem, description=description, media_type=PROBLEM_MEDIA_TYPE, generate_examples=False
    )


Finish = Callable[[Document], None]


def _nothing(_: Document) -> None:
    pass


@dataclass
class StableOpenAPI(OpenAPI):
    """An OpenAPI document with sorted paths that ``finish`` completes."""

    finish: Finish = field(default=_nothing)

    @property
    def _exclude_fields(self) -> set[str]:
        return {"finish"}

    def to_schema(self) -> Document:
        """Return the document as served."""
        document = super().to_schema()
        # Litestar iterates over the paths of a handler in the order of a set.
        document["paths"] = dict(sorted(document["paths"].items()))
        self.finish(document)
        return document


@dataclass
class StableOpenAPIConfig(OpenAPIConfig):
    """Creates a :class:`StableOpenAPI`; ``finish`` adds facts that handler types cannot express."""

    finish: Finish = field(default=_nothing)

    def to_openapi_schema(self) -> OpenAPI:
        """Return the document without paths, for Litestar to add them."""
        document = super().to_openapi_schema()
        known = {each.name: getattr(document, each.name) for each in fields(document)}
        return StableOpenAPI(**known, finish=self.finish)


def with_management_token(config: OpenAPIConfig) -> OpenAPIConfig:
    """Return a copy of a configuration that declares the management token as well."""
    return with_components(config, _MANAGEMENT_SCHEME)


def with_components(config: OpenAPIConfig, more: Components) -> OpenAPIConfig:
    """Return a copy of a configuration that has ``more`` components."""
    # Not `dataclasses.replace`, which would validate the application's values, and warn, again.
    declared = copy(config)
    given = config.components
    declared.components = [*(given if isinstance(given, list) else [given]), more]
    return declared


def with_finish(config: OpenAPIConfig, finish: Finish) -> OpenAPIConfig:
    """Return a configuration whose document ``finish`` completes.

    A configuration of another class makes its own document, and stays as it is.
    """
    if type(config) is not OpenAPIConfig:
        return config
    with warnings.catch_warnings():  # the application has seen those about its values
        warnings.simplefilter("ignore")
        given = {each.name: getattr(config, each.name) for each in fields(config)}
        return StableOpenAPIConfig(**given, finish=finish)


_LAYER = "viralfx.layer"
"""The key in ``opt`` of these routes; the value is the layer that they serve.

The state of an application is no place for it: handlers copy, encode and count all of the state.
"""

AnyRequest = Request[object, object, State]


def _body(schema: type, description: str) -> ResponseSpec:
    return ResponseSpec(schema, description=description, generate_examples=False)


_TOKEN_PROBLEMS = {
    401: problem_spec("The management token is missing or wrong."),
    403: problem_spec("No token is configured, or this one lacks the right."),
}
_MALFORMED = {400: problem_spec("The request is malformed.")}
_DETAILS_PROBLEMS = {
    401: problem_spec("Details need the management token here, and it is missing or wrong."),
    403: problem_spec("No token is configured, or this one lacks the right."),
}
_NO_LOGGER = {404: problem_spec("There is no logger with that name.")}


@dataclass
class ChangeOperation(Operation):
    """Adds the request body to the document: the endpoint, not Litestar, parses it."""

    def __post_init__(self) -> None:
        """Set the request body."""
        level = Schema(
            type=[OpenAPIType.STRING, OpenAPIType.NULL],
            enum=[*LEVELS, None],
            description="null: the original level",
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


async def _serve(request: AnyRequest) -> Response[bytes]:
    layer: OperationsLayer = request.route_handler.opt[_LAYER]
    # The raw path, because Litestar ignores a trailing slash and a probe must not.
    raw_path, _, _ = request.scope["raw_path"].partition(b"?")
    path = raw_path.decode("latin-1").removeprefix(request.scope.get("root_path", ""))
    if (below := request.app.path) != "/":
        path = path.removeprefix(below)
    scope = cast("Scope", request.scope)
    endpoints = layer.endpoints.for_caller(scope)
    endpoint, console = endpoints.find(path), endpoints.console
    # The gate serves the console, whose files have no routes.
    if endpoint is None or (console is not None and path in console.endpoints):
        raise NotFoundException
    response = endpoint(request.method, scope["query_string"], scope["headers"])
    if isinstance(response, EventStream | Deferred):  # the gate serves it
        raise NotFoundException
    if not isinstance(response, RawResponse):
        layer.endpoints.note_refusal(response, scope, path)
        response = await complete(response, scope, cast("Receive", request.receive))
    headers = {name.decode(): value.decode() for name, value in response.headers}
    # Litestar adds the encoding to a text itself.
    media_type = headers.pop("content-type").removesuffix("; charset=utf-8")
    headers.pop("content-length")
    return Response(
        response.body, status_code=response.status, headers=headers, media_type=media_type
    )


# The parameters below are declared for routing and for the OpenAPI document. The endpoints read
# them from the path and the query string.


async def _serve_detailed(
    request: AnyRequest,
    fresh: Annotated[
        str | None,
        QueryParameter(description="1 waits for one new round of checks"),
    ] = None,
) -> Response[bytes]:
    del fresh
    return await _serve(request)


async def _serve_check(
    request: AnyRequest,
    check: Annotated[
        str,
        PathParameter(description="As in /health/detailed", examples=[Example(value="database")]),
    ],
) -> Response[bytes]:
    del check
    return await _serve(request)


async def _serve_logger(
    request: AnyRequest,
    name: Annotated[
        str, PathParameter(description="As in /health/loggers", examples=[Example(value="root")])
    ],
) -> Response[bytes]:
    del name
    return await _serve(request)


async def _serve_group(
    request: AnyRequest,
    group: Annotated[str, PathParameter(description="A name of OperationsConfig.groups")],
) -> Response[bytes]:
    del group
    return await _serve(request)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    """One operation of the OpenAPI document."""

    path: str
    method: HttpMethod = HttpMethod.GET
    operation_id: str
    summary: str
    responses: dict[int, ResponseSpec]
    status: int = 200
    """The status of a successful response that is listed first."""
    operation: type[Operation] = Operation
    serve: Callable[..., Awaitable[Response[bytes]]] = _serve

    def handler(self) -> HTTPRouteHandler:
        """Make the Litestar handler."""
        return route(
            self.path,
            http_method=self.method,
            operation_id=self.operation_id,
            operation_class=self.operation,
            summary=self.summary,
            status_code=self.status,
            responses=self.responses,
        )(self.serve)


_PROBES = (
    _Route(
        path="/",
        operation_id="health",
        summary="Quick check for load balancers",
        responses={
            200: _body(schemas.BasicHealth, "The process serves."),
            503: _body(schemas.BasicHealth, "Shutdown began."),
        },
    ),
    _Route(
        path="/live",
        operation_id="healthLive",
        summary="Liveness probe",
        responses={200: _body(schemas.Liveness, "The event loop runs.")},
    ),
    _Route(
        path="/ready",
        operation_id="healthReady",
        summary="Readiness probe",
        responses={
            200: _body(schemas.Readiness, "Ready for traffic."),
            503: _body(schemas.Readiness, "Starting, draining or failing."),
        },
    ),
    _Route(
        path="/startup",
        operation_id="healthStartup",
        summary="Startup probe",
        responses={
            200: _body(schemas.Startup, "Start-up is complete."),
            503: _body(schemas.Startup, "Start-up is not complete."),
        },
    ),
)
"""Routes that never need the token."""

_DETAILS = (
    _Route(
        path="/detailed",
        operation_id="healthDetailed",
        summary="Every check with its details",
        responses={
            200: _body(schemas.DetailedHealth, "Healthy or degraded."),
            503: _body(schemas.DetailedHealth, "Unhealthy: a critical check fails."),
            **_MALFORMED,
            **_DETAILS_PROBLEMS,
        },
        serve=_serve_detailed,
    ),
    _Route(
        path="/info",
        operation_id="healthInfo",
        summary="Version, commit, start, Python and adapters of the process",
        responses={200: _body(schemas.Info, "The process."), **_DETAILS_PROBLEMS},
    ),
    _Route(
        path="/loggers",
        operation_id="loggers",
        summary="Every logger and its level",
        responses={200: _body(schemas.Loggers, "The loggers by name."), **_DETAILS_PROBLEMS},
    ),
    _Route(
        path="/loggers/{name:str}",
        operation_id="logger",
        summary="One logger and its level",
        responses={
            200: _body(schemas.LoggerState, "The logger."),
            **_NO_LOGGER,
            **_MALFORMED,
            **_DETAILS_PROBLEMS,
        },
        serve=_serve_logger,
    ),
    _Route(
        path="/{check:str}",
        operation_id="healthCheck",
        summary="One check",
        responses={
            200: _body(schemas.NamedCheckState, "The check passes or warns."),
            503: _body(schemas.NamedCheckState, "The check fails."),
            404: problem_spec("There is no check with that name."),
            **_MALFORMED,
            **_DETAILS_PROBLEMS,
        },
        serve=_serve_check,
    ),
)
"""Routes that need the token where details are closed: in production, unless opened."""

_GROUP = _Route(
    path="/group/{group:str}",
    operation_id="healthGroup",
    summary="A group of checks",
    responses={
        200: _body(schemas.GroupState, "Each check of the group passes or warns."),
        503: _body(schemas.GroupState, "A check of the group fails."),
        404: problem_spec("There is no group with that name."),
        **_MALFORMED,
        **_DETAILS_PROBLEMS,
    },
    serve=_serve_group,
)
"""A route of an application that has groups; it needs the token as those above do."""

_MANAGEMENT = (
    _Route(
        path="/tasks",
        operation_id="healthTasks",
        summary="Stacks of all threads and asyncio tasks",
        responses={
            200: ResponseSpec(
                str, description="The stacks.", media_type="text/plain", generate_examples=False
            ),
            **_TOKEN_PROBLEMS,
        },
    ),
    _Route(
        path="/shutdown",
        operation_id="healthShutdownStatus",
        summary="Progress of the shutdown; never triggers one",
        responses={
            200: _body(
                schemas.ShutdownStatus, "The phases of the shutdown, which may not have begun."
            ),
            **_TOKEN_PROBLEMS,
        },
    ),
    _Route(
        path="/shutdown",
        method=HttpMethod.POST,
        operation_id="healthShutdown",
        summary="Begin the ordered shutdown",
        status=202,
        responses={
            202: _body(schemas.ShutdownAccepted, "The shutdown began."),
            200: _body(schemas.ShutdownAccepted, "It has begun already."),
            409: problem_spec("This server is not run by `viralfx serve`."),
            **_TOKEN_PROBLEMS,
        },
    ),
    _Route(
        path="/loggers/{name:str}",
        method=HttpMethod.PUT,
        operation_id="loggerChange",
        operation=ChangeOperation,
        summary="Change the level of a logger until the process ends",
        responses={
            200: _body(schemas.LoggerState, "The logger with its new level."),
            400: problem_spec("The body is not a level."),
            408: problem_spec("The body did not arrive in time."),
            413: problem_spec("The body is too large."),
            **_NO_LOGGER,
            **_TOKEN_PROBLEMS,
        },
        serve=_serve_logger,
    ),
)
"""Routes that always need the token."""


def is_operations_route(route: BaseRoute) -> bool:
    """Return True for a route all of whose handlers are those of this module."""
    return isinstance(route, HTTPRoute) and all(
        _LAYER in handler.opt for handler in route.route_handlers
    )


def health_router(layer: OperationsLayer) -> Router:
    """Make the routes of all endpoints of a layer.

    Behind a gate the routes are only documentation. Without a gate the application's guards and
    middleware apply to them. The document declares the management token where they need it.
    """
    config, access = layer.config, layer.endpoints.access
    needed: list[dict[str, list[str]]] = [{MANAGEMENT_TOKEN: []}] if access.has_tokens else []
    for_details = needed if access.details is Exposure.CLOSED else []
    details = (*_DETAILS, _GROUP) if config.groups else _DETAILS
    routes = (*_PROBES, *details, *_MANAGEMENT)
    head = route(
        sorted({each.path for each in routes if each.method is HttpMethod.GET}),
        http_method=HttpMethod.HEAD,
        include_in_schema=False,  # HTTP defines HEAD
    )
    return Router(
        config.path,
        route_handlers=[
            *(each.handler() for each in _PROBES),
            head(_serve),
            Router("/", route_handlers=[r.handler() for r in details], security=for_details),
            Router("/", route_handlers=[r.handler() for r in _MANAGEMENT], security=needed),
        ],
        tags=[config.tag],
        opt={_LAYER: layer},
        include_in_schema=config.include_in_schema,
    )
