"""The routes of the jobs API."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

import msgspec
from litestar import Controller, Response, Router, delete, get, post
from litestar.connection import ASGIConnection
from litestar.exceptions import (
    HTTPException,
    NotAuthorizedException,
    PermissionDeniedException,
)
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath, QueryParameter
from litestar.response import ServerSentEvent
from litestar.response.sse import ServerSentEventMessage

from viralfx.domain.jobs.job import Job
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.watch import JobWatch
from viralfx.web.access import Verdict, judge_bearer
from viralfx.web.jobs import documentation, requests, views
from viralfx.web.jobs.errors import HANDLERS, ON_ACCEPT, ON_CHANGE
from viralfx.web.jobs.requests import AnyRequest
from viralfx.web.jobs.views import PATH

JOBS = "jobs_api"
"""Where the application's state holds what these routes use."""

_MOST_LISTED = 100
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsApi:
    """What the routes need."""

    service: JobService
    watch: JobWatch
    token: bytes | None
    """Who calls must have it; None: none is configured."""
    open_without_token: bool
    """Whether everybody may call when none is configured."""


def _guard(
    connection: "ASGIConnection[object, object, object, object]",  # type: ignore[type-var]
    _: BaseRouteHandler,
) -> None:
    api: JobsApi = connection.app.state[JOBS]
    if api.token is None and api.open_without_token:
        return
    verdict = judge_bearer(connection.scope["headers"], api.token)
    if verdict is Verdict.UNAUTHORIZED:
        raise NotAuthorizedException(
            "Send the API token as a bearer token.", headers={"WWW-Authenticate": "Bearer"}
        )
    if verdict is Verdict.FORBIDDEN:
        raise PermissionDeniedException("API_TOKEN is not set, so nobody may do this.")


class JobsController(Controller):
    """Jobs over HTTP."""

    path = "/"

    @post(
        "/",
        operation_id="jobAccept",
        summary="Have a task run",
        description=documentation.ACCEPT,
        status_code=202,
        request_max_body_size=requests.MOST_BYTES,
        operation_class=documentation.AcceptOperation,
        responses=documentation.ACCEPT_RESPONSES,
        exception_handlers=ON_ACCEPT,
    )
    async def accept(self, request: AnyRequest) -> Response[views.JobAccepted]:
        key = requests.idempotency_key(request)
        wanted = await requests.read_request(request)
        outcome = await _api(request).service.accept(
            wanted.task,
            bytes(wanted.payload),
            run_at=wanted.due,
            key=key,
            traceparent=requests.traceparent(request),
        )
        body = views.accepted(outcome.job)
        return Response(
            body,
            status_code=202 if outcome.created else 200,
            headers={"Location": body.links.self},
        )

    @get(
        "/",
        operation_id="jobList",
        summary="Jobs, the newest first",
        description=documentation.LIST,
        responses=documentation.LIST_RESPONSES,
    )
    async def page(
        self,
        request: AnyRequest,
        *,
        queue: Annotated[str | None, QueryParameter(description="Only of this queue")] = None,
        # Not `state`: that name is Litestar's own.
        in_state: Annotated[
            str | None, QueryParameter(name="state", description="Only in this state")
        ] = None,
        correlation_id: Annotated[
            str | None,
            QueryParameter(
                name="correlationId",
                description="Only of this conversation: the correlationId of their log lines",
            ),
        ] = None,
        cursor: Annotated[
            str | None, QueryParameter(description="The nextCursor of the page before")
        ] = None,
        limit: Annotated[
            int, QueryParameter(description="Jobs on a page", ge=1, le=_MOST_LISTED)
        ] = 50,
    ) -> views.JobPage:
        requests.refuse_unknown_parameters(
            request, "queue", "state", "correlationId", "cursor", "limit"
        )
        state, before = requests.state_of(in_state), requests.cursor_of(cursor)
        service = _api(request).service
        if (conversation := requests.correlation_id_of(correlation_id)) is not None:
            found = await service.find(
                conversation, queue=queue, state=state, before=before, limit=limit
            )
            return views.page(found.jobs, found.before)
        jobs = await service.page(queue=queue, state=state, before=before, limit=limit + 1)
        return views.page(jobs[:limit], jobs[limit - 1].id if len(jobs) > limit else None)

    @get(
        "/{job_id:str}",
        operation_id="job",
        summary="One job",
        responses=documentation.ONE_RESPONSES,
    )
    async def one(self, request: AnyRequest, job_id: FromPath[str]) -> views.JobView:
        return views.view(await _api(request).service.get(job_id))

    @delete(
        "/{job_id:str}",
        operation_id="jobCancel",
        summary="Cancel a job that waits",
        responses=documentation.CANCEL_RESPONSES,
        exception_handlers=ON_CHANGE,
    )
    async def cancel(self, request: AnyRequest, job_id: FromPath[str]) -> None:
        await _api(request).service.cancel(job_id)

    @post(
        "/{job_id:str}/retry",
        operation_id="jobRetry",
        summary="Run a failed job again",
        status_code=202,
        request_max_body_size=requests.MOST_BYTES,
        responses=documentation.RETRY_RESPONSES,
        exception_handlers=ON_CHANGE,
    )
    async def retry(self, request: AnyRequest, job_id: FromPath[str]) -> views.JobAccepted:
        return views.accepted(await _api(request).service.retry(job_id))

    @get(
        "/{job_id:str}/events",
        operation_id="jobEvents",
        summary="The progress of one job",
        description=documentation.EVENTS,
        responses=documentation.EVENTS_RESPONSES,
    )
    async def events(self, request: AnyRequest, job_id: FromPath[str]) -> ServerSentEvent:
        api = _api(request)
        if api.watch.full:
            raise HTTPException(
                "Too many clients follow jobs here.",
                status_code=503,
                headers={"Retry-After": "5"},
            )
        job = await api.service.get(job_id)
        return ServerSentEvent(_messages(api.watch, job), headers={"Cache-Control": "no-store"})


async def _messages(watch: JobWatch, job: Job) -> AsyncIterator[ServerSentEventMessage]:
    async for news in watch.follow(job):
        if news is None:
            yield ServerSentEventMessage(data=None, comment="nothing new")
        else:
            yield ServerSentEventMessage(data=_encode(views.summary(news)), event="job")


def _api(request: AnyRequest) -> JobsApi:
    api: JobsApi = request.app.state[JOBS]
    return api


def jobs_router() -> Router:
    """Make the routes; the application's state must hold a :class:`JobsApi`."""
    return Router(
        PATH,
        route_handlers=[JobsController],
        guards=[_guard],
        exception_handlers=HANDLERS,
        tags=["jobs"],
        security=documentation.SECURITY,
    )
