"""The operations console: one page on every port, with its files, feed, data and actions.

The gate answers it ahead of the application, so it works while the application starts, drains or
hangs, and on the management port of a worker.
"""

import copy
import gzip
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl

import msgspec

from viralfx.bootstrap import Assembly
from viralfx.domain.access import ANONYMOUS, Right
from viralfx.domain.audit import Action, AuditEntry
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import Phase
from viralfx.server.interface import RawResponse, Scope
from viralfx.settings import Settings
from viralfx.settings.tokens import Token
from viralfx.telemetry.logging.lines import LoggerLevels
from viralfx.web.auth import (
    SECURITY_HEADERS,
    AccessPolicy,
    Headers,
    is_json,
    is_own_request,
    is_secure,
)
from viralfx.web.console import views
from viralfx.web.console.actions import MAX_BODY_BYTES, Actor, ConsoleActions
from viralfx.web.console.data import ConsoleData, ShowPayload, coded
from viralfx.web.console.feed import Feed
from viralfx.web.responses import (
    READ,
    AnyResponse,
    Deferred,
    DenialLog,
    Denied,
    Endpoint,
    EventStream,
    Recorded,
    ResponseFromBody,
    encode,
    json_response,
    not_allowed,
    peer_of,
    problem_response,
    retry_after,
)
from viralfx.web.sessions import ConsoleAccess, Reads, ServingPort, Session, Viewer

_MAX_TOKEN_BYTES = 4096
_RETRY_STREAMS_SECONDS = 5.0
_MAX_JOBS_SHOWN = 20
_DATA = "data/"


class _Token(msgspec.Struct, forbid_unknown_fields=True):
    token: str


_decode_token = msgspec.json.Decoder(_Token).decode


def serving_ports(settings: Settings, access: AccessPolicy) -> frozenset[ServingPort]:
    """Return the ports that serve the console: in production none if no caller has a right."""
    if settings.console == "false" or (settings.in_production and not access.has_callers):
        return frozenset()
    apart = settings.in_production and settings.management_port is not None
    if settings.console == "management" or (settings.console is None and apart):
        return frozenset({ServingPort.MANAGEMENT})
    return frozenset(ServingPort)


# -- the files of the page -----------------------------------------------------------------------


_logger = logging.getLogger("viralfx.console")

STATIC = Path(__file__).parent / "static"
_MEDIA_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
    ".ico": b"image/x-icon",
    ".txt": b"text/plain; charset=utf-8",
}
"""Other files are not served."""


class _File(msgspec.Struct, frozen=True):
    plain: RawResponse
    zipped: RawResponse
    unchanged: RawResponse
    tag: bytes


class Assets:
    """Serves the files of a folder by their relative path; reads them at the first request."""

    def __init__(self, folder: Path = STATIC) -> None:
        self._folder = folder
        self._files: Mapping[str, _File] | None = None

    @property
    def files(self) -> Mapping[str, _File]:
        """The files by path; empty if the distribution has none."""
        if self._files is None:
            found = sorted(self._folder.rglob("*")) if self._folder.is_dir() else []
            self._files = {
                path.relative_to(self._folder).as_posix(): _file(path)
                for path in found
                if path.is_file() and path.suffix in _MEDIA_TYPES
            }
            if not self._files:
                _logger.error("Console has no files", extra={"folder": str(self._folder)})
        return self._files

    def respond(self, name: str, method: str, headers: Headers) -> RawResponse:
        """Return the response for a path below ``ui/``."""
        if method not in READ:
            return not_allowed("GET, HEAD", *SECURITY_HEADERS)
        file = self.files.get(name)
        if file is None:
            return problem_response(404, "The console has no such file.", *SECURITY_HEADERS)
        accepted, seen = b"", b""
        for key, value in headers:
            if key == b"accept-encoding":
                accepted += value + b","
            elif key == b"if-none-match":
                seen += value + b","
        if any(one.strip().removeprefix(b"W/") == file.tag for one in seen.split(b",")):
            return file.unchanged
        return file.zipped if _takes_gzip(accepted) else file.plain


def _takes_gzip(accepted: bytes) -> bool:
    for one in accepted.split(b","):
        name, _, weight = one.strip().partition(b";")
        if name.strip().lower() in {b"gzip", b"*"}:
            return weight.replace(b" ", b"") not in {b"q=0", b"q=0.0", b"q=0.00", b"q=0.000"}
    return False


def _file(path: Path) -> _File:
    content = path.read_bytes()
    # Of the content alone, so that the bytes are the same in each build.
    zipped = gzip.compress(content, 9, mtime=0)
    tag = b'"%s"' % hashlib.sha256(content).hexdigest()[:20].encode()
    common = (
        (b"etag", tag),
        (b"cache-control", b"no-cache"),
        (b"vary", b"accept-encoding"),
        *SECURITY_HEADERS,
    )
    media_type = (b"content-type", _MEDIA_TYPES[path.suffix])
    return _File(
        plain=_response(200, content, media_type, *common),
        zipped=_response(200, zipped, media_type, (b"content-encoding", b"gzip"), *common),
        unchanged=RawResponse(304, _head(*common), b""),
        tag=tag,
    )


def _response(status: int, body: bytes, *headers: tuple[bytes, bytes]) -> RawResponse:
    return RawResponse(status, _head((b"content-length", b"%d" % len(body)), *headers), body)


def _head(*headers: tuple[bytes, bytes]) -> bytes:
    return b"".join(b"%b: %b\r\n" % header for header in headers)


# -- the console ---------------------------------------------------------------------------------


class Console:
    """Serves the console below ``path``."""

    def __init__(
        self,
        assembly: Assembly,
        settings: Settings,
        *,
        path: str,
        policy: AccessPolicy,
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
        self._access = access = ConsoleAccess(policy, clock=self._operations.clock)
        self.feed = Feed(
            self._operations,
            max_streams=settings.console_max_streams,
            in_flight=self._in_flight,
            concurrency=lambda: self._jobs.concurrency,
            remaining_stages=self._remaining_stages,
        )
        self.feed.before_beat = lambda: self.feed.end_sessions(access.is_valid)
        self._jobs.counted.subscribe(self.feed.on_counted)
        self._data = ConsoleData(
            self._operations,
            jobs=self._jobs,
            fleet=assembly.fleet,
            feed=self.feed,
            settings=settings,
            source=assembly.source,
            levels=levels,
            show_payload=show_payload,
        )
        self._actions = ConsoleActions(
            self._operations, jobs=self._jobs, feed=self.feed, data=self._data, path=path
        )
        self._path, self._ui = path, f"{path}/ui/"
        self.endpoints = self._own_endpoints()
        """The endpoints by path, without those of :meth:`find`."""

    def at(self, port: ServingPort, policy: AccessPolicy) -> "Console":
        """Return the same console with another policy, and the sessions of a port."""
        other = copy.copy(self)
        other._access = self._access.at(port, policy)  # noqa: SLF001 - own class
        other.endpoints = other._own_endpoints()  # noqa: SLF001 - of its own class
        return other

    def _own_endpoints(self) -> dict[str, Endpoint]:
        return {
            f"{self._path}/ui": self._file("index.html"),
            f"{self._path}/ui/session": self._with_keys(self._session),
            f"{self._path}/events": self._with_keys(self._events),
        }

    def _with_keys(self, endpoint: Callable[[str, bytes, Headers], AnyResponse]) -> Endpoint:
        """Return an endpoint that first makes the keys of sessions, off the event loop."""

        def respond(method: str, query: bytes, headers: Headers) -> AnyResponse | Deferred:
            if self._access.is_ready(headers):
                return endpoint(method, query, headers)

            async def later() -> AnyResponse:
                await self._access.prepare(headers)
                return endpoint(method, query, headers)

            return Deferred(later)

        return respond

    def find(self, path: str) -> Endpoint | None:
        """Return the endpoint for the path of a file, a view or an action; None for another path.

        ``path`` is decoded, so an id in it may have any character.
        """
        if not path.startswith(self._ui):
            return None
        name = path[len(self._ui) :]
        return self._of_data(name[len(_DATA) :]) if name.startswith(_DATA) else self._file(name)

    def _file(self, name: str) -> Endpoint:
        def endpoint(method: str, _query: bytes, headers: Headers) -> RawResponse:
            return self._assets.respond(name, method, headers)

        return endpoint

    # -- the process -------------------------------------------------------------------------

    def _in_flight(self) -> views.View:
        worker = self._jobs.worker
        running = () if worker is None else worker.running
        return {
            "requests": self.feed.requests(),
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

    async def has_session(self, headers: Headers) -> bool:
        """Return True if a request has a valid session of this port."""
        await self._access.prepare(headers)
        return self._access.session(headers) is not None

    def _refused(
        self,
        status: int,
        code: str,
        detail: str,
        action: Action = Action.ACCESS,
        *,
        actor: str | None = None,
        wrong_token: bool = False,
        unknown: bool = False,
    ) -> Denied:
        response = _secured(coded(status, code, detail))
        return self._denials.refuse(
            response, action, actor=actor, wrong_token=wrong_token, unknown=unknown
        )

    def _record_session(self, action: Action, session: Session | None, scope: Scope) -> None:
        if session is not None:
            actor = session.actor
            self._operations.audit.record(
                AuditEntry(
                    action=action,
                    actor=actor,
                    address=peer_of(scope),
                    target=self._operations.instance,
                )
            )

    def _no_session(self, *, unknown: bool) -> Denied:
        if self._access.has_token:
            detail = "Log in to the console first."
            return self._refused(401, "session", detail, unknown=unknown)
        detail = "MANAGEMENT_TOKEN is not set, so there is no log-in: set it, and start again."
        return self._refused(401, "no_token", detail)

    def _lacking(self, viewer: Viewer, right: Right) -> Denied:
        """Refuse a request whose sender, if there is a known one, lacks a right."""
        if viewer.principal is ANONYMOUS:
            return self._no_session(unknown=viewer.unknown)
        name = right.name.lower()
        detail = f"{viewer.principal.name} has not the right {name}."
        return self._refused(403, "right", detail, actor=viewer.actor)

    def _acting(self, headers: Headers, needs: Right) -> Viewer | Denied:
        viewer = self._access.viewer(headers)
        if not viewer.principal.may(needs):
            return self._lacking(viewer, needs)
        if not (is_own_request(headers) and is_json(headers)):
            detail = "Send JSON from the console itself, with its Origin."
            return self._refused(403, "origin", detail, actor=viewer.actor)
        return viewer

    # -- endpoints ---------------------------------------------------------------------------

    def _of_data(self, path: str) -> Endpoint:
        view, action = self._data.find(path), self._actions.find(path)
        if action is not None:
            # A job has no id with a slash, so the path of an action is none of a job.
            view = None

        def endpoint(
            method: str, query: bytes, headers: Headers
        ) -> RawResponse | ResponseFromBody | Denied:
            if view is not None and method in READ:
                viewer = self._access.viewer(headers)
                reads = viewer.reads
                if not reads.includes(view.needs):
                    settings_view = view.needs is Reads.SETTINGS
                    return self._lacking(viewer, Right.ADMIN if settings_view else Right.READ)
                # Made later: a server may call this for the type of the response alone.
                return ResponseFromBody(0, lambda *_: _secured_later(view.answer(query, reads)))
            if action is not None and method == "POST":
                viewer_or_denied = self._acting(headers, action.needs)
                if isinstance(viewer_or_denied, Denied):
                    return viewer_or_denied
                name = viewer_or_denied.actor
                return ResponseFromBody(
                    MAX_BODY_BYTES,
                    lambda body, scope: _secured_later(
                        action.perform(Actor(name, peer_of(scope)), body)
                    ),
                )
            if view is None and action is None:
                detail = "The console has no such view and no such action."
                return _secured(problem_response(404, detail))
            return _secured(not_allowed("GET, HEAD" if action is None else "POST"))

        return self._with_keys(endpoint)

    def _events(
        self, method: str, query: bytes, headers: Headers
    ) -> RawResponse | EventStream | Denied:
        if method not in READ:
            return _secured(not_allowed("GET, HEAD"))
        viewer = self._access.viewer(headers)
        if viewer.reads is Reads.NONE:
            return self._lacking(viewer, Right.READ)
        if self.feed.full:
            full = coded(503, "streams", "Too many streams are open at this process.")
            seconds = b"%b: %b\r\n" % retry_after(_RETRY_STREAMS_SECONDS)
            return _secured(msgspec.structs.replace(full, head=full.head + seconds))
        last = next((value for name, value in headers if name == b"last-event-id"), b"")
        last_id = last.decode("latin-1")
        if not last_id:
            try:
                values = dict(parse_qsl(query.decode("latin-1"), max_num_fields=20))
            except ValueError:
                return _secured(problem_response(400, "The query has too many fields."))
            last_id = values.get("last", "")
        return EventStream(
            lambda scope, receive, send, header: self.feed.stream(
                last_id,
                scope,
                receive,
                send,
                header,
                session=viewer.session,
                everything=viewer.reads.includes(Reads.ALL),
            )
        )

    def _session(
        self, method: str, query: bytes, headers: Headers
    ) -> RawResponse | ResponseFromBody | Recorded:
        if method in READ:
            return self._session_state(headers, start=query == b"start")
        if method not in {"POST", "DELETE"}:
            return _secured(not_allowed("GET, HEAD, POST, DELETE"))
        # A page of another origin can send a form unasked, but neither JSON nor DELETE.
        unasked = method == "POST" and not is_json(headers)
        if unasked or not is_own_request(headers, origin_needed=False):
            detail = "Send JSON, and no Origin of another page."
            return self._refused(403, "origin", detail)
        secure = is_secure(headers)
        if method == "DELETE":
            session = self._access.session(headers)
            removed = self._access.log_out(headers, secure=secure)
            self.feed.end_sessions(self._access.is_valid)
            return Recorded(
                _without_body(*removed),
                lambda scope, _: self._record_session(Action.LOG_OUT, session, scope),
            )
        if not self._access.has_token:
            detail = "MANAGEMENT_TOKEN is not set, so there is no log-in: set it, and start again."
            return self._refused(403, "no_token", detail, Action.LOG_IN)

        def log_in(body: bytes, scope: Scope) -> RawResponse | Denied | Awaitable[RawResponse]:
            try:
                token = self._access.identify(_decode_token(body).token)
            except (msgspec.DecodeError, UnicodeError):
                return _secured(coded(400, "body", 'Send {"token": "..."}.'))
            if token is None:
                detail = "This is not the token."
                return self._refused(401, "token", detail, Action.LOG_IN, wrong_token=True)
            if not token.principal.may(Right.READ):
                name = token.principal.name
                detail = f"The token of {name} has not the right read."
                return self._refused(403, "right", detail, Action.LOG_IN, actor=name)
            return self._logged_in(token, headers, scope, secure=secure)

        return ResponseFromBody(_MAX_TOKEN_BYTES, log_in)

    async def _logged_in(
        self, token: Token, headers: Headers, scope: Scope, *, secure: bool
    ) -> RawResponse:
        cookie = await self._access.log_in(token, headers, secure=secure)
        host = [pair for pair in headers if pair[0] == b"host"]
        made = self._access.session([*host, (b"cookie", cookie[1].partition(b";")[0])])
        self._record_session(Action.LOG_IN, made, scope)
        return _without_body(cookie)

    def _session_state(self, headers: Headers, *, start: bool) -> RawResponse:
        viewer = self._access.viewer(headers, with_token=False)
        session, reads, principal = viewer.session, viewer.reads, viewer.principal
        operations = self._operations
        first = None
        if start and reads is not Reads.NONE:
            # A page begins with it, and need not wait for its stream.
            first = self.feed.start(everything=reads.includes(Reads.ALL))
        state: Mapping[str, object] = {
            "loggedIn": session is not None,
            "expiresAt": None if session is None else views.moment(session.expires_at),
            "login": self._access.has_token,
            "reads": str(reads),
            "name": None if principal is ANONYMOUS else principal.name,
            "right": principal.right.name.lower(),
            "full": self.feed.full,
            "instance": operations.instance,
            "version": operations.version,
            "environment": operations.environment,
            "runbook": self._runbook,
            "start": first,
        }
        return _secured(json_response(200, encode(state)))


def _secured(response: RawResponse) -> RawResponse:
    more = b"".join(b"%b: %b\r\n" % header for header in SECURITY_HEADERS)
    return msgspec.structs.replace(response, head=response.head + more)


async def _secured_later(response: Awaitable[RawResponse]) -> RawResponse:
    return _secured(await response)


def _without_body(*more: tuple[bytes, bytes]) -> RawResponse:
    headers = ((b"cache-control", b"no-store"), *SECURITY_HEADERS, *more)
    return RawResponse(204, b"".join(b"%b: %b\r\n" % header for header in headers), b"")
