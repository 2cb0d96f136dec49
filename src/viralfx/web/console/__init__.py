"""The operations console: one page on every port, its live feed, its data and its actions.

The gate answers it ahead of the application, so it works while the application starts, drains or
hangs, and on the management port of a worker.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from urllib.parse import parse_qsl

import msgspec

from viralfx.bootstrap import Assembly
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import Phase
from viralfx.settings import Settings
from viralfx.telemetry.logging.lines import LoggerLevels
from viralfx.web.auth import AccessPolicy, Headers
from viralfx.web.console import views
from viralfx.web.console.access import Caller, ConsoleAccess, Reads, Role, is_own_request, is_secure
from viralfx.web.console.actions import MAX_BODY_BYTES, ConsoleActions
from viralfx.web.console.assets import SECURITY_HEADERS, Assets
from viralfx.web.console.data import ConsoleData, ShowPayload, coded
from viralfx.web.console.feed import Feed
from viralfx.web.responses import (
    READ,
    DenialLog,
    Denied,
    Endpoint,
    EventStream,
    RawResponse,
    ResponseFromBody,
    encode,
    json_response,
    not_allowed,
    problem_response,
    retry_after,
)

_MAX_TOKEN_BYTES = 4096
_RETRY_PAGES_SECONDS = 5.0
_MAX_JOBS_SHOWN = 20


class _Token(msgspec.Struct, forbid_unknown_fields=True):
    token: str


_decode_token = msgspec.json.Decoder(_Token).decode


def is_served(settings: Settings) -> bool:
    """Return True if the settings allow the console: in production only with a token."""
    tokens = (settings.management_token, settings.console_token)
    return settings.console and (settings.environment != "production" or any(tokens))


class Console:
    """Serves the console below ``path``."""

    def __init__(
        self,
        assembly: Assembly,
        settings: Settings,
        *,
        path: str,
        denials: DenialLog,
        levels: LoggerLevels,
        show_payload: ShowPayload | None = None,
        assets: Assets | None = None,
    ) -> None:
        """``levels`` are those of ``{path}/loggers``; ``denials`` logs refused requests."""
        self._operations: Operations = assembly.operations
        self._jobs = assembly.jobs
        self._denials = denials
        self._assets = assets or Assets()
        self._runbook = settings.runbook_url
        self._policy = AccessPolicy.from_settings(settings)
        token = settings.console_token
        without = (settings.management_token, token, settings.api_token)
        self._access = ConsoleAccess(
            self._policy,
            console_token=None if token is None else token.value.strip().encode(),
            open_to_all=settings.environment != "production" and not any(without),
            path=path,
            clock=self._operations.clock,
        )
        self.requests: Callable[[], int] = int
        """Returns how many requests of the application are in flight."""
        self.feed = Feed(
            self._operations,
            max_pages=settings.console_max_pages,
            in_flight=self._in_flight,
            concurrency=lambda: self._jobs.concurrency,
            remaining_stages=self._remaining_stages,
        )
        self._jobs.counted.subscribe(self.feed.on_counted)
        self._data = ConsoleData(
            self._operations,
            jobs=self._jobs,
            fleet=assembly.fleet,
            feed=self.feed,
            settings=settings,
            levels=levels,
            show_payload=show_payload,
        )
        self._actions = ConsoleActions(
            self._operations,
            jobs=self._jobs,
            feed=self.feed,
            data=self._data,
            path=path,
        )
        self._ui = f"{path}/ui/"
        self.endpoints: dict[str, Endpoint] = {
            f"{path}/ui": self._file("index.html"),
            f"{path}/events": self._events,
            f"{path}/session": self._session,
        }
        """The endpoints by path."""
        below = {*self._data.status, *self._data.protected, *self._actions.paths}
        for name in below:
            self.endpoints[f"{path}/console/{name}"] = self._console(name)

    def find(self, path: str) -> Endpoint | None:
        """Return the endpoint for the path of a file; None for any other path."""
        return self._file(path[len(self._ui) :]) if path.startswith(self._ui) else None

    def _file(self, name: str) -> Endpoint:
        def endpoint(method: str, _query: bytes, headers: Headers) -> RawResponse:
            return self._assets.respond(name, method, headers)

        return endpoint

    # -- the process -------------------------------------------------------------------------

    def _in_flight(self) -> views.View:
        worker = self._jobs.worker
        running = () if worker is None else worker.running
        return {
            "requests": self.requests(),
            "jobCount": len(running),
            "jobs": [
                {
                    "id": each.id,
                    "task": each.task,
                    "queue": each.queue,
                    "attempt": each.attempt,
                    "seconds": each.seconds,
                    "timeout": each.timeout,
                }
                for each in running[:_MAX_JOBS_SHOWN]
            ],
        }

    def _remaining_stages(self) -> Sequence[str]:
        phases = self._operations.shutdown.report().phases
        return [
            name
            for phase in phases
            if phase.phase is Phase.CLOSE
            for name in phase.planned
            if name not in {*(stage.name for stage in phase.stages), *phase.running}
        ]

    # -- access ------------------------------------------------------------------------------

    def _refused(self, status: int, code: str, detail: str) -> Denied:
        return self._denials.refuse(_secured(coded(status, code, detail)))

    def _readable(self, headers: Headers, needed: Reads) -> Denied | None:
        reads = self._access.reads(headers, self._access.caller(headers))
        if reads is Reads.ALL or reads is needed:
            return None
        return self._refused(401, "session", "Log in to the console first.")

    def _operator(self, headers: Headers) -> Caller | Denied:
        if not self._access.may_operate:
            detail = "MANAGEMENT_TOKEN is not set, so the console only shows."
            return self._refused(403, "no_token", detail)
        caller = self._access.caller(headers)
        if caller is None:
            return self._refused(401, "session", "Log in to the console first.")
        if caller.role is not Role.OPERATOR:
            return self._refused(403, "role", "This session may only read.")
        if caller.by_cookie and not is_own_request(headers):
            return self._refused(403, "origin", "The request does not come from the console.")
        return caller

    # -- endpoints ---------------------------------------------------------------------------

    def _console(self, name: str) -> Endpoint:
        answer = self._data.status.get(name) or self._data.protected.get(name)
        needed = Reads.STATUS if name in self._data.status else Reads.ALL
        perform = self._actions.paths.get(name)
        allowed = ", ".join([*(READ if answer else ()), *(["POST"] if perform else ())])

        def endpoint(
            method: str, query: bytes, headers: Headers
        ) -> RawResponse | Awaitable[RawResponse] | ResponseFromBody | Denied:
            if method in READ and answer is not None:
                if (denied := self._readable(headers, needed)) is not None:
                    return denied
                # Made later: a server may call this for the type of the response alone.
                return ResponseFromBody(0, lambda _: _secured_later(answer(query)))
            if method != "POST" or perform is None:
                return _secured(not_allowed(allowed))
            caller = self._operator(headers)
            if isinstance(caller, Denied):
                return caller
            return ResponseFromBody(
                MAX_BODY_BYTES, lambda body: _secured_later(perform(caller, body))
            )

        return endpoint

    def _events(
        self, method: str, query: bytes, headers: Headers
    ) -> RawResponse | EventStream | Denied:
        if method not in READ:
            return _secured(not_allowed("GET, HEAD"))
        if (denied := self._readable(headers, Reads.STATUS)) is not None:
            return denied
        if self.feed.full:
            full = coded(503, "pages", "Too many pages are open at this process.")
            seconds = b"%b: %b\r\n" % retry_after(_RETRY_PAGES_SECONDS)
            return _secured(msgspec.structs.replace(full, head=full.head + seconds))
        last = next((value for name, value in headers if name == b"last-event-id"), b"")
        last_id = last.decode("latin-1")
        if not last_id:
            try:
                values = dict(parse_qsl(query.decode("latin-1"), max_num_fields=20))
            except ValueError:
                return _secured(problem_response(400, "The query has too many fields."))
            last_id = values.get("last", "")
        caller = self._access.caller(headers)
        ends_at = None if caller is None else caller.expires_at
        return EventStream(
            lambda scope, receive, send, header: self.feed.stream(
                last_id, scope, receive, send, header, ends_at=ends_at
            )
        )

    def _session(
        self, method: str, query: bytes, headers: Headers
    ) -> RawResponse | ResponseFromBody | Denied:
        if method in READ:
            return self._session_state(headers, start=query == b"start")
        if method not in {"POST", "DELETE"}:
            return _secured(not_allowed("GET, HEAD, POST, DELETE"))
        if not is_own_request(headers):
            return self._refused(403, "origin", "The request does not come from the console.")
        secure = is_secure(headers)
        if method == "DELETE":
            return _without_body(self._access.log_out(secure=secure))
        if not self._access.has_tokens:
            return self._refused(403, "no_token", "No token is configured, so no log-in is needed.")

        def log_in(body: bytes) -> RawResponse | Denied:
            try:
                cookies = self._access.log_in(_decode_token(body).token, secure=secure)
            except (msgspec.DecodeError, UnicodeError):
                return _secured(coded(400, "body", 'Send {"token": "..."}.'))
            if cookies is None:
                return self._refused(401, "token", "This is not the token.")
            return _without_body(cookies)

        return ResponseFromBody(_MAX_TOKEN_BYTES, log_in)

    def _session_state(self, headers: Headers, *, start: bool) -> RawResponse:
        caller = self._access.caller(headers)
        reads = self._access.reads(headers, caller)
        operations = self._operations
        state: Mapping[str, object] = {
            "role": None if caller is None else str(caller.role),
            "expiresAt": None if caller is None else views.moment(caller.expires_at),
            "login": self._access.has_tokens,
            "reads": str(reads),
            "operates": caller is not None and caller.role is Role.OPERATOR,
            "instance": operations.instance,
            "version": operations.version,
            "environment": operations.environment,
            "runbook": self._runbook,
            # A page begins with it, and need not wait for its stream.
            "start": self.feed.start() if start and reads is not Reads.NONE else None,
        }
        return _secured(json_response(200, encode(state)))


def _secured(response: RawResponse) -> RawResponse:
    more = b"".join(b"%b: %b\r\n" % header for header in SECURITY_HEADERS)
    return msgspec.structs.replace(response, head=response.head + more)


async def _secured_later(response: Awaitable[RawResponse]) -> RawResponse:
    return _secured(await response)


def _without_body(headers: Sequence[tuple[bytes, bytes]]) -> RawResponse:
    common = ((b"cache-control", b"no-store"), *SECURITY_HEADERS, *headers)
    return RawResponse(204, b"".join(b"%b: %b\r\n" % header for header in common), b"")
