"""What the OpenAPI document says of the jobs API beyond its types."""

from dataclasses import dataclass

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    Components,
    Example,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
    SecurityScheme,
)

from viralfx.web.jobs import views
from viralfx.web.problems import PROBLEM_MEDIA_TYPE, Problem

ACCEPT = (
    "Answers only when the job is kept durably; then it will be run, whatever dies. The same"
    " Idempotency-Key again gives the same job."
)
LIST = (
    "With `correlationId` one answer looks at a bounded number of jobs. So its page may have fewer"
    " than `limit`, or none, and a `nextCursor` all the same: older jobs are still to be looked at."
)
EVENTS = (
    "Server-sent events named `job`, each with the job as in a list: now, and at each change"
    " until the job is final. The event `shutdown` comes when this instance stops; connect again."
)

SECURITY: list[dict[str, list[str]]] = [{"apiToken": []}]
COMPONENTS = Components(
    security_schemes={
        "apiToken": SecurityScheme(
            type="http", scheme="bearer", description="API_TOKEN, where one is configured"
        )
    }
)

_ID = "01991f3c-5a0e-7c3b-8a52-6f5d7c0e9b11"
_LINKS = {"self": f"{views.PATH}/{_ID}", "events": f"{views.PATH}/{_ID}/events"}
_ACCEPTED = {"id": _ID, "queue": "notifications", "state": "waiting", "links": _LINKS}
_PAYLOAD = {"url": "https://hooks.example.com/orders", "data": {"order": 17}}
_SUMMARY = {
    "id": _ID,
    "queue": "notifications",
    "task": "notifications.webhook",
    "state": "completed",
    "attempts": 1,
    "crashes": 0,
    "error": None,
    "correlationId": "4bf92f3577b34da6a3ce929d0e0e4736",
    "idempotencyKey": "order-17",
    "createdAt": "2026-01-06T12:00:00.000Z",
    "runAt": "2026-01-06T12:00:00.000Z",
    "startedAt": "2026-01-06T12:00:00.012Z",
    "finishedAt": "2026-01-06T12:00:00.148Z",
    "worker": None,
    "links": _LINKS,
}


@dataclass
class AcceptOperation(Operation):
    """Describes the body, which the handler reads itself: the payload is kept as it came."""

    def __post_init__(self) -> None:
        """Add it."""
        text, anything = OpenAPIType.STRING, Schema(description="Any JSON that fits the task")
        schema = Schema(
            type=OpenAPIType.OBJECT,
            title="JobRequest",
            required=["task"],
            additional_properties=False,
            properties={
                "task": Schema(type=text, min_length=1, max_length=200),
                "payload": anything,
                "runAt": Schema(
                    type=text,
                    format=OpenAPIFormat.DATE_TIME,
                    description="Not before then; with a time zone. Left out: at once",
                ),
            },
        )
        examples: dict[str, Example | Reference] = {
            "at once": Example(
                summary="A webhook, at once",
                value={"task": "notifications.webhook", "payload": _PAYLOAD},
            ),
            "later": Example(
                summary="A clean-up at a given time",
                value={"task": "default.prune", "payload": {}, "runAt": "2026-01-07T03:00:00Z"},
            ),
        }
        self.request_body = RequestBody(
            required=True,
            content={"application/json": OpenAPIMediaType(schema=schema, examples=examples)},
        )
        key = Parameter(
            name="Idempotency-Key",
            param_in="header",
            description="Names what is asked for: one job is accepted under it",
            schema=Schema(type=text, min_length=1, max_length=255, pattern="^[!-~]+$"),
        )
        self.parameters = [*(self.parameters or ()), key]


def _body(kind: type, description: str, value: object = None) -> ResponseSpec:
    examples = [] if value is None else [Example(summary="for example", value=value)]
    return ResponseSpec(
        kind, description=description, generate_examples=False, examples=examples or None
    )


def _problem(description: str) -> ResponseSpec:
    return ResponseSpec(
        Problem, description=description, media_type=PROBLEM_MEDIA_TYPE, generate_examples=False
    )


_ALWAYS = {
    401: _problem("The API token is missing or wrong."),
    403: _problem("No API token is configured, and production needs one."),
    503: _problem("The ledger cannot be reached, or was not migrated; try again."),
}
_UNKNOWN = {404: _problem("There is no such job.")}

ACCEPT_RESPONSES = {
    202: _body(views.JobAccepted, "Accepted: it is kept and will be run.", _ACCEPTED),
    200: _body(views.JobAccepted, "The Idempotency-Key had this job already.", _ACCEPTED),
    400: _problem("The body is no JSON or has other fields, or the Idempotency-Key cannot be."),
    409: _problem("The Idempotency-Key was used for something else."),
    413: _problem("The body is over 64 KiB."),
    415: _problem("The body is not declared as JSON."),
    422: _problem("There is no such task, or the payload does not fit it."),
    **_ALWAYS,
}
LIST_RESPONSES = {
    200: _body(views.JobPage, "One page of jobs.", {"items": [_SUMMARY], "nextCursor": None}),
    400: _problem("A parameter is wrong, or there is none of that name."),
    422: _problem("There is no such queue."),
    **_ALWAYS,
}
ONE_RESPONSES = {
    200: _body(
        views.JobView, "The job.", {**_SUMMARY, "payload": _PAYLOAD, "result": {"status": 204}}
    ),
    **_UNKNOWN,
    **_ALWAYS,
}
RETRY_RESPONSES = {
    202: _body(views.JobAccepted, "It waits to be run again.", _ACCEPTED),
    409: _problem("It has not failed."),
    **_UNKNOWN,
    **_ALWAYS,
}
CANCEL_RESPONSES = {
    409: _problem("It does not wait."),
    **_UNKNOWN,
    **_ALWAYS,
}
EVENTS_RESPONSES = {**_UNKNOWN, **_ALWAYS}
