"""The operations endpoints, with responses as status, headers and bytes.

All endpoints are synchronous and read data that is already known, except a forced round of checks
and endpoints with a request body. The gate and the documented routes serve the same responses.
"""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from urllib.parse import parse_qs

import msgspec

from viralfx.bootstrap import Assembly
from viralfx.core.clock import Clock, timestamp
from viralfx.domain.audit import Action, AuditEntry, AuditOutcome, AuditTrail
from viralfx.domain.health.model import (
    Health,
    HealthReport,
    NotReadyReason,
    Status,
)
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.domain.operations import Operations
from viralfx.server.interface import RawResponse, Scope
from viralfx.settings import Exposure, Settings
from viralfx.telemetry import stacks_of_tasks, stacks_of_threads
from viralfx.telemetry.logging.lines import LEVELS, FixedLevelError, LoggerLevels
from viralfx.telemetry.metrics import Metrics
from viralfx.web import schemas
from viralfx.web.audit import RefusalAudit, actor_of
from viralfx.web.auth import AccessPolicy, AccessVerdict, AddressWarning, Headers
from viralfx.web.client_address import TrustedProxies, is_on_this_machine
from viralfx.web.console import Console, serving_ports
from viralfx.web.console.data import ShowPayload
from viralfx.web.console.feed import Feed
from viralfx.web.responses import (
    READ,
    CorsPolicy,
    DenialLog,
    Denied,
    Endpoint,
    Recorded,
    ResponseFromBody,
    encode,
    json_response,
    not_allowed,
    peer_of,
    problem_response,
    raw_response,
    retry_after,
)
from viralfx.web.sessions import ServingPort
from viralfx.web.throttle import GuessBrake

_TEXT = b"text/plain; charset=utf-8"


class ProcessEndpoints:
    """Serves ``/health/info`` and ``/health/tasks``."""

    def __init__(self, operations: Operations, access: AccessPolicy, denials: DenialLog) -> None:
        self._operations = operations
        self._access = access
        self._denials = denials

    def info(self, method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
        """``GET /health/info``."""
        if method not in READ:
            return not_allowed("GET, HEAD")
        if (denied := self._denials.of(self._access.to_details(headers))) is not None:
            return denied
        return json_response(200, encode(schemas.info(self._operations)))

    def tasks(self, method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
        """``GET /health/tasks``: the stacks of all threads, and of all tasks of the event loop."""
        if method not in READ:
            return not_allowed("GET, HEAD")
        if (denied := self._denials.of(self._access.to_process(headers))) is not None:
            return denied
        text = f"{stacks_of_threads()}\n{stacks_of_tasks(asyncio.get_running_loop())}"
        return raw_response(_TEXT, 200, text.encode("utf-8", "backslashreplace"))


_MAX_BODY_BYTES = 1024
"""The body holds one level."""
_MAX_NAME_CHARACTERS = 200

_decode = msgspec.json.Decoder(schemas.NewLevel).decode


class LoggersEndpoints:
    """Serves ``/health/loggers`` and ``/health/loggers/{name}``."""

    def __init__(
        self,
        access: AccessPolicy,
        denials: DenialLog,
        path: str,
        *,
        audit: AuditTrail,
        levels: LoggerLevels,
    ) -> None:
        self._access = access
        self._denials = denials
        self._path = path
        self._audit = audit
        self.levels = levels
        """The levels, with those from before all changes."""

    def find(self, path: str) -> Endpoint | None:
        """Return the endpoint for the path of a logger; None for any other path."""
        if not path.startswith(f"{self._path}/"):
            return None
        name = path[len(self._path) + 1 :]
        return self._one(name) if "/" not in name else None

    def list(self, method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
        """``GET /health/loggers``."""
        if method not in READ:
            return not_allowed("GET, HEAD")
        if (denied := self._denials.of(self._access.to_details(headers))) is not None:
            return denied
        loggers = {name: schemas.logger_state(level) for name, level in self.levels.all().items()}
        return json_response(200, encode(schemas.Loggers(levels=list(LEVELS), loggers=loggers)))

    def _one(self, name: str) -> Endpoint:
        def endpoint(
            method: str, _query: bytes, headers: Headers
        ) -> RawResponse | ResponseFromBody | Denied:
            if method not in (*READ, "PUT"):
                return not_allowed("GET, HEAD, PUT")
            changes = method == "PUT"
            may = self._access.to_change if changes else self._access.to_details
            if (denied := self._denials.of(may(headers))) is not None:
                return denied
            known = self.levels.find(name) if len(name) <= _MAX_NAME_CHARACTERS else None
            if known is None:
                return problem_response(
                    404, f"There is no such logger; {self._path} lists all loggers."
                )
            if changes:
                return ResponseFromBody(_MAX_BODY_BYTES, partial(self._change, known))
            return json_response(200, encode(schemas.logger_state(self.levels.get(known))))

        return endpoint

    def _change(self, name: str, body: bytes, scope: Scope) -> RawResponse:
        entry = AuditEntry(
            action=Action.LEVEL,
            actor=actor_of(self._access.caller(scope["headers"])),
            address=peer_of(scope),
            target=name,
        )
        entry.before = self.levels.get(name).effective
        try:
            wanted = _decode(body)
            level = self.levels.set(name, wanted.level)
        except FixedLevelError as error:
            entry.outcome, entry.detail = AuditOutcome.REFUSED, str(error)
            self._audit.record(entry)
            return problem_response(409, f"This level does not change: {error}.")
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
            words = ", ".join(LEVELS)
            detail = f'Send {{"level": ...}} with one of {words}, or null for the original level.'
            return problem_response(400, f"{detail} The level log is info in log lines.")
        entry.after = level.effective
        self._audit.record(entry)
        return json_response(200, encode(schemas.logger_state(level)))


class GroupEndpoints:
    """Serves ``/health/group/{group}``: the worst status of the checks of a group, and each."""

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]],
        *,
        monitor: HealthMonitor,
        clock: Clock,
        access: AccessPolicy,
        denials: DenialLog,
        path: str,
    ) -> None:
        self._groups = {name: tuple(dict.fromkeys(checks)) for name, checks in groups.items()}
        self._monitor = monitor
        self._clock = clock
        self._access = access
        self._denials = denials
        self._prefix = f"{path}/"

    def find(self, path: str) -> Endpoint | None:
        """Return the endpoint for the path of a group; None for any other path."""
        if not self._groups or not path.startswith(self._prefix):
            return None
        name = path[len(self._prefix) :]
        return None if not name or "/" in name else self._one(name)

    def _one(self, name: str) -> Endpoint:
        def endpoint(method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
            if method not in READ:
                return not_allowed("GET, HEAD")
            return self._denials.of(self._access.to_details(headers)) or self._state(name)

        return endpoint

    def _state(self, name: str) -> RawResponse:
        if name not in self._groups:
            names = ", ".join(self._groups)
            return problem_response(404, f"There is no such group; the groups are {names}.")
        reports = self._monitor.report().checks
        members = {check: reports[check] for check in self._groups[name]}
        worst = max((each.status for each in members.values()), key=lambda status: status.severity)
        body = encode(schemas.group_state(name, members, worst, self._clock.now()))
        if worst is not Status.FAIL:
            return json_response(200, body)
        failing = (each.policy for each in members.values() if each.status is Status.FAIL)
        return json_response(
            503, body, retry_after(min(policy.interval_when_failing for policy in failing))
        )


class OperationsEndpoints:
    """All operations endpoints below ``prefix``, and the metrics."""

    def __init__(
        self,
        operations: Operations,
        access: AccessPolicy,
        metrics: Metrics,
        *,
        prefix: str = "/health",
        metrics_path: str = "/metrics",
        groups: Mapping[str, Sequence[str]] | None = None,
        cors_origins: Sequence[str] = (),
        proxies: TrustedProxies | None = None,
        env_prefix: str = "",
    ) -> None:
        """``env_prefix`` is that of the variables that a warning names."""
        self._operations = operations
        self.proxies = proxies
        """The proxies that may name the client of a request; None: no peer may."""
        self._metrics = metrics
        self._lifecycle = operations.lifecycle
        self._monitor = operations.monitor
        self._clock = operations.clock
        self._access = access
        self.refusals = RefusalAudit(operations.audit, operations.clock)
        """Records refused requests."""
        self.brake = GuessBrake(operations.clock)
        """Delays the responses to wrong tokens, also those of the jobs API."""
        self.brake.subscribe(metrics.access.count_wrong_token)
        operations.shutdown.subscribe(lambda _: self.brake.release())
        self._denials = DenialLog(operations.clock, audit=self._record_refusal, brake=self.brake)
        self.address_warning = AddressWarning(operations.environment, env_prefix)
        """Warns of the first caller that is refused for its address."""
        self._local: OperationsEndpoints | None = None
        self._prefix = prefix
        self.path_prefix = f"{prefix}/"
        """The prefix of paths that may be served here although they are not in ``endpoints``."""
        self._environment = encode(operations.environment)
        self._ready: tuple[HealthReport | None, NotReadyReason | None, RawResponse] = (
            None,
            None,
            json_response(503, b""),
        )
        self._detailed: tuple[HealthReport | None, object, bytes, bytes] = (None, None, b"", b"")
        intervals = (self._monitor.policy(n).interval_when_failing for n in self._monitor.checks)
        self._next_poll = min(intervals, default=1.0)
        self._timestamp = (-1, b"")
        self._console: Console | None = None
        self._management_console: Console | None = None
        self._metrics_path = metrics_path
        self._group_names = groups or {}
        self._below: list[str] = []
        self._cors = CorsPolicy(cors_origins) if cors_origins else None
        self._levels = LoggerLevels()
        self._make_table()

    @property
    def access(self) -> AccessPolicy:
        """The rules of this port, for callers on other machines if :attr:`asks_for_address`."""
        return self._access

    @property
    def asks_for_address(self) -> bool:
        """True if callers on this machine have other rules; :meth:`for_caller` chooses."""
        return self._access.details is Exposure.MACHINE

    def for_caller(self, scope: Scope) -> "OperationsEndpoints":
        """Return the endpoints for the caller of a request: this machine's callers have others."""
        local = self.asks_for_address and is_on_this_machine(scope)
        return self._for_this_machine() if local else self

    def _for_this_machine(self) -> "OperationsEndpoints":
        if self._local is None:
            # Made at the first request, so that it has all that was added to these.
            policy, console = self._access.on_this_machine(), self._console
            if console is not None:
                console = console.at(ServingPort.API, policy)
            self._local = self._with(policy, console)
        return self._local

    def note_refusal(self, response: object, scope: Scope, path: str) -> None:
        """Warn once if ``response`` refuses what a caller on this machine may read at ``path``."""
        warning = self.address_warning
        if (
            warning.is_due
            and isinstance(response, Denied)
            and scope["method"] in READ
            and self.asks_for_address
            and not is_on_this_machine(scope)
        ):
            endpoint = self._for_this_machine().find(path)
            local = endpoint and endpoint(scope["method"], b"", scope["headers"])
            if not isinstance(local, Denied):
                warning.log(peer_of(scope), path)

    def _make_table(self) -> None:
        access, prefix, metrics_path = self._access, self._prefix, self._metrics_path
        self._loggers = LoggersEndpoints(
            access,
            self._denials,
            f"{prefix}/loggers",
            audit=self._operations.audit,
            levels=self._levels,
        )
        self._groups = GroupEndpoints(
            self._group_names,
            monitor=self._monitor,
            clock=self._clock,
            access=access,
            denials=self._denials,
            path=f"{prefix}/group",
        )
        process = ProcessEndpoints(self._operations, access, self._denials)
        self.endpoints: dict[str, Endpoint] = {
            prefix: self._read_only(self.basic),
            f"{prefix}/live": self._read_only(self.live),
            f"{prefix}/ready": self._read_only(self.ready),
            f"{prefix}/startup": self._read_only(self.startup),
            f"{prefix}/detailed": self._details,
            f"{prefix}/info": process.info,
            f"{prefix}/tasks": process.tasks,
            f"{prefix}/shutdown": self._shutdown,
            f"{prefix}/loggers": self._loggers.list,
            metrics_path: self._scrape,
        }
        """The endpoints by path. The first four read nothing but the method of the request."""
        for name in self._monitor.checks:
            self.endpoints.setdefault(f"{prefix}/{name}", self._one_check(name))
        if self._cors is not None:
            self.endpoints = {
                path: self._cors.apply(endpoint) for path, endpoint in self.endpoints.items()
            }

    def add_console(
        self,
        assembly: Assembly,
        settings: Settings,
        *,
        path: str = "/health",
        show_payload: ShowPayload | None = None,
    ) -> None:
        """Serve the console at the ports that the settings say; other origins cannot read it."""
        if ports := serving_ports(settings, self.access):
            console = Console(
                assembly,
                settings,
                path=path,
                policy=self.access,
                denials=self._denials,
                levels=self._loggers.levels,
                show_payload=show_payload,
            )
            policy = self.access.at_management_port(settings)
            self._management_console = console.at(ServingPort.MANAGEMENT, policy)
            if ServingPort.API in ports:
                self._console = console
                self.endpoints |= console.endpoints

    def at_management_port(self, settings: Settings) -> "OperationsEndpoints":
        """Return the same endpoints for the management port, with its access and console."""
        return self._with(self.access.at_management_port(settings), self._management_console)

    def _with(self, policy: AccessPolicy, console: Console | None) -> "OperationsEndpoints":
        """Return the same endpoints with another policy and console."""
        other = copy.copy(self)
        other._adopt(policy, console)  # noqa: SLF001 - of its own class
        return other

    def _adopt(self, policy: AccessPolicy, console: Console | None) -> None:
        self._access, self._console, self._local = policy, console, None
        self._make_table()
        if console is not None:
            self.endpoints |= console.endpoints
        below, self._below = self._below, []
        for path in below:
            self.serve_below(path)

    def count_requests(self, count: Callable[[], int]) -> None:
        """Show in the console how many requests of the application are in flight."""
        if self._management_console is not None:
            self._management_console.feed.requests = count

    @property
    def console(self) -> Console | None:
        """The console of this port; None if it is not served."""
        return self._console

    @property
    def feed(self) -> Feed | None:
        """The events for the console of all ports; None if no port serves it."""
        return None if self._management_console is None else self._management_console.feed

    def serve_below(self, path: str) -> None:
        """Serve the documented endpoints of known paths below ``path``, too; not the console."""
        if path := path.strip("/"):
            self._local = None
            self._below.append(path)
            own = {p: e for p, e in self.endpoints.items() if p.startswith(self._prefix)}
            for known in own.keys() - (self._console.endpoints if self._console else {}):
                self.endpoints[f"/{path}{known}"] = own[known]

    def find(self, path: str) -> Endpoint | None:
        """Return the endpoint for a path; None for an unknown path that is not below the prefix."""
        endpoint = self.endpoints.get(path)
        if endpoint is None and path.startswith(self.path_prefix):
            if self._console is not None and (file := self._console.find(path)) is not None:
                return file
            endpoint = self._loggers.find(path) or self._groups.find(path)
            if self._console is None and path[len(self.path_prefix) :] in {"ui", "events"}:
                endpoint = self._without_console
            # A path with one segment below the prefix is a check; a trailing slash is a segment.
            if endpoint is None and "/" not in path[len(self._prefix) + 1 : -1]:
                endpoint = self._unknown
            if endpoint is not None and self._cors is not None:
                endpoint = self._cors.apply(endpoint)
        return endpoint

    def _now(self) -> bytes:
        # Formatting a timestamp costs as much as the rest of a response, and most responses share
        # their millisecond with another one.
        millisecond = int(self._clock.monotonic() * 1000)
        cached_at, text = self._timestamp
        if cached_at != millisecond:
            text = timestamp(self._clock.now()).encode()
            self._timestamp = (millisecond, text)
        return text

    # -- the probes --------------------------------------------------------------------------

    def basic(self) -> RawResponse:
        """``GET /health``."""
        stopping = self._lifecycle.stopping
        body = b'{"status":"%s","timestamp":"%s","uptime":%.3f,"environment":%s}' % (
            b"shutting_down" if stopping else b"ok",
            self._now(),
            self._lifecycle.uptime,
            self._environment,
        )
        if stopping:
            return json_response(503, body, self._retry_after_shutdown())
        return json_response(200, body)

    def live(self) -> RawResponse:
        """``GET /health/live``: 200 as long as the event loop runs."""
        body = b'{"alive":true,"uptime":%.3f,"timestamp":"%s"}' % (
            self._lifecycle.uptime,
            self._now(),
        )
        return json_response(200, body)

    def ready(self) -> RawResponse:
        """``GET /health/ready``."""
        report = self._monitor.report()
        reason = self._lifecycle.follow(report)
        seen_report, seen_reason, response = self._ready
        if seen_report is report and seen_reason is reason and not self._lifecycle.stopping:
            return response
        body = schemas.readiness(report, reason)
        if reason is None:
            response = json_response(200, encode(body))
        elif reason is NotReadyReason.DRAINING:
            response = json_response(503, encode(body), self._retry_after_shutdown())
        else:
            response = json_response(503, encode(body), retry_after(self._next_poll))
        self._ready = (report, reason, response)
        return response

    def startup(self) -> RawResponse:
        """``GET /health/startup``."""
        report = self._monitor.report()
        self._lifecycle.follow(report)
        body = schemas.startup(report, application_started=self._lifecycle.application_started)
        if body.started:
            return json_response(200, encode(body))
        return json_response(503, encode(body), retry_after(1.0))

    def _retry_after_shutdown(self) -> tuple[bytes, bytes]:
        return retry_after(self._operations.shutdown.remaining())

    # -- details -----------------------------------------------------------------------------

    def detailed(self) -> RawResponse:
        """``GET /health/detailed``."""
        report = self._monitor.report()
        live = [each.live_details() for each in report.checks.values() if each.live_details]
        seen_report, seen_live, head, tail = self._detailed
        if seen_report is not report or seen_live != live:
            whole = encode(schemas.detailed(self._operations, report))
            # The report is encoded once, unless figures of the moment change. Timestamp and
            # uptime, the second and third field, are inserted into each response.
            head, _, tail = whole.partition(b',"timestamp":"","uptime":0.0,')
            self._detailed = (report, live, head, tail)
        body = b'%s,"timestamp":"%s","uptime":%.3f,%s' % (
            head,
            self._now(),
            self._lifecycle.uptime,
            tail,
        )
        if report.health is Health.UNHEALTHY:
            return json_response(503, body, retry_after(self._next_poll))
        return json_response(200, body)

    async def detailed_fresh(self) -> RawResponse:
        """``GET /health/detailed?fresh=1``: waits for one new round of checks."""
        await self._monitor.refresh()
        return self.detailed()

    def check(self, name: str) -> RawResponse:
        """``GET /health/{check}``; 404 for a name that is not registered."""
        report = self._monitor.report().checks.get(name)
        if report is None:
            return problem_response(404, f"There is no check named {name!r}.")
        body = encode(schemas.named_check(report, self._monitor.history))
        if report.status is Status.FAIL:
            return json_response(503, body, retry_after(report.policy.interval_when_failing))
        return json_response(200, body)

    # -- shutdown ----------------------------------------------------------------------------

    def begin_shutdown(self) -> RawResponse:
        """``POST /health/shutdown`` after authorization: 202 the first time, then 200."""
        if not self._operations.staged:
            return problem_response(
                409,
                "This server handles its own shutdown; run the application with `viralfx serve`.",
            )
        began = self._operations.shutdown.trigger(f"POST {self._prefix}/shutdown")
        body = schemas.shutdown_accepted(self._operations)
        location = (b"location", f"{self._prefix}/shutdown".encode())
        return json_response(202 if began else 200, encode(body), location)

    def shutdown_status(self) -> RawResponse:
        """``GET /health/shutdown`` after authorization; never begins a shutdown."""
        return json_response(200, encode(schemas.shutdown_status(self._operations)))

    # -- methods, queries and tokens ---------------------------------------------------------

    def _read_only(self, respond: Callable[[], RawResponse]) -> Endpoint:
        def endpoint(method: str, _query: bytes, _headers: Headers) -> RawResponse:
            return respond() if method in READ else not_allowed("GET, HEAD")

        return endpoint

    def _details(
        self, method: str, query: bytes, headers: Headers
    ) -> RawResponse | Awaitable[RawResponse] | Denied:
        if method not in READ:
            return not_allowed("GET, HEAD")
        # Polled often and denied rarely, so an allowed request makes no further call.
        verdict = self._access.to_details(headers)
        if (
            verdict is not AccessVerdict.ALLOWED
            and (denied := self._denials.of(verdict)) is not None
        ):
            return denied
        if query and parse_qs(query.decode("latin-1")).get("fresh") == ["1"]:
            return self.detailed_fresh()
        return self.detailed()

    def _one_check(self, name: str) -> Endpoint:
        def endpoint(method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
            if method not in READ:
                return not_allowed("GET, HEAD")
            return self._denials.of(self._access.to_details(headers)) or self.check(name)

        return endpoint

    def _shutdown(self, method: str, _query: bytes, headers: Headers) -> RawResponse | Recorded:
        if method not in (*READ, "POST"):
            return not_allowed("GET, HEAD, POST")
        may = self._access.to_shutdown if method == "POST" else self._access.to_process
        if (denied := self._denials.of(may(headers))) is not None:
            return denied
        if method == "POST":
            return Recorded(self.begin_shutdown(), self._record_stop)
        return self.shutdown_status()

    def _record_refusal(self, scope: Scope, status: int, action: Action, actor: str | None) -> None:
        actor = actor or actor_of(self._access.caller(scope["headers"]))
        self.refusals.record(scope, status, action, actor=actor)

    def _record_stop(self, scope: Scope, status: int) -> None:
        words = {200: "it had begun", 409: "this server handles its own stop"}
        refused = status == HTTPStatus.CONFLICT
        self._operations.audit.record(
            AuditEntry(
                action=Action.STOP,
                actor=actor_of(self._access.caller(scope["headers"])),
                address=peer_of(scope),
                target=self._operations.instance,
                outcome=AuditOutcome.REFUSED if refused else AuditOutcome.DONE,
                detail=words.get(status),
            )
        )

    def _scrape(self, method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
        if method not in READ:
            return not_allowed("GET, HEAD")
        if (denied := self._denials.of(self._access.to_details(headers))) is not None:
            return denied
        accept = b",".join(value for name, value in headers if name == b"accept")
        body, media_type = self._metrics.render(accept.decode("latin-1"))
        return raw_response(media_type.encode(), 200, body)

    @staticmethod
    def _without_console(_method: str, _query: bytes, _headers: Headers) -> RawResponse:
        return problem_response(404, "The console is not served here.")

    def _unknown(self, _method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
        # The names of the checks are details, too.
        if (denied := self._denials.of(self._access.to_details(headers))) is not None:
            return denied
        names = ", ".join(self._monitor.checks)
        return problem_response(404, f"There is no such check; the checks are {names}.")
