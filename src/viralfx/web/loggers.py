"""The levels of the loggers, seen and changed while the process runs."""

import msgspec

from viralfx.telemetry.log_levels import LEVELS, LoggerLevel, LoggerLevels
from viralfx.web.access import AccessPolicy, Headers
from viralfx.web.refusals import Refusals
from viralfx.web.replies import (
    READ,
    Answer,
    Endpoint,
    Refused,
    WithBody,
    answer_with,
    encode,
    not_allowed,
    problem_answer,
)
from viralfx.web.schemas import Loggers, LoggerState, NewLevel

_MOST = 1024
"""Bytes of a body: it holds one word."""
_LONGEST_NAME = 200

_decode = msgspec.json.Decoder(NewLevel).decode


class LoggersEndpoints:
    """Answers ``/health/loggers`` and the names below it."""

    def __init__(self, access: AccessPolicy, refusals: Refusals, path: str) -> None:
        self._access = access
        self._refusals = refusals
        self._path = path
        self._levels = LoggerLevels()

    def find(self, path: str) -> Endpoint | None:
        """Return what answers a path; None for one that is not that of a logger."""
        if not path.startswith(f"{self._path}/"):
            return None
        name = path[len(self._path) + 1 :]
        return self._one(name) if "/" not in name else None

    def list(self, method: str, _query: bytes, headers: Headers) -> Answer | Refused:
        """``GET /health/loggers``."""
        if method not in READ:
            return not_allowed("GET, HEAD")
        if (refusal := self._refusals.of(self._access.to_details(headers))) is not None:
            return refusal
        loggers = {name: _state(level) for name, level in self._levels.all().items()}
        return answer_with(200, encode(Loggers(levels=list(LEVELS), loggers=loggers)))

    def _one(self, name: str) -> Endpoint:
        def endpoint(method: str, _query: bytes, headers: Headers) -> Answer | WithBody | Refused:
            if method not in (*READ, "PUT"):
                return not_allowed("GET, HEAD, PUT")
            changes = method == "PUT"
            may = self._access.to_change if changes else self._access.to_details
            if (refusal := self._refusals.of(may(headers))) is not None:
                return refusal
            known = self._levels.find(name) if len(name) <= _LONGEST_NAME else None
            if known is None:
                return problem_answer(404, f"There is no such logger; {self._path} has them all.")
            if changes:
                return WithBody(_MOST, lambda body: self._change(known, body))
            return answer_with(200, encode(_state(self._levels.get(known))))

        return endpoint

    def _change(self, name: str, body: bytes) -> Answer:
        try:
            wanted = _decode(body)
            level = self._levels.set(name, wanted.level)
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
            words = ", ".join(LEVELS)
            detail = f'Send {{"level": ...}} with one of {words}, or null for what it was before.'
            return problem_answer(400, f"{detail} What log lines call info is log.")
        return answer_with(200, encode(_state(level)))


def _state(level: LoggerLevel) -> LoggerState:
    return LoggerState(level=level.level, effective_level=level.effective)
