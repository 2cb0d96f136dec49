"""The routes of operators: changes of jobs, queues and schedules, and their documentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec
from litestar import Controller, Response, Router, get, post
from litestar.exceptions import ClientException
from litestar.openapi.spec import (
    Example,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Reference,
    RequestBody,
    Schema,
)
from litestar.params import FromPath
from litestar.types import ExceptionHandlersMap

from viralfx.core.errors import LedgerUnavailableError
from viralfx.domain.audit import Action, AuditEntry, jobs_in_words
from viralfx.jobs.bulk import BulkCount
from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.model import JobFilter, JobState, KeyConflictError, filter_in_words
from viralfx.jobs.service import MAX_CHANGED
from viralfx.web.jobs import openapi, schemas
from viralfx.web.jobs.openapi import (
    ACCEPTED,
    ALWAYS,
    NO_JSON_TYPE,
    UNKNOWN,
    body_spec,
)
from viralfx.web.jobs.routes import (
    JOBS_API,
    MAX_BODY_BYTES,
    AnyRequest,
    JobsApi,
    JobsController,
    api_of,
    caller_of,
    check_request,
    key_conflict,
    read_body,
    require_any_read,
    require_operate,
    require_operate_job,
    require_read,
    traceparent,
)
from viralfx.web.layer import OperationsLayer
from viralfx.web.problems import (
    JOB_HANDLERS,
    ON_CHANGE,
    ON_QUEUE,
    ledger_unavailable,
    problem_handlers,
)
from viralfx.web.routes import problem_spec

_decode = msgspec.json.Decoder(schemas.FilterRequest).decode


async def read_filter(request: AnyRequest) -> JobFilter:
    """Read the filter of a change of many jobs. Raises an HTTP error for an invalid body."""
    filter_request = await read_body(request, _decode)
    try:
        return filter_request.wanted
    except ValueError as error:
        raise ClientException(f"The body is invalid: {error}.") from None


def _counted(entry: AuditEntry, changed: BulkCount) -> schemas.JobCount:
    entry.detail = jobs_in_words(changed.count, more=changed.more)
    return schemas.job_count(changed)


CANCEL = (
    "A waiting job is cancelled at once (200). Of a running job (202) the worker cancels the task"
    " within two seconds; unless the task completes nevertheless, the job is then cancelled."
)
RUN = (
    "It is due now, also if it waits for its `runAt` or another attempt. Limits of its task and the"
    " pause of its queue still hold it back."
)
_BOUND = f" A request changes at most {MAX_CHANGED} jobs; `more` is true if it ended there."
RETRY_ALL = (
    "The filter has at least one field, and a job must match each. The jobs are retried in steps;"
    f" repeat an interrupted request to continue.{_BOUND}"
)
CANCEL_ALL = (
    "The filter has at least one field, and a job must match each. Waiting jobs are cancelled, and"
    " running ones as by `POST .../{job_id}/cancel`, in steps; repeat an interrupted request to"
    f" continue.{_BOUND}"
)

_ON_BULK_CHANGE: ExceptionHandlersMap = {
    LedgerUnavailableError: ledger_unavailable(
        " Some of the jobs may have been changed: send the request again for the others."
    ),
}
"""The handlers that differ when many jobs are changed."""


@dataclass
class _FilterOperation(Operation):
    """Adds the body of a change of many jobs, which the handler parses."""

    states: ClassVar[Sequence[JobState]] = ()

    def __post_init__(self) -> None:
        """Set the body."""
        schema = Schema(
            type=OpenAPIType.OBJECT,
            title="JobFilter",
            min_properties=1,
            additional_properties=False,
            properties={
                "queue": Schema(type=OpenAPIType.STRING),
                "task": openapi.name_schema(),
                "state": Schema(type=OpenAPIType.STRING, enum=list(map(str, self.states))),
                "code": openapi.name_schema(),
                "before": Schema(
                    description="Jobs that were accepted before a time, or before another job",
                    any_of=[
                        Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.DATE_TIME),
                        Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.UUID),
                    ],
                ),
            },
        )
        value = {"task": "notifications.webhook", "before": "2026-01-07T03:00:00Z"}
        examples: dict[str, Example | Reference] = {
            "for example": Example(summary="Old webhooks", value=value)
        }
        self.request_body = RequestBody(
            required=True,
            content={"application/json": OpenAPIMediaType(schema=schema, examples=examples)},
        )


class RetryAllOperation(_FilterOperation):
    """Retries failed jobs."""

    states = (JobState.FAILED,)


class CancelAllOperation(_FilterOperation):
    """Cancels waiting and active jobs."""

    states = (JobState.WAITING, JobState.ACTIVE)


RETRY_RESPONSES = {
    202: body_spec(schemas.JobAccepted, "The job waits for its next run.", ACCEPTED),
    409: problem_spec("The job has not failed."),
    **NO_JSON_TYPE,
    **UNKNOWN,
    **ALWAYS,
}
RUN_RESPONSES = {
    202: body_spec(schemas.JobAccepted, "The job is due.", ACCEPTED),
    409: problem_spec("The job is not waiting."),
    **NO_JSON_TYPE,
    **UNKNOWN,
    **ALWAYS,
}
STOP_RESPONSES = {
    200: body_spec(
        schemas.JobAccepted, "The job is cancelled.", {**ACCEPTED, "state": "cancelled"}
    ),
    202: body_spec(
        schemas.JobAccepted, "The job runs, and will end.", {**ACCEPTED, "state": "active"}
    ),
    409: problem_spec("The job is final."),
    **NO_JSON_TYPE,
    **UNKNOWN,
    **ALWAYS,
}
BULK_RESPONSES = {
    200: body_spec(schemas.JobCount, "How many jobs were changed.", {"count": 17, "more": False}),
    **ALWAYS,
    400: problem_spec("The body is not JSON, or the filter is invalid or has no field."),
    413: problem_spec("The body is over 64 KiB."),
    **NO_JSON_TYPE,
    422: problem_spec("There is no such queue."),
}


class JobChangesController(Controller):
    """The routes that change jobs."""

    path = schemas.PATH

    @post(
        "/{job_id:str}/cancel",
        operation_id="jobCancel",
        summary="Cancel a job, also a running one",
        description=CANCEL,
        status_code=202,
        request_max_body_size=MAX_BODY_BYTES,
        responses=STOP_RESPONSES,
        exception_handlers=ON_CHANGE,
    )
    async def cancel(
        self, request: AnyRequest, job_id: FromPath[str]
    ) -> Response[schemas.JobAccepted]:
        await require_operate_job(request, job_id)
        api = api_of(request)
        with api.recorded(request, Action.CANCEL, job_id) as entry:
            job = await api.service.cancel(job_id)
            entry.after = str(job.state)
        return Response(schemas.accepted(job), status_code=200 if job.state.final else 202)

    @post(
        "/retry",
        operation_id="jobRetryAll",
        summary="Run all failed jobs that match again",
        description=RETRY_ALL,
        status_code=200,
        request_max_body_size=MAX_BODY_BYTES,
        operation_class=RetryAllOperation,
        responses=BULK_RESPONSES,
        exception_handlers=_ON_BULK_CHANGE,
    )
    async def retry_all(self, request: AnyRequest) -> schemas.JobCount:
        wanted = await read_filter(request)
        require_operate(request, wanted.queue)
        api = api_of(request)
        with api.recorded(request, Action.RETRY_ALL, filter_in_words(wanted)) as entry:
            return _counted(entry, await api.service.retry_all(wanted))

    @post(
        "/cancel",
        operation_id="jobCancelAll",
        summary="Cancel all waiting and running jobs that match",
        description=CANCEL_ALL,
        status_code=200,
        request_max_body_size=MAX_BODY_BYTES,
        operation_class=CancelAllOperation,
        responses=BULK_RESPONSES,
        exception_handlers=_ON_BULK_CHANGE,
    )
    async def cancel_all(self, request: AnyRequest) -> schemas.JobCount:
        wanted = await read_filter(request)
        require_operate(request, wanted.queue)
        api = api_of(request)
        with api.recorded(request, Action.CANCEL_ALL, filter_in_words(wanted)) as entry:
            return _counted(entry, await api.service.cancel_all(wanted))

    @post(
        "/{job_id:str}/retry",
        operation_id="jobRetry",
        summary="Run a failed job again",
        status_code=202,
        request_max_body_size=MAX_BODY_BYTES,
        responses=RETRY_RESPONSES,
        exception_handlers=ON_CHANGE,
    )
    async def retry(self, request: AnyRequest, job_id: FromPath[str]) -> schemas.JobAccepted:
        await require_operate_job(request, job_id)
        api = api_of(request)
        with api.recorded(request, Action.RETRY, job_id) as entry:
            job = await api.service.retry(job_id)
            entry.after = str(job.state)
        return schemas.accepted(job)

    @post(
        "/{job_id:str}/run",
        operation_id="jobRun",
        summary="Run a waiting job now",
        description=RUN,
        status_code=202,
        request_max_body_size=MAX_BODY_BYTES,
        responses=RUN_RESPONSES,
        exception_handlers=ON_CHANGE,
    )
    async def run(self, request: AnyRequest, job_id: FromPath[str]) -> schemas.JobAccepted:
        await require_operate_job(request, job_id)
        api = api_of(request)
        with api.recorded(request, Action.RUN, job_id) as entry:
            job = await api.service.run(job_id)
            entry.after = str(job.state)
        return schemas.accepted(job)


# -- queues --------------------------------------------------------------------------------------

QUEUES_PATH = "/api/v1/queues"


async def _one(api: JobsApi, name: str) -> schemas.Queue:
    counts = (await api.service.queues()).get(name, QueueCounts())
    return schemas.queue_view(name, counts, api.concurrency)


class QueuesController(Controller):
    """The routes of queues."""

    path = QUEUES_PATH
    exception_handlers = ON_QUEUE

    @get(
        "/",
        operation_id="queueList",
        summary="Queues",
        description=openapi.QUEUES,
        responses=openapi.QUEUES_RESPONSES,
    )
    async def all(self, request: AnyRequest) -> schemas.QueueList:
        api = api_of(request)
        require_any_read(request)
        caller = caller_of(request)
        counts = await api.service.queues()
        seen = {name: each for name, each in counts.items() if caller.may_read(name)}
        concurrency = {n: each for n, each in api.concurrency.items() if caller.may_read(n)}
        return schemas.queue_list(seen, concurrency)

    @post(
        "/{queue:str}/pause",
        operation_id="queuePause",
        summary="Pause a queue",
        description=openapi.PAUSE,
        status_code=200,
        request_max_body_size=MAX_BODY_BYTES,
        responses=openapi.QUEUE_RESPONSES,
    )
    async def pause(self, request: AnyRequest, queue: FromPath[str]) -> schemas.Queue:
        require_operate(request, queue)
        api = api_of(request)
        with api.recorded(request, Action.PAUSE_QUEUE, queue) as entry:
            await api.service.pause(queue)
            entry.after = "paused"
        return await _one(api, queue)

    @post(
        "/{queue:str}/resume",
        operation_id="queueResume",
        summary="Resume a queue",
        description=openapi.RESUME,
        status_code=200,
        request_max_body_size=MAX_BODY_BYTES,
        responses=openapi.QUEUE_RESPONSES,
    )
    async def resume(self, request: AnyRequest, queue: FromPath[str]) -> schemas.Queue:
        require_operate(request, queue)
        api = api_of(request)
        with api.recorded(request, Action.RESUME_QUEUE, queue) as entry:
            await api.service.resume(queue)
            entry.after = "running"
        return await _one(api, queue)


# -- schedules -----------------------------------------------------------------------------------


PAUSE_SCHEDULE = "From now on its times are skipped; jobs that were submitted before stay."
RESUME_SCHEDULE = "It runs again from its next time on; the times of the pause stay skipped."
RUN_SCHEDULE = "Submits a job as the schedule does, also while it is paused. Its times stay."
_ON_SCHEDULE: ExceptionHandlersMap = {
    LedgerUnavailableError: ledger_unavailable(
        " The request may have taken effect nevertheless: look at the schedules and jobs first."
    ),
}
_SCHEDULE_ALWAYS = {
    **ALWAYS,
    404: problem_spec("No task of this name has a schedule."),
    413: problem_spec("The body is over 64 KiB."),
    **NO_JSON_TYPE,
}
SCHEDULE_RESPONSES = {
    200: body_spec(schemas.Schedule, "The schedule.", openapi.SCHEDULE),
    **_SCHEDULE_ALWAYS,
}
RUN_SCHEDULE_RESPONSES = {
    202: body_spec(schemas.JobAccepted, "The job is stored and will run.", ACCEPTED),
    200: body_spec(schemas.JobAccepted, "This unique job has not ended yet.", ACCEPTED),
    **_SCHEDULE_ALWAYS,
    422: problem_spec("This process does not know the task."),
}


class SchedulesController(Controller):
    """The routes of schedules."""

    path = schemas.SCHEDULES_PATH

    @get(
        "/",
        operation_id="scheduleList",
        summary="Schedules, with their next times",
        description=openapi.SCHEDULES,
        responses={200: body_spec(schemas.ScheduleList, "All schedules."), **ALWAYS},
    )
    async def schedules(self, request: AnyRequest) -> schemas.ScheduleList:
        """Schedules, with their next times."""
        require_read(request, None)
        return schemas.schedule_list(await api_of(request).service.schedules())

    @post(
        "/{task:str}/pause",
        operation_id="schedulePause",
        summary="Pause a schedule",
        description=PAUSE_SCHEDULE,
        status_code=200,
        request_max_body_size=MAX_BODY_BYTES,
        responses=SCHEDULE_RESPONSES,
        exception_handlers=_ON_SCHEDULE,
    )
    async def pause(self, request: AnyRequest, task: FromPath[str]) -> schemas.Schedule:
        require_operate(request, None)
        api = api_of(request)
        with api.recorded(request, Action.PAUSE_SCHEDULE, task) as entry:
            schedule = await api.service.pause_schedule(task)
            entry.after = "paused"
        return schemas.schedule_view(schedule)

    @post(
        "/{task:str}/resume",
        operation_id="scheduleResume",
        summary="Resume a schedule",
        description=RESUME_SCHEDULE,
        status_code=200,
        request_max_body_size=MAX_BODY_BYTES,
        responses=SCHEDULE_RESPONSES,
        exception_handlers=_ON_SCHEDULE,
    )
    async def resume(self, request: AnyRequest, task: FromPath[str]) -> schemas.Schedule:
        require_operate(request, None)
        api = api_of(request)
        with api.recorded(request, Action.RESUME_SCHEDULE, task) as entry:
            schedule = await api.service.resume_schedule(task)
            entry.after = "running"
        return schemas.schedule_view(schedule)

    @post(
        "/{task:str}/run",
        operation_id="scheduleRun",
        summary="Run the task of a schedule now",
        description=RUN_SCHEDULE,
        status_code=202,
        request_max_body_size=MAX_BODY_BYTES,
        responses=RUN_SCHEDULE_RESPONSES,
        exception_handlers=_ON_SCHEDULE,
    )
    async def run(self, request: AnyRequest, task: FromPath[str]) -> Response[schemas.JobAccepted]:
        require_operate(request, None)
        api = api_of(request)
        with api.recorded(request, Action.RUN_SCHEDULE, task) as entry:
            outcome = await api.service.run_schedule(task, traceparent=traceparent(request))
            entry.detail = f"job {outcome.job.id}"
        body, status = schemas.accepted(outcome.job), 202 if outcome.created else 200
        return Response(body, status_code=status, headers={"Location": body.links.self})


def jobs_router(layer: OperationsLayer) -> Router:
    """Make the routes for the jobs of a layer.

    The document declares that they need the API token, if there is one.
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
        exception_handlers={
            **problem_handlers(),
            **JOB_HANDLERS,
            KeyConflictError: key_conflict,
        },
        tags=["jobs"],
        opt={JOBS_API: JobsApi(layer)},
        security=openapi.SECURITY if layer.settings.has_api_tokens else None,
        include_in_schema=layer.config.include_in_schema,
    )
