"""The endpoints that show the inside of the process: build, adapters, stacks, levels of loggers."""

import asyncio
import platform

import msgspec

from viralfx.domain.clock import timestamp
from viralfx.domain.operations import Operations
from viralfx.telemetry.context import stacks_of_tasks, stacks_of_threads
from viralfx.telemetry.logging.lines import LEVELS, LoggerLevel, LoggerLevels
from viralfx.web.auth import AccessPolicy, Headers
from viralfx.web.responses import (
    READ,
    DenialLog,
    Denied,
    Endpoint,
    RawResponse,
    ResponseFromBody,
    encode,
    json_response,
    not_allowed,
    problem_response,
    raw_response,
)
from viralfx.web.schemas import Info, Loggers, LoggerState, NewLevel

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
        operations = self._operations
        body = Info(
            version=operations.version,
            commit=operations.revision,
            started_at=timestamp(operations.started_at),
            python=platform.python_version(),
            environment=operations.environment,
            instance=operations.instance,
            role=operations.role,
            adapters=dict(operations.adapters),
        )
        return json_response(200, encode(body))

    def tasks(self, method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
        """``GET /health/tasks``: the stacks of all threads, and of all tasks of the event loop."""
        if method not in READ:
            return not_allowed("GET, HEAD")
        if (denied := self._denials.of(self._access.to_stacks(headers))) is not None:
            return denied
        text = f"{stacks_of_threads()}\n{stacks_of_tasks(asyncio.get_running_loop())}"
        return raw_response(_TEXT, 200, text.encode("utf-8", "backslashreplace"))


_MAX_BODY_BYTES = 1024
"""The body holds one level."""
_MAX_NAME_CHARACTERS = 200

_decode = msgspec.json.Decoder(NewLevel).decode


class LoggersEndpoints:
    """Serves ``/health/loggers`` and ``/health/loggers/{name}``."""

    def __init__(self, access: AccessPolicy, denials: DenialLog, path: str) -> None:
        self._access = access
        self._denials = denials
        self._path = path
        self.levels = LoggerLevels()
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
        loggers = {name: _state(level) for name, level in self.levels.all().items()}
        return json_response(200, encode(Loggers(levels=list(LEVELS), loggers=loggers)))

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
                return ResponseFromBody(_MAX_BODY_BYTES, lambda body, _: self._change(known, body))
            return json_response(200, encode(_state(self.levels.get(known))))

        return endpoint

    def _change(self, name: str, body: bytes) -> RawResponse:
        try:
            wanted = _decode(body)
            level = self.levels.set(name, wanted.level)
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
            words = ", ".join(LEVELS)
            detail = f'Send {{"level": ...}} with one of {words}, or null for the original level.'
            return problem_response(400, f"{detail} The level log is info in log lines.")
        return json_response(200, encode(_state(level)))


def _state(level: LoggerLevel) -> LoggerState:
    return LoggerState(level=level.level, effective_level=level.effective)
