"""The OpenAPI document of the jobs API, and its errors as problem details."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.datastructures import State
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    Components,
    Example,
    SecurityScheme,
)
from litestar.types import ExceptionHandlersMap

from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.jobs.batching import KeyHeldError
from viralfx.domain.jobs.codec import PayloadError
from viralfx.domain.jobs.model import (
    InvalidFilterError,
    JobNotFoundError,
    JobState,
    JobStateError,
    KeyConflictError,
    LedgerFullError,
    LedgerUnavailableError,
    NotMigratedError,
    UnknownQueueError,
    UnstorableError,
)
from viralfx.domain.jobs.schedule import UnknownScheduleError
from viralfx.domain.jobs.tasks import Task, UnknownTaskError
from viralfx.web.jobs import schemas as views
from viralfx.web.responses import PROBLEM_MEDIA_TYPE, Problem, problem
from viralfx.web.routes import Document, problem_spec

_RETRY_SOON = {"Retry-After": "1"}
_RETRY_WHEN_FREE = {"Retry-After": "5"}

Handler = Callable[[Request[object, object, State], Exception], Response[Problem]]


def respond(
    status: int,
    detail: str,
    *,
    code: str | None = None,
    errors: list[object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response[Problem]:
    """Return problem details."""
    return Response(
        problem(
            status,
            detail=detail,
            correlation_id=current_correlation_id(),
            code=code,
            errors=errors,
        ),
        status_code=status,
        headers=headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def _message_as_detail(status: int) -> Handler:
    def handle(_: Request[object, object, State], error: Exception) -> Response[Problem]:
        return respond(status, _sentence(str(error)))

    return handle


def _invalid_payload(_: Request[object, object, State], error: Exception) -> Response[Problem]:
    index = getattr(error, "index", None)
    key = "payload" if index is None else f"jobs[{index}].payload"
    what = {"key": key, "message": str(error)}
    return respond(422, "The payload does not fit the task.", errors=[what])


def ledger_unavailable(advice: str) -> Handler:
    """Return the handler of an unavailable ledger; ``advice`` follows the sentence about that."""
    detail = f"The job ledger is unavailable.{advice}"

    def handle(_: Request[object, object, State], error: Exception) -> Response[Problem]:
        code = error.code if isinstance(error, LedgerUnavailableError) else None
        return respond(503, detail, code=code, headers=_RETRY_SOON)

    return handle


def _key_held(_: Request[object, object, State], error: Exception) -> Response[Problem]:
    detail = f"{_sentence(str(error))} Nothing was accepted."
    return respond(503, detail, code="key_held", headers=_RETRY_SOON)


def _not_migrated(_: Request[object, object, State], __: Exception) -> Response[Problem]:
    detail = "The job ledger has no tables yet: run `viralfx migrate`."
    return respond(503, detail, headers=_RETRY_SOON)


def _refused(_: Request[object, object, State], __: Exception) -> Response[Problem]:
    detail = "The job ledger refuses the job because of an error of its own: see the log."
    return respond(503, detail, headers=_RETRY_SOON)


def _full(_: Request[object, object, State], error: Exception) -> Response[Problem]:
    detail = f"{_sentence(str(error))} Nothing was accepted: send the job again later."
    return respond(503, detail, headers=_RETRY_WHEN_FREE)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith("?") else ".")


HANDLERS: ExceptionHandlersMap = {
    JobNotFoundError: _message_as_detail(404),
    JobStateError: _message_as_detail(409),
    KeyConflictError: _message_as_detail(409),
    UnknownTaskError: _message_as_detail(422),
    UnknownQueueError: _message_as_detail(422),
    UnknownScheduleError: _message_as_detail(404),
    InvalidFilterError: _message_as_detail(400),
    PayloadError: _invalid_payload,
    LedgerUnavailableError: ledger_unavailable(""),
    KeyHeldError: _key_held,
    NotMigratedError: _not_migrated,
    LedgerFullError: _full,
    UnstorableError: _refused,
}

ON_ACCEPT: ExceptionHandlersMap = {
    LedgerUnavailableError: ledger_unavailable(
        " The job may have been accepted nevertheless: send it again with the same Idempotency-Key."
    ),
}
"""The handlers that differ when a job is accepted."""

ON_BATCH: ExceptionHandlersMap = {
    LedgerUnavailableError: ledger_unavailable(
        " The jobs may have been accepted nevertheless: send them again, each with the same key."
    ),
}
"""The handlers that differ when a batch is accepted."""

ON_CHANGE: ExceptionHandlersMap = {
    LedgerUnavailableError: ledger_unavailable(
        " The change may have been made nevertheless: read the job before you try again."
    ),
}
"""The handlers that differ when an existing job is changed."""


ON_QUEUE: ExceptionHandlersMap = {
    UnknownQueueError: _message_as_detail(404),
    LedgerUnavailableError: ledger_unavailable(
        " The queue may have been changed nevertheless: send the request again."
    ),
}
"""The handlers that differ for queues."""


ACCEPT = (
    "The response comes after the job is stored durably; then it runs even if processes die. A"
    " repeated Idempotency-Key returns the job that it created. The key is not kept if a unique job"
    " with the same task and payload is returned instead."
)
BATCH = (
    f"From 1 to {views.MAX_BATCH_JOBS} jobs, which are accepted together in one transaction. If one"
    " of them is refused, none is accepted, and the problem has its position, counted from 0. A"
    " repeated `key` returns the job that has it."
)
LIST = (
    "With `correlationId`, `task` or `code` each request searches a limited number of jobs. Its"
    " page may have fewer"
    " jobs than `limit`, or none, and a `nextCursor` with which to search older jobs."
)
EVENTS = (
    "Server-sent events named `job`, each with the job as in a list: one immediately, and one for"
    " each change until the job is final. The event `shutdown` means that this instance stops:"
    " connect again."
)
SCHEDULES = (
    "The tasks with a cron expression, by task. The workers run each of their times once;"
    " `lastRunAt` is null before the first one."
)

QUEUES = "All queues that are configured, have had a job, have a worker or are paused."
PAUSE = (
    "From now on, workers claim no job of this queue; running jobs go on, and jobs are accepted. To"
    " drain the queue, pause it and wait until `counts.active` is 0."
)
RESUME = "Workers claim its jobs again."

SECURITY: list[dict[str, list[str]]] = [{"apiToken": []}]
COMPONENTS = Components(
    security_schemes={
        "apiToken": SecurityScheme(
            type="http", scheme="bearer", description="The value of API_TOKEN"
        )
    }
)

_ID = "01991f3c-5a0e-7c3b-8a52-6f5d7c0e9b11"
_LINKS = {"self": f"{views.PATH}/{_ID}", "events": f"{views.PATH}/{_ID}/events"}
ACCEPTED = {"id": _ID, "queue": "notifications", "state": "waiting", "links": _LINKS}
_SUMMARY = {
    "id": _ID,
    "queue": "notifications",
    "task": "notifications.webhook",
    "state": "completed",
    "attempts": 1,
    "maxAttempts": None,
    "crashes": 0,
    "error": None,
    "correlationId": "4bf92f3577b34da6a3ce929d0e0e4736",
    "userId": None,
    "priority": 0,
    "idempotencyKey": "order-17",
    "createdAt": "2026-01-06T12:00:00.000Z",
    "runAt": "2026-01-06T12:00:00.000Z",
    "startedAt": "2026-01-06T12:00:00.012Z",
    "finishedAt": "2026-01-06T12:00:00.148Z",
    "worker": None,
    "cancelRequested": False,
    "progress": {"current": 3, "total": 3, "message": "sent"},
    "links": _LINKS,
}
_FAILURES = [
    {
        "number": 1,
        "startedAt": "2026-01-06T12:00:00.012Z",
        "endedAt": "2026-01-06T12:00:05.148Z",
        "worker": "worker-7d4b9-1-5e884898",
        "code": "timeout",
        "message": "the deadline of 5 s has passed",
        "traceback": None,
    }
]


def body_spec(kind: type, description: str, value: object = None) -> ResponseSpec:
    """Return the documentation of a response with a body, and an example of it."""
    examples = [] if value is None else [Example(summary="for example", value=value)]
    return ResponseSpec(
        kind, description=description, generate_examples=False, examples=examples or None
    )


ALWAYS = {
    400: problem_spec("The request is malformed."),
    401: problem_spec("The API token is missing or wrong."),
    403: problem_spec(
        "No API token is configured, which production needs, or a page of another host sent the"
        " request."
    ),
    503: problem_spec("The ledger is unavailable or not migrated, or a key is held; try again."),
}
UNKNOWN = {404: problem_spec("There is no such job.")}
NO_JSON_TYPE = {415: problem_spec("The Content-Type is not application/json.")}

ACCEPT_RESPONSES = {
    202: body_spec(views.JobAccepted, "Accepted: the job is stored and will run.", ACCEPTED),
    200: body_spec(
        views.JobAccepted,
        "The Idempotency-Key belongs to this job already, or the job is unique and has not ended.",
        ACCEPTED,
    ),
    **ALWAYS,
    400: problem_spec(
        "The body is not JSON or has other fields, or the Idempotency-Key is invalid."
    ),
    409: problem_spec("The Idempotency-Key belongs to a different request."),
    413: problem_spec("The body is over 64 KiB."),
    **NO_JSON_TYPE,
    422: problem_spec("There is no such task or queue, or the payload does not fit the task."),
}
BATCH_RESPONSES = {
    202: body_spec(
        views.JobsAccepted,
        "Accepted: the jobs are stored and will run.",
        {"jobs": [{**ACCEPTED, "created": True}]},
    ),
    **ALWAYS,
    400: problem_spec(
        "The body is not JSON or has other fields, or there is an Idempotency-Key header."
    ),
    409: problem_spec("The key of a job belongs to a different request."),
    413: problem_spec("The body is over 4 MiB."),
    **NO_JSON_TYPE,
    422: problem_spec("There is no such task or queue, or a payload does not fit its task."),
}
LIST_RESPONSES = {
    **ALWAYS,
    200: body_spec(views.JobPage, "One page of jobs."),
    400: problem_spec("A parameter is invalid or unknown."),
    422: problem_spec("There is no such queue."),
}
ONE_RESPONSES = {
    200: body_spec(views.JobView, "The job."),
    **UNKNOWN,
    **ALWAYS,
}
CANCEL_RESPONSES = {
    409: problem_spec("The job is not waiting."),
    **UNKNOWN,
    **ALWAYS,
}
EVENTS_RESPONSES = {
    200: ResponseSpec(
        str, description="The events.", media_type="text/event-stream", generate_examples=False
    ),
    **UNKNOWN,
    **ALWAYS,
}

QUEUES_RESPONSES = dict(ALWAYS)
QUEUE_RESPONSES = {
    **ALWAYS,
    404: problem_spec("There is no such queue."),
    413: problem_spec("The body is over 64 KiB."),
    **NO_JSON_TYPE,
}

_EVENT = {
    "type": "object",
    "title": "JobEvent",
    "description": "The fields of one event",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["job", "shutdown"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/JobSummary"},
            "description": "Of `job`: the job as in a list",
        },
    },
}

_JOB = {
    **_SUMMARY,
    "payload": views.EXAMPLE_PAYLOAD,
    "result": {"status": 204},
    "failures": _FAILURES,
}
SCHEDULE = {
    "task": "default.prune",
    "cron": "0 * * * *",
    "timezone": "UTC",
    "paused": False,
    "lastRunAt": "2026-01-06T12:00:00.000Z",
    "nextRunAt": "2026-01-06T13:00:00.000Z",
    "nextRuns": ["2026-01-06T13:00:00.000Z", "2026-01-06T14:00:00.000Z"],
}
# Set in the finished document, because Litestar omits null values.
_EXAMPLES = {
    views.PATH: {"items": [_SUMMARY], "nextCursor": None},
    f"{views.PATH}/{{job_id}}": _JOB,
    views.SCHEDULES_PATH: {"items": [SCHEDULE]},
}

_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_LAST_LABEL = "[A-Za-z]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_WEBHOOK_URL = (
    rf"^[Hh][Tt][Tt][Pp][Ss]?://({_LABEL}\.){{0,8}}{_LAST_LABEL}(:({_PORT}))?"
    r"(/[!-\"$->@-\[\]-~]*)?(\?[!-\"$-\[\]-~]*)?$"
)
_WEBHOOK = {
    "type": "object",
    "description": "Either a url, or alert: true, which sends it to ALERT_WEBHOOK_URL.",
    "required": ["type", "data"],
    "properties": {
        "type": {"type": "string", "minLength": 1, "description": "Such as order.shipped"},
        "data": {"type": "object"},
    },
    "oneOf": [
        {
            "required": ["url"],
            "properties": {
                "url": {
                    "type": "string",
                    "maxLength": 2048,
                    "pattern": _WEBHOOK_URL,
                    "description": "With a host name, or an IP address in canonical form",
                },
                "alert": {"const": False},
            },
        },
        {
            "required": ["alert"],
            "properties": {"alert": {"const": True}, "url": {"type": "null"}},
        },
    ],
}
_NAME: Document = {"type": "string", "minLength": 1, "maxLength": views.MAX_NAME_CHARACTERS}
_PAYLOADS: dict[str, Document] = {"notifications.webhook": _WEBHOOK}
"""Schemas of payloads that are validated beyond their type."""


class JobsDocument:
    """Adds the configured queues and the declared tasks to the document."""

    def __init__(self, tasks: Iterable[Task], queues: Collection[str]) -> None:
        self._tasks = sorted(tasks, key=lambda task: task.name)
        self._queues = sorted(queues)

    def finish(self, document: Document) -> None:
        """Change a finished document in place."""
        paths = document["paths"]
        for path, value in _EXAMPLES.items():
            response = paths[path]["get"]["responses"]["200"]["content"]["application/json"]
            response["examples"] = {"for example": {"summary": "for example", "value": value}}
        _parameters(
            paths[views.PATH]["get"],
            queue={"type": "string", "enum": self._queues},
            state={"type": "string", "enum": [str(state) for state in JobState]},
            task=_NAME,
            code=_NAME,
            correlationId={"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
            cursor={"type": "string", "format": "uuid"},
        )
        for path, item in paths.items():
            if path.startswith(f"{views.PATH}/{{job_id}}"):
                for operation in item.values():
                    _parameters(operation, job_id={"type": "string", "format": "uuid"})
        events = paths[f"{views.PATH}/{{job_id}}/events"]["get"]["responses"]["200"]
        events["content"] = {"text/event-stream": {"schema": _EVENT}}
        for change in ("retry", "cancel"):
            body = paths[f"{views.PATH}/{change}"]["post"]["requestBody"]
            fields = body["content"]["application/json"]["schema"]["properties"]
            fields["queue"] = {"type": "string", "enum": self._queues}
        payloads, components = self._payloads()
        document["components"]["schemas"].update(components)
        names = {"type": "string", "enum": [task.name for task in self._tasks]}
        queues = {"type": ["string", "null"], "enum": [*self._queues, None]}
        variants = [
            _variant(task, payload) for task, payload in zip(self._tasks, payloads, strict=True)
        ]
        for job in (_body_of(paths, ""), _body_of(paths, "/batch")["properties"]["jobs"]["items"]):
            job["properties"]["task"] = names
            job["properties"]["queue"] |= queues
            job["oneOf"] = variants

    def _payloads(self) -> tuple[list[Document], dict[str, Any]]:
        template = "#/components/schemas/Payload.{name}"
        typed = [task for task in self._tasks if _has_schema(task)]
        schemas, found = msgspec.json.schema_components(
            [task.payload_type for task in typed], schema_hook=_anything, ref_template=template
        )
        known = {task.name: schema for task, schema in zip(typed, schemas, strict=True)} | _PAYLOADS
        components = {f"Payload.{name}": schema for name, schema in sorted(found.items())}
        return [known.get(task.name, {}) for task in self._tasks], components


def _body_of(paths: Document, path: str) -> Any:
    post = paths[f"{views.PATH}{path}"]["post"]
    return post["requestBody"]["content"]["application/json"]["schema"]


def _parameters(operation: Document, **schemas: Document) -> None:
    """Replace schemas of parameters, because Litestar's allow null for optional ones."""
    for parameter in operation["parameters"]:
        if (schema := schemas.get(parameter["name"])) is not None:
            parameter["schema"] = schema


def _variant(task: Task, payload: Document) -> Document:
    return {
        "title": task.name,
        "required": ["task"] if _takes_null(task) else ["task", "payload"],
        "properties": {"task": {"const": task.name}, "payload": payload},
    }


def _takes_null(task: Task) -> bool:
    """Return True if the payload may be null, and so may be missing."""
    try:
        msgspec.json.decode(b"null", type=task.payload_type)
    except msgspec.ValidationError:
        return False
    return True


def _has_schema(task: Task) -> bool:
    try:
        msgspec.json.schema_components([task.payload_type], schema_hook=_anything)
    except TypeError:
        return False
    return task.name not in _PAYLOADS


def _anything(type_: type) -> Document:
    """Return the schema of ``object``: any JSON. Raises ``NotImplementedError`` for other types."""
    if type_ is object:
        return {"description": "Any JSON"}
    raise NotImplementedError
