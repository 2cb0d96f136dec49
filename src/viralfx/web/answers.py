"""The answers of the operations endpoints, as status, headers and bytes.

Everything here is synchronous and reads what is already known, except a forced round of checks and
the body of a request that changes something.
The same answers are given ahead of an application's routing and by its documented routes.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs

from viralfx.domain.clock import timestamp
from viralfx.domain.health import Health, HealthReport, Status
from viralfx.domain.lifecycle import NotReadyReason
from viralfx.domain.operations import Operations
from viralfx.telemetry.metrics import Metrics
from viralfx.web import bodies
from viralfx.web.access import AccessPolicy, Headers, Verdict
from viralfx.web.loggers import LoggersEndpoints
from viralfx.web.refusals import Refusals
from viralfx.web.replies import (
    NO_STORE,
    READ,
    Answer,
    Endpoint,
    Refused,
    answer_with,
    encode,
    not_allowed,
    problem_answer,
    retry_after,
)

_MILLISECOND = timedelta(milliseconds=1)


class OperationsAnswers:
    """Answers every operations endpoint below ``prefix``."""

    def __init__(
        self,
        operations: Operations,
        access: AccessPolicy,
        metrics: Metrics,
        *,
        prefix: str = "/health",
        metrics_path: str = "/metrics",
    ) -> None:
        self._operations = operations
        self._metrics = metrics
        self._lifecycle = operations.lifecycle
        self._monitor = operations.monitor
        self._clock = operations.clock
        self._access = access
        self._refusals = Refusals(operations.clock)
        self._prefix = prefix
        self.below = f"{prefix}/"
        """What a path begins with that may be answered here though it is not listed."""
        self._environment = encode(operations.environment)
        self._ready: tuple[HealthReport | None, NotReadyReason | None, Answer] = (
            None,
            None,
            answer_with(503, b""),
        )
        self._detailed: tuple[HealthReport | None, bytes, bytes] = (None, b"", b"")
        intervals = (self._monitor.policy(n).interval_when_failing for n in self._monitor.checks)
        self._next_look = min(intervals, default=1.0)
        self._moment = (datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC), b"")
        self._loggers = LoggersEndpoints(access, self._refusals, f"{prefix}/loggers")
        self.endpoints: dict[str, Endpoint] = {
            prefix: self._reading(self.basic),
            f"{prefix}/live": self._reading(self.live),
            f"{prefix}/ready": self._reading(self.ready),
            f"{prefix}/startup": self._reading(self.startup),
            f"{prefix}/detailed": self._details,
            f"{prefix}/shutdown": self._shutdown,
            f"{prefix}/loggers": self._loggers.list,
            metrics_path: self._scrape,
        }
        """By path; the first four answer without looking at the request."""
        for name in self._monitor.checks:
            self.endpoints.setdefault(f"{prefix}/{name}", self._one_check(name))

    def find(self, path: str) -> Endpoint | None:
        """Return what answers a path; None for one that is neither known nor below the prefix."""
        endpoint = self.endpoints.get(path)
        if endpoint is None and path.startswith(self.below):
            if (logger := self._loggers.find(path)) is not None:
                return logger
            # One segment below the prefix is ours, known or not; a trailing slash is a segment.
            return self._unknown if "/" not in path[len(self._prefix) + 1 : -1] else None
        return endpoint

    def _now(self) -> bytes:
        # Most answers are in the same millisecond as another, and a time costs as much as they do.
        moment = self._clock.now()
        began, over, text = self._moment
        if not began <= moment < over:
            text = timestamp(moment).encode()
            began = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
            self._moment = (began, began + _MILLISECOND, text)
        return text

    # -- the probes --------------------------------------------------------------------------

    def basic(self) -> Answer:
        """``GET /health``."""
        stopping = self._lifecycle.stopping
        body = b'{"status":"%s","timestamp":"%s","uptime":%.3f,"environment":%s}' % (
            b"shutting_down" if stopping else b"ok",
            self._now(),
            self._lifecycle.uptime,
            self._environment,
        )
        if stopping:
            return answer_with(503, body, self._until_the_end())
        return answer_with(200, body)

    def live(self) -> Answer:
        """``GET /health/live``: 200 as long as the loop runs at all."""
        body = b'{"alive":true,"uptime":%.3f,"timestamp":"%s"}' % (
            self._lifecycle.uptime,
            self._now(),
        )
        return answer_with(200, body)

    def ready(self) -> Answer:
        """``GET /health/ready``."""
        report = self._monitor.report()
        reason = self._lifecycle.follow(report)
        seen_report, seen_reason, answer = self._ready
        if seen_report is report and seen_reason is reason and not self._lifecycle.stopping:
            return answer
        body = bodies.readiness(report, reason)
        if reason is None:
            answer = answer_with(200, encode(body))
        elif reason is NotReadyReason.DRAINING:
            answer = answer_with(503, encode(body), self._until_the_end())
        else:
            answer = answer_with(503, encode(body), retry_after(self._next_look))
        self._ready = (report, reason, answer)
        return answer

    def startup(self) -> Answer:
        """``GET /health/startup``."""
        report = self._monitor.report()
        self._lifecycle.follow(report)
        body = bodies.startup(report, application_started=self._lifecycle.application_started)
        if body.started:
            return answer_with(200, encode(body))
        return answer_with(503, encode(body), retry_after(1.0))

    def _until_the_end(self) -> tuple[bytes, bytes]:
        return retry_after(self._operations.shutdown.remaining())

    # -- details -----------------------------------------------------------------------------

    def detailed(self) -> Answer:
        """``GET /health/detailed``."""
        report = self._monitor.report()
        seen_report, head, tail = self._detailed
        if seen_report is not report:
            whole = encode(bodies.detailed(self._operations, report))
            # Time goes on while the report stays, so the two moving fields, which come second
            # and third, are written anew into each answer.
            head, _, tail = whole.partition(b',"timestamp":"","uptime":0.0,')
            self._detailed = (report, head, tail)
        body = b'%s,"timestamp":"%s","uptime":%.3f,%s' % (
            head,
            self._now(),
            self._lifecycle.uptime,
            tail,
        )
        if report.health is Health.UNHEALTHY:
            return answer_with(503, body, retry_after(self._next_look))
        return answer_with(200, body)

    async def detailed_fresh(self) -> Answer:
        """``GET /health/detailed?fresh=1``: after one new round of checks."""
        await self._monitor.refresh()
        return self.detailed()

    def check(self, name: str) -> Answer:
        """``GET /health/{check}``; 404 for a name that is not registered."""
        report = self._monitor.report().checks.get(name)
        if report is None:
            return problem_answer(404, f"There is no check named {name!r}.")
        body = encode(bodies.named_check(report, self._monitor.history))
        if report.status is Status.FAIL:
            return answer_with(503, body, retry_after(report.policy.interval_when_failing))
        return answer_with(200, body)

    # -- shutdown ----------------------------------------------------------------------------

    def begin_shutdown(self) -> Answer:
        """``POST /health/shutdown``, already authorised: 202 the first time, 200 after it."""
        if not self._operations.staged:
            return problem_answer(
                409, "This server stops by its own signals; run it under `viralfx serve`."
            )
        began = self._operations.shutdown.trigger(f"POST {self._prefix}/shutdown")
        body = bodies.shutdown_accepted(self._operations)
        location = (b"location", f"{self._prefix}/shutdown".encode())
        return answer_with(202 if began else 200, encode(body), location)

    def shutdown_status(self) -> Answer:
        """``GET /health/shutdown``, already authorised; it never triggers anything."""
        return answer_with(200, encode(bodies.shutdown_status(self._operations)))

    # -- methods, queries and tokens ---------------------------------------------------------

    def _reading(self, give: Callable[[], Answer]) -> Endpoint:
        def endpoint(method: str, _query: bytes, _headers: Headers) -> Answer:
            return give() if method in READ else not_allowed("GET, HEAD")

        return endpoint

    def _details(
        self, method: str, query: bytes, headers: Headers
    ) -> Answer | Awaitable[Answer] | Refused:
        if method not in READ:
            return not_allowed("GET, HEAD")
        # As rarely refused as it is often polled: no call more than one where it is allowed.
        verdict = self._access.to_details(headers)
        if verdict is not Verdict.ALLOWED and (refusal := self._refusals.of(verdict)) is not None:
            return refusal
        if query and parse_qs(query.decode("latin-1")).get("fresh") == ["1"]:
            return self.detailed_fresh()
        return self.detailed()

    def _one_check(self, name: str) -> Endpoint:
        def endpoint(method: str, _query: bytes, headers: Headers) -> Answer | Refused:
            if method not in READ:
                return not_allowed("GET, HEAD")
            return self._refusals.of(self._access.to_details(headers)) or self.check(name)

        return endpoint

    def _shutdown(self, method: str, _query: bytes, headers: Headers) -> Answer | Refused:
        if method not in (*READ, "POST"):
            return not_allowed("GET, HEAD, POST")
        if (refusal := self._refusals.of(self._access.to_shutdown(headers))) is not None:
            return refusal
        return self.begin_shutdown() if method == "POST" else self.shutdown_status()

    def _scrape(self, method: str, _query: bytes, headers: Headers) -> Answer | Refused:
        if method not in READ:
            return not_allowed("GET, HEAD")
        if (refusal := self._refusals.of(self._access.to_details(headers))) is not None:
            return refusal
        accept = b",".join(value for name, value in headers if name == b"accept")
        body, media_type = self._metrics.render(accept.decode("latin-1"))
        length = (b"content-length", b"%d" % len(body))
        return Answer(200, [(b"content-type", media_type.encode()), length, NO_STORE], body)

    def _unknown(self, _method: str, _query: bytes, _headers: Headers) -> Answer:
        names = ", ".join(self._monitor.checks)
        return problem_answer(404, f"There is no such check; there are {names}.")
