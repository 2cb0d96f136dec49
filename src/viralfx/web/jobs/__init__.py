"""The jobs API: accepts, finds, lists, retries, cancels and follows jobs over HTTP."""

from litestar import Router

from viralfx.web.jobs import openapi
from viralfx.web.jobs.changes import JobChangesController, QueuesController, SchedulesController
from viralfx.web.jobs.routes import JOBS, JobsApi, JobsController, check_request
from viralfx.web.problems import problem_handlers

__all__ = ["JOBS", "JobsApi", "jobs_router"]


def jobs_router(*, secured: bool = False, include_in_schema: bool = True) -> Router:
    """Make the routes. The application's state must hold a :class:`JobsApi`.

    If ``secured``, the document declares that they need the API token.
    """
    return Router(
        "/",
        route_handlers=[
            JobsController,
            JobChangesController,
            QueuesController,
            SchedulesController,
        ],
        before_request=check_request,
        exception_handlers={**problem_handlers(), **openapi.HANDLERS},
        tags=["jobs"],
        security=openapi.SECURITY if secured else None,
        include_in_schema=include_in_schema,
    )
