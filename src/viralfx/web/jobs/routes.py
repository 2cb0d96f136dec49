"""The routes of the jobs API, and the parsing of their requests."""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Any, NoReturn, TypeVar, cast

import msgspec
from litestar import Controller, HttpMethod, Litestar, Request, Response, delete, get, post
from litestar.datastructures import State
from litestar.exceptions import (
    ClientException,
    HTTPException,
    NotAuthorizedException,
    PermissionDeniedException,
)
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.params import FromPath, QueryParameter
from litestar.response import ServerSentEvent
from litestar.response.base import ASGIResponse
from litestar.response.sse import ServerSentEventMessage
from litestar.types import Message
from litestar.types import Send as LitestarSend

from viralfx.core.correlation import is_correlation_id, is_traceparent
from viralfx.core.ids import canonical_job_id
from viralfx.core.keys import NamedKey
from viralfx.domain.access import ANONYMOUS, Principal
from viralfx.domain.audit import Action, AuditEntry
from viralfx.jobs.codec import MAX_NESTING_LEVELS, is_too_deep
from viralfx.jobs.follower import JobFollower
from viralfx.jobs.model import Job, JobFilter, JobState, KeyConflictError
from viralfx.jobs.service import JobService
from viralfx.jobs.submission import Submission, about
from viralfx.jobs.tasks import TaskRegistry
from viralfx.server.interface import Scope
from viralfx.server.problems import Problem
from viralfx.settings import Exposure
from viralfx.settings.tokens import API
from viralfx.web.auth import CHANGING, Headers, is_cross_origin
from viralfx.web.client_address import is_on_this_machine
from viralfx.web.jobs import openapi, schemas
from viralfx.web.jobs.offers import NOT_OFFERED, is_offered
from viralfx.web.jobs.schemas import (
    MAX_KEY_CHARACTERS,
    MAX_NAME_CHARACTERS,
    PATH,
    BatchRequest,
    JobRequest,
)
from viralfx.web.layer import OperationsLayer
from viralfx.web.problems import ON_ACCEPT, ON_BATCH, ON_CHANGE, respond, sentence
from viralfx.web.responses import has_credentials, peer_of

MAX_BODY_BYTES = 64 * 1024
"""Maximum size of a request body."""
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Maximum size of the body of a batch."""
MAX_QUERY_FIELDS = 100
"""Maximum number of fields of a query; Litestar parses all of them at once."""

AnyRequest = Request[object, object, State]

_KEY = re.compile(rb"[!-~]{1,%d}" % MAX_KEY_CHARACTERS).fullmatch
_decode_job = msgspec.json.Decoder(JobRequest).decode
_decode_batch = msgspec.json.Decoder(BatchRequest).decode

T = TypeVar("T")


async def read_body(
    request: AnyRequest, decode: Callable[[bytes], T], limit: int = MAX_BODY_BYTES
) -> T:
    """Read and decode a body of JSON. Raises an HTTP error for an invalid one."""
    try:
        body = await request.body()
    except RequestEntityTooLarge:
        # The rest of the body is not read, so the connection must close.
        raise RequestEntityTooLarge(
            f"The body is over {limit // 1024} KiB.", headers={"Connection": "close"}
        ) from None
    if not body:
        raise ClientException("The body is empty; send a JSON object.")
    if is_too_deep(body):
        raise ClientException(f"The body is nested more than {MAX_NESTING_LEVELS} levels deep.")
    try:
        if not body.isascii():
            body.decode()
        return decode(body)
    except msgspec.ValidationError as error:
        raise ClientException(f"The body is invalid: {error}") from None
    except msgspec.DecodeError as error:
        raise ClientException(f"The body is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise ClientException("The body is not UTF-8 text.") from None


async def read_request(request: AnyRequest) -> JobRequest:
    """Read the body of a new job. Raises an HTTP error for an invalid body."""
    return await read_body(request, _decode_job)


async def read_batch(request: AnyRequest) -> list[Submission]:
    """Read the body of a batch. Raises an HTTP error for an invalid body."""
    batch = await read_body(request, _decode_batch, MAX_BATCH_BYTES)
    for index, each in enumerate(batch.jobs):
        if len(each.payload) > MAX_BODY_BYTES:
            raise RequestEntityTooLarge(
                f"The payload of the job at index {index} is over {MAX_BODY_BYTES // 1024} KiB."
            )
    return [
        Submission(
            task=each.task,
            payload=bytes(each.payload),
            key=caller_of(request).key(each.key),
            run_at=each.due,
            **each.options,
        )
        for each in batch.jobs
    ]


def header_values(request: AnyRequest, name: bytes) -> list[bytes]:
    """Return all values of a header, in order; ``name`` in lower case."""
    # Litestar's own headers are decoded anew at each access.
    return [value for key, value in request.scope["headers"] if key == name]


def require_json(request: AnyRequest) -> None:
    """Raise 415 for a body whose ``Content-Type`` is missing or not JSON.

    Browsers let a page of another host send other types, or no type, without a CORS preflight
    request. A request without a body needs no ``Content-Type``.
    """
    declared = header_values(request, b"content-type")
    if declared == [b"application/json"]:
        return
    has_length = any(value.strip(b"0") for value in header_values(request, b"content-length"))
    if not has_length and not header_values(request, b"transfer-encoding"):
        return
    text = declared[0].decode("latin-1") if len(declared) == 1 else ""
    media_type = text.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(
            "Send the body with Content-Type: application/json.",
            status_code=415,
            headers={"Accept": "application/json"},
        )


def idempotency_key(request: AnyRequest) -> str | NamedKey | None:
    """Return the idempotency key of a request, or None. Raises 400 for an invalid key."""
    keys = header_values(request, b"idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not _KEY(keys[0]):
        raise ClientException(
            f"Idempotency-Key must be 1 to {MAX_KEY_CHARACTERS} visible ASCII characters, once."
        )
    return caller_of(request).key(keys[0].decode("ascii"))


def traceparent(request: AnyRequest) -> str | None:
    """Return the ``traceparent`` of a request if it has exactly one valid value."""
    given = header_values(request, b"traceparent")
    if len(given) != 1:
        return None
    text = given[0].decode("latin-1")
    return text if is_traceparent(text) else None


def cursor_of(text: str | None) -> str | None:
    """Return the job id in a cursor. Raises 400 for an invalid cursor."""
    cursor = None if text is None else canonical_job_id(text)
    if text is not None and cursor is None:
        raise ClientException("cursor must be the nextCursor of another page.")
    return cursor


def state_of(text: str | None) -> JobState | None:
    """Return the job state of a filter. Raises 400 for an unknown state."""
    if text is None:
        return None
    try:
        return JobState(text)
    except ValueError:
        raise ClientException(f"state must be one of {', '.join(JobState)}.") from None


def correlation_id_of(text: str | None) -> str | None:
    """Return the correlation id of a filter. Raises 400 for an invalid id."""
    if text is not None and not is_correlation_id(text):
        raise ClientException("correlationId must be 1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-'.")
    return text


def text_of(name: str, text: str | None) -> str | None:
    """Return the text of a filter by task or code. Raises 400 for one that no job can have."""
    if text is not None and not 1 <= len(text) <= MAX_NAME_CHARACTERS:
        raise ClientException(f"{name} must have 1 to {MAX_NAME_CHARACTERS} characters.")
    return text


def reject_unknown_parameters(request: AnyRequest, *known: str) -> None:
    """Raise 400 for an unknown query parameter: a misspelt filter would list all jobs."""
    for name in request.query_params:
        if name not in known:
            raise ClientException(f"There is no parameter {name!r}; there are {', '.join(known)}.")


JOBS_API = "viralfx.jobs_api"
"""The key in ``opt`` of these routes; the value is their :class:`JobsApi`."""

_MAX_PAGE_JOBS = 100
_encode = msgspec.json.Encoder().encode


class JobsApi:
    """The services of a layer that the routes use, as it was wired last, and their access rules."""

    __slots__ = ("_exposure", "_layer", "has_callers")

    def __init__(self, layer: OperationsLayer) -> None:
        self._layer = layer
        settings = layer.settings
        self.has_callers = settings.has_api_tokens or layer.config.authorize is not None
        """Whether each request must have a known caller."""
        self._exposure = Exposure.CLOSED if self.has_callers else settings.api_exposure

    def is_open_to(self, scope: Scope) -> bool:
        """Return True if the caller of a request needs no token."""
        if self._exposure is Exposure.MACHINE:
            return is_on_this_machine(scope)
        return self._exposure is Exposure.OPEN

    def reject_without_token(self, scope: Scope) -> NoReturn:
        """Raise 403: no token is configured, and the caller would need one."""
        if self._exposure is not Exposure.MACHINE:
            raise PermissionDeniedException("API_TOKEN is not set, so this request is not allowed.")
        self._layer.endpoints.address_warning.log(peer_of(scope), scope["path"])
        raise PermissionDeniedException(
            "API_TOKEN is not set, so only callers on this machine are allowed."
        )

    def caller(self, headers: Headers) -> Principal | None:
        """Return the caller of a request; None for an unknown one."""
        return self._layer.endpoints.access.caller(headers)

    async def hold(self, scope: Scope) -> bool:
        """Wait before the response to a request with a wrong token.

        Returns False if the connection should end.
        """
        return not has_credentials(scope) or await self._layer.endpoints.brake.hold(
            peer_of(scope), "jobs"
        )

    @property
    def service(self) -> JobService:
        """The service that accepts, finds and changes jobs."""
        return self._layer.assembly.jobs.service

    @property
    def tasks(self) -> TaskRegistry:
        """The tasks of this process."""
        return self._layer.assembly.jobs.tasks

    @property
    def follower(self) -> JobFollower:
        """The source of event streams of jobs."""
        return self._layer.assembly.jobs.follower

    @contextmanager
    def recorded(self, request: AnyRequest, action: Action, target: str) -> Iterator[AuditEntry]:
        """Record the block as an action of the request's caller."""
        with self._layer.operations.audit.recorded(
            action,
            actor=caller_of(request).name,
            address=peer_of(cast("Scope", request.scope)),
            target=target,
        ) as entry:
            yield entry

    def record_refusal(
        self, request: AnyRequest, status: int, *, actor: Principal = ANONYMOUS
    ) -> None:
        """Record a request that is not authorized."""
        scope = cast("Scope", request.scope)
        self._layer.endpoints.refusals.record(scope, status, actor=actor.name)

    @property
    def concurrency(self) -> Mapping[str, int]:
        """How many jobs of each queue this process runs at once."""
        return self._layer.assembly.jobs.concurrency


# Not a guard: for each guard and request Litestar copies the route handler, which takes longer than
# all other checks of a request together.
async def check_request(request: AnyRequest) -> None:
    """Raise an HTTP error for a request that is not authorized, or whose body is not JSON.

    Raise one for a query of too many fields, too, before Litestar parses it.
    """
    method = request.scope["method"]
    api = api_of(request)
    try:
        caller = _authorize(api, method, cast("Scope", request.scope))
    except HTTPException as error:
        api.record_refusal(request, error.status_code)
        raise
    if caller is None:
        api.record_refusal(request, HTTPStatus.UNAUTHORIZED)
        headers = {"WWW-Authenticate": "Bearer"}
        if not await api.hold(cast("Scope", request.scope)):
            headers["Connection"] = "close"
        raise NotAuthorizedException("Send the API token as a bearer token.", headers=headers)
    request.scope[_CALLER] = caller  # type: ignore[literal-required]  # keys of one's own are allowed
    if request.scope["query_string"].count(b"&") >= MAX_QUERY_FIELDS:
        raise ClientException(f"The query has more than {MAX_QUERY_FIELDS} fields.")
    if method == HttpMethod.POST:
        require_json(request)


_CALLER = "viralfx.caller"
"""The scope key of the caller of the jobs API."""
_EVERYBODY = replace(API, name=ANONYMOUS.name)
"""The caller of a jobs API that needs no token."""


def caller_of(request: AnyRequest) -> Principal:
    """Return the caller of a request that `check_request` has let pass."""
    caller: Principal = request.scope[_CALLER]  # type: ignore[literal-required]  # as above
    return caller


def require_submit(request: AnyRequest, task: str) -> None:
    """Raise 403 unless the caller may submit jobs of a task, and the task takes jobs of clients.

    Raises ``UnknownTaskError``. Without the right, the answer does not tell whether the task
    exists.
    """
    caller, api = caller_of(request), api_of(request)
    if not caller.may_submit(task):
        _refuse(request, f"submit:{task}")
    if not is_offered(task, api.tasks, caller):
        api.record_refusal(request, HTTPStatus.FORBIDDEN, actor=caller)
        raise PermissionDeniedException(NOT_OFFERED.format(task))


def key_conflict(request: AnyRequest, error: Exception) -> Response[Problem]:
    """Answer that a key is in use. Only a caller that may read the other job sees its id."""
    text, job = str(error), error.job if isinstance(error, KeyConflictError) else None
    if job is not None and not caller_of(request).may_read(job.queue):
        text = text.replace(f"job {job.id}", "another job")
    return respond(HTTPStatus.CONFLICT, sentence(text))


def require_read(request: AnyRequest, queue: str | None) -> None:
    """Raise 403 unless the caller may read the jobs of a queue; None: of all queues."""
    caller = caller_of(request)
    if not (caller.reads_all if queue is None else caller.may_read(queue)):
        _refuse(request, f"read:{queue or '*'}")


def require_operate(request: AnyRequest, queue: str | None) -> None:
    """Raise 403 unless the caller may change the jobs of a queue; None: of all queues."""
    caller = caller_of(request)
    if not (caller.operates_all if queue is None else caller.may_operate(queue)):
        _refuse(request, f"operate:{queue or '*'}")


async def require_operate_job(request: AnyRequest, job_id: str) -> None:
    """Raise 403 unless the caller may change a job; its queue never changes."""
    caller = caller_of(request)
    if not caller.operates_all:
        # Without the right for any queue, the answer does not tell whether the job exists.
        queue = (await api_of(request).service.get(job_id)).queue if caller.operates else None
        require_operate(request, queue)


async def readable_job(request: AnyRequest, job_id: str) -> Job:
    """Return a job. Raise 403 unless the caller may read the jobs of its queue."""
    require_any_read(request)
    job = await api_of(request).service.get(job_id)
    require_read(request, job.queue)
    return job


def require_any_read(request: AnyRequest) -> None:
    """Raise 403 unless the caller may read the jobs of some queue."""
    caller = caller_of(request)
    if not (caller.reads or caller.reads_all):
        _refuse(request, "read:*")


def _refuse(request: AnyRequest, right: str) -> NoReturn:
    api_of(request).record_refusal(request, HTTPStatus.FORBIDDEN, actor=caller_of(request))
    raise PermissionDeniedException(f"This token has not the right {right}.")


def _authorize(api: JobsApi, method: str, scope: Scope) -> Principal | None:
    """Return the caller; None for a wrong token. Without tokens, deny cross-origin changes."""
    headers: Headers = scope["headers"]
    if api.is_open_to(scope):
        if method in CHANGING and is_cross_origin(headers):
            raise PermissionDeniedException(
                "A page of another host may not do this: Origin and Host differ. Set API_TOKEN and"
                " send it, or call from a page of this host."
            )
        return _EVERYBODY
    if not api.has_callers:
        api.reject_without_token(scope)
    return api.caller(headers)


class _Encoded(ASGIResponse):
    """A response whose head and body are encoded already."""

    __slots__ = ("_head",)

    # Without the base's constructor, which takes several times as long as all of this.
    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        headers.append((b"content-length", b"%d" % len(body)))
        self._head: Message = {"type": "http.response.start", "status": status, "headers": headers}
        self.body = body

    async def __call__(self, _scope: object, _receive: object, send: LitestarSend) -> None:
        await send(self._head)
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


class _AcceptedResponse(Response[schemas.JobAccepted]):
    """Renders an accepted job faster than Litestar, unless a hook or a layer has added to it."""

    def to_asgi_response(
        self, app: Litestar | None, request: AnyRequest, **defaults: Any
    ) -> ASGIResponse:
        added = [defaults.get(name) for name in ("background", "cookies", "headers")]
        if self.cookies or self.background is not None or self.media_type or any(added):
            return super().to_asgi_response(app, request, **defaults)
        headers = [(b"content-type", b"application/json")]
        for name, value in self.headers.items():
            headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))
        return _Encoded(self.status_code or 202, headers, _encode(self.content))


class JobsController(Controller):
    """The routes of the jobs API."""

    path = PATH

    @post(
        "/",
        operation_id="jobAccept",
        summary="Accept a job",
        description=openapi.ACCEPT,
        status_code=202,
        request_max_body_size=MAX_BODY_BYTES,
        operation_class=openapi.AcceptOperation,
        responses=openapi.ACCEPT_RESPONSES,
        exception_handlers=ON_ACCEPT,
    )
    async def accept(self, request: AnyRequest) -> Response[schemas.JobAccepted]:
        key = idempotency_key(request)
        job_request = await read_request(request)
        require_submit(request, job_request.task)
        outcome = await api_of(request).service.accept(
            job_request.task,
            bytes(job_request.payload),
            run_at=job_request.due,
            key=key,
            traceparent=traceparent(request),
            **job_request.options,
        )
        body = schemas.accepted(outcome.job)
        return _AcceptedResponse(
            body,
            status_code=202 if outcome.created else 200,
            headers={"Location": body.links.self},
        )

    @post(
        "/batch",
        operation_id="jobAcceptBatch",
        summary="Accept many jobs, all or none",
        description=openapi.BATCH,
        status_code=202,
        request_max_body_size=MAX_BATCH_BYTES,
        operation_class=openapi.BatchOperation,
        responses=openapi.BATCH_RESPONSES,
        exception_handlers=ON_BATCH,
    )
    async def accept_batch(self, request: AnyRequest) -> schemas.JobsAccepted:
        if header_values(request, b"idempotency-key"):
            raise ClientException("A batch has no Idempotency-Key: give each of its jobs a key.")
        batch = await read_batch(request)
        judged: set[str] = set()
        for index, each in enumerate(batch):
            if each.task not in judged:
                judged.add(each.task)
                with about(index):
                    require_submit(request, each.task)
        accepted = await api_of(request).service.accept_all(batch, traceparent=traceparent(request))
        return schemas.JobsAccepted(jobs=[schemas.batched(each) for each in accepted])

    @get(
        "/",
        operation_id="jobList",
        summary="Jobs, the newest first",
        description=openapi.LIST,
        responses=openapi.LIST_RESPONSES,
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
        task: Annotated[str | None, QueryParameter(description="Only of this task")] = None,
        code: Annotated[
            str | None, QueryParameter(description="Only with this code of their last error")
        ] = None,
        correlation_id: Annotated[
            str | None,
            QueryParameter(
                name="correlationId",
                description="Only with this correlation id, which their log lines carry, too",
            ),
        ] = None,
        cursor: Annotated[
            str | None, QueryParameter(description="The nextCursor of the page before")
        ] = None,
        limit: Annotated[
            int, QueryParameter(description="Jobs on a page", ge=1, le=_MAX_PAGE_JOBS)
        ] = 50,
    ) -> schemas.JobPage:
        reject_unknown_parameters(
            request, "queue", "state", "task", "code", "correlationId", "cursor", "limit"
        )
        require_read(request, queue)
        wanted = JobFilter(
            queue=queue,
            state=state_of(in_state),
            task=text_of("task", task),
            code=text_of("code", code),
            before=cursor_of(cursor),
            limit=limit,
        )
        found = await api_of(request).service.search(
            wanted, correlation_id=correlation_id_of(correlation_id)
        )
        return schemas.page(found.jobs, found.before)

    @get(
        "/{job_id:str}",
        operation_id="job",
        summary="One job",
        responses=openapi.ONE_RESPONSES,
    )
    async def one(self, request: AnyRequest, job_id: FromPath[str]) -> schemas.JobView:
        job = await readable_job(request, job_id)
        return schemas.view(job)

    @delete(
        "/{job_id:str}",
        operation_id="jobCancelWaiting",
        summary="Cancel a waiting job",
        responses=openapi.CANCEL_RESPONSES,
        exception_handlers=ON_CHANGE,
    )
    async def cancel_waiting(self, request: AnyRequest, job_id: FromPath[str]) -> None:
        await require_operate_job(request, job_id)
        api = api_of(request)
        with api.recorded(request, Action.CANCEL, job_id) as entry:
            entry.after = str((await api.service.cancel(job_id, running=False)).state)

    @get(
        "/{job_id:str}/events",
        operation_id="jobEvents",
        summary="The progress of one job",
        description=openapi.EVENTS,
        responses=openapi.EVENTS_RESPONSES,
    )
    async def events(self, request: AnyRequest, job_id: FromPath[str]) -> ServerSentEvent:
        api = api_of(request)
        if api.follower.full:
            raise HTTPException(
                "Too many clients follow jobs on this instance.",
                status_code=503,
                headers={"Retry-After": "5"},
            )
        job = await readable_job(request, job_id)
        return ServerSentEvent(_messages(api.follower, job), headers={"Cache-Control": "no-store"})


async def _messages(follower: JobFollower, job: Job) -> AsyncIterator[ServerSentEventMessage]:
    async for update in follower.follow(job):
        if update is None:
            yield ServerSentEventMessage(data=None, comment="nothing new")
        else:
            yield ServerSentEventMessage(data=_encode(schemas.summary(update)), event="job")


def api_of(request: AnyRequest) -> JobsApi:
    """Return the services of the layer whose routes a request was sent to."""
    api: JobsApi = request.route_handler.opt[JOBS_API]
    return api
