"""The OpenAPI document of the jobs API."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    Components,
    Example,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Parameter,
    RequestBody,
    Schema,
    SecurityScheme,
)

from viralfx.bootstrap import JobRuntime
from viralfx.jobs.limits import MAX_ATTEMPTS
from viralfx.jobs.model import MAX_PRIORITY, MIN_PRIORITY, JobState, Unique
from viralfx.jobs.tasks import Task
from viralfx.web.jobs import schemas as views
from viralfx.web.routes import Document, problem_spec

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


def name_schema() -> Schema:
    """Return the schema of the name of a task, or of a code."""
    return Schema(type=OpenAPIType.STRING, min_length=1, max_length=views.MAX_NAME_CHARACTERS)


def _key(*types: OpenAPIType) -> Schema:
    kind = types[0] if len(types) == 1 else list(types)
    return Schema(type=kind, min_length=1, max_length=views.MAX_KEY_CHARACTERS, pattern="^[!-~]+$")


def _job_request(title: str, **more: Schema) -> Schema:
    """Return the schema of a new job."""
    text, null = OpenAPIType.STRING, OpenAPIType.NULL
    return Schema(
        type=OpenAPIType.OBJECT,
        title=title,
        required=["task"],
        additional_properties=False,
        properties={
            "task": name_schema(),
            "payload": Schema(description="JSON that fits the task"),
            "runAt": Schema(
                type=[text, null],
                format=OpenAPIFormat.DATE_TIME,
                description="The earliest time, with a time zone. Null or missing: at once",
            ),
            "priority": Schema(
                type=[OpenAPIType.INTEGER, null],
                minimum=MIN_PRIORITY,
                maximum=MAX_PRIORITY,
                description="A higher number runs first. Null or missing: that of the task",
            ),
            "unique": Schema(
                type=[text, null],
                enum=[*map(str, Unique), None],
                description="How long it keeps a job with the same task and payload from being"
                " accepted: that request returns this job. Null or missing: that of the task",
            ),
            "queue": Schema(
                type=[text, null], description="Null or missing: that of the task", min_length=1
            ),
            "maxAttempts": Schema(
                type=[OpenAPIType.INTEGER, null],
                minimum=1,
                maximum=MAX_ATTEMPTS,
                description="Its most attempts. Null or missing: as the policy of the task decides",
            ),
            **more,
        },
    )


@dataclass
class AcceptOperation(Operation):
    """Adds the body and Idempotency-Key, which the handler parses to keep the payload's bytes."""

    def __post_init__(self) -> None:
        """Set body and parameters."""
        self.request_body = RequestBody(
            required=True,
            content={"application/json": OpenAPIMediaType(schema=_job_request("JobRequest"))},
        )
        key = Parameter(
            name="Idempotency-Key",
            param_in="header",
            description="Identifies the request: one job is accepted for each key. The keys of a"
            " name in TOKENS are its own",
            schema=_key(OpenAPIType.STRING),
        )
        self.parameters = [*(self.parameters or ()), key]


@dataclass
class BatchOperation(Operation):
    """Adds the body, which the handler parses to keep the bytes of the payloads."""

    def __post_init__(self) -> None:
        """Set the body."""
        jobs = Schema(
            type=OpenAPIType.ARRAY,
            items=_job_request("BatchItem", key=_key(OpenAPIType.STRING, OpenAPIType.NULL)),
            min_items=1,
            max_items=views.MAX_BATCH_JOBS,
        )
        schema = Schema(
            type=OpenAPIType.OBJECT,
            title="BatchRequest",
            required=["jobs"],
            additional_properties=False,
            properties={"jobs": jobs},
        )
        self.request_body = RequestBody(
            required=True, content={"application/json": OpenAPIMediaType(schema=schema)}
        )


SECURITY: list[dict[str, list[str]]] = [{"apiToken": []}]
COMPONENTS = Components(
    security_schemes={
        "apiToken": SecurityScheme(
            type="http", scheme="bearer", description="API_TOKEN, or a token of TOKENS"
        )
    }
)

_ID = "01991f3c-5a0e-7c3b-8a52-6f5d7c0e9b11"
_LINKS = {"self": f"{views.PATH}/{_ID}", "events": f"{views.PATH}/{_ID}/events"}
ACCEPTED = {"id": _ID, "queue": "notifications", "state": "waiting", "links": _LINKS}
_SUMMARY = {
    "id": _ID,
    "queue": "notifications",
    "task": "orders.notify",
    "state": "completed",
    "attempts": 1,
    "maxAttempts": None,
    "crashes": 0,
    "error": None,
    "correlationId": "4bf92f3577b34da6a3ce929d0e0e4736",
    "userId": None,
    "priority": 0,
    "idempotencyKey": "order-17",
    "keyOwner": "shop",
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
        "The token lacks the right, or no API token is configured, which production needs, or a"
        " page of another host sent the"
        " request."
    ),
    503: problem_spec("The ledger is unavailable or not migrated, or a key is held; try again."),
}
_NOT_OFFERED = {403: problem_spec(f"{ALWAYS[403].description} Or clients may not submit the task.")}
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
    **_NOT_OFFERED,
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
    **_NOT_OFFERED,
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
    "payload": {"order": 17},
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

_NAME: Document = {"type": "string", "minLength": 1, "maxLength": views.MAX_NAME_CHARACTERS}


class JobsDocument:
    """Adds the configured queues, and the tasks that clients may submit, to the document."""

    def __init__(self, jobs: Callable[[], JobRuntime], queues: Collection[str]) -> None:
        """``jobs`` returns the jobs of the process, whose tasks may not be declared yet."""
        self._jobs = jobs
        self._queues = sorted(queues)
        self._tasks: Sequence[Task] = ()

    def finish(self, document: Document) -> None:
        """Change a finished document in place."""
        runtime = self._jobs()
        runtime.tasks.complete()
        self._codec = runtime.codec
        offered = (task for task in runtime.tasks if task.api)
        self._tasks = sorted(offered, key=lambda task: task.name)
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
        queues = {"type": ["string", "null"], "enum": [*self._queues, None]}
        single, batch = _body_of(paths, ""), _body_of(paths, "/batch")
        for job in (single["schema"], batch["schema"]["properties"]["jobs"]["items"]):
            job["properties"]["queue"] |= queues
            if not self._tasks:  # an enumeration or a choice has at least one member
                job["properties"]["task"] |= {"description": "No task takes jobs of clients here"}
                continue
            names = {"type": "string", "enum": [task.name for task in self._tasks]}
            job["properties"]["task"] = names
            job["oneOf"] = [
                self._variant(task, payload)
                for task, payload in zip(self._tasks, payloads, strict=True)
            ]
        if (task := next(filter(self._takes_null, self._tasks), None)) is not None:
            single["examples"] = _examples(
                at_once={"task": task.name},
                later={"task": task.name, "runAt": "2026-01-07T03:00:00Z"},
            )
            jobs = [{"task": task.name, "key": "order-17"}, {"task": task.name, "priority": -1}]
            batch["examples"] = _examples(two={"jobs": jobs})

    def _payloads(self) -> tuple[list[Document], dict[str, Any]]:
        types = [task.payload_type for task in self._tasks]
        schemas, found = self._codec.schemas(types, "#/components/schemas/Payload.")
        components = {f"Payload.{name}": schema for name, schema in sorted(found.items())}
        return [schema or {} for schema in schemas], components

    def _variant(self, task: Task, payload: Document) -> Document:
        return {
            "title": task.name,
            "required": ["task"] if self._takes_null(task) else ["task", "payload"],
            "properties": {"task": {"const": task.name}, "payload": payload},
        }

    def _takes_null(self, task: Task) -> bool:
        """Return True if the payload may be null, and so may be missing."""
        try:
            self._codec.decode(b"null", task.payload_type)
        except Exception:  # noqa: BLE001 - of the code of the type, which may expect a dict
            return False
        return True


def _body_of(paths: Document, path: str) -> Any:
    return paths[f"{views.PATH}{path}"]["post"]["requestBody"]["content"]["application/json"]


def _examples(**values: Document) -> Document:
    named = {name.replace("_", " "): value for name, value in values.items()}
    return {name: {"summary": name, "value": value} for name, value in named.items()}


def _parameters(operation: Document, **schemas: Document) -> None:
    """Replace schemas of parameters, because Litestar's allow null for optional ones."""
    for parameter in operation["parameters"]:
        if (schema := schemas.get(parameter["name"])) is not None:
            parameter["schema"] = schema
