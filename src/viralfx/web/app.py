"""The service's own application: the operations plugin, problem details and documentation."""

from http import HTTPStatus

from litestar import Litestar, Request, Response
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import ScalarRenderPlugin
from litestar.types import ExceptionHandlersMap

from viralfx.domain.correlation import current_correlation_id
from viralfx.settings import Settings
from viralfx.telemetry.import_guard import without_opentelemetry
from viralfx.web.jobs import jobs_router
from viralfx.web.jobs.documentation import COMPONENTS
from viralfx.web.plugin import OperationsConfig, OperationsPlugin
from viralfx.web.problems import PROBLEM_MEDIA_TYPE, Problem, problem


def create_app(settings: Settings) -> Litestar:
    """Make the ViralFX backend."""
    plugin = OperationsPlugin(OperationsConfig(settings=settings))
    with without_opentelemetry():
        return Litestar(
            [jobs_router()],
            plugins=[plugin],
            exception_handlers=_exception_handlers(),
            logging_config=None,
            openapi_config=OpenAPIConfig(
                title="ViralFX Backend",
                version=plugin.operations.version,
                path="/api/docs",
                components=COMPONENTS,
                render_plugins=[ScalarRenderPlugin()],
            ),
        )


def _exception_handlers() -> ExceptionHandlersMap:
    return {HTTPException: _http_error, Exception: _unhandled}


def _http_error(request: Request[object, object, State], error: HTTPException) -> Response[Problem]:
    if error.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
        return _unhandled(request, error)
    return Response(
        problem(
            error.status_code,
            detail=error.detail,
            correlation_id=current_correlation_id(),
            errors=error.extra if isinstance(error.extra, list) else None,
        ),
        status_code=error.status_code,
        headers=error.headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def _unhandled(_request: Request[object, object, State], _error: Exception) -> Response[Problem]:
    detail = "Something went wrong on our side; the log tells more under the correlation id."
    return Response(
        problem(500, detail=detail, correlation_id=current_correlation_id()),
        status_code=500,
        media_type=PROBLEM_MEDIA_TYPE,
    )
