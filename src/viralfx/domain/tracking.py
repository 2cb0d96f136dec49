"""One check's memory: thresholds, age and the status they amount to. Pure; no tasks, no clock."""

from collections import deque
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from viralfx.domain.health import (
    CheckPolicy,
    CheckReport,
    Details,
    Observation,
    Status,
    Transition,
)


class _Seen(NamedTuple):
    observation: Observation
    correlation_id: str


class CheckTrack:
    """Turns the raw observations of one check into the status that others see.

    A status is believed once it was sustained: for the worse, the mildest of the last
    ``failure_threshold`` observations; for the better, the worst of the last
    ``recovery_threshold``. The first observation is believed at once. Thresholds therefore
    never invent a status that was not observed throughout the run.
    """

    def __init__(self, name: str, policy: CheckPolicy, created_at: datetime) -> None:
        self.name = name
        self.policy = policy
        self._recent: deque[_Seen] = deque(
            maxlen=max(policy.failure_threshold, policy.recovery_threshold)
        )
        self._believed: Status | None = None
        self._shown: _Seen | None = None
        self._recorded_at: float | None = None
        self._checked_at: datetime | None = None
        self._response_time: float | None = None
        self._status_seen: Status | None = None
        self._since = created_at
        self._nothing: Details = {}
        """Empty details, in the form that the check's have had."""

    @property
    def reported(self) -> bool:
        """Whether the check has been observed at all."""
        return self._shown is not None

    @property
    def passing(self) -> bool:
        """Whether both the believed status and the last raw observation pass."""
        if self._believed is not Status.PASS:
            return False
        return self._recent[-1].observation.status is Status.PASS

    @property
    def stale_at(self) -> float:
        """Monotonic time from which the last result is too old (infinite before the first)."""
        if self._recorded_at is None:
            return float("inf")
        return self._recorded_at + self.policy.oldest_allowed

    def record(
        self,
        observation: Observation,
        *,
        response_time: float,
        correlation_id: str,
        monotonic: float,
        at: datetime,
    ) -> None:
        """Take in one observation; ``monotonic`` and ``at`` are the time it was completed."""
        self._recent.append(_Seen(observation, correlation_id))
        if observation.details:
            self._nothing = {} if isinstance(observation.details, Mapping) else ()
        self._recorded_at = monotonic
        self._checked_at = at
        self._response_time = response_time
        newest_first = list(reversed(self._recent))
        self._believed = self._sustained([seen.observation.status for seen in newest_first])
        # Show the newest observation that says what is believed, so that message, details, code
        # and correlation id always belong to the status they stand beside.
        matching = (s for s in newest_first if s.observation.status is self._believed)
        self._shown = next(matching, self._shown)

    def _sustained(self, newest_first: list[Status]) -> Status:
        if self._believed is None:
            return newest_first[0]
        worse = newest_first[: self.policy.failure_threshold]
        if len(worse) == self.policy.failure_threshold:
            mildest = min(worse, key=lambda status: status.severity)
            if mildest.severity > self._believed.severity:
                return mildest
        better = newest_first[: self.policy.recovery_threshold]
        if len(better) == self.policy.recovery_threshold:
            worst = max(better, key=lambda status: status.severity)
            if worst.severity < self._believed.severity:
                return worst
        return self._believed

    def evaluate(self, monotonic: float, at: datetime) -> tuple[CheckReport, Transition | None]:
        """Say what the check amounts to now, and whether that is a change since the last call."""
        status, message, code, details = self._verdict(monotonic)
        correlation_id = self._shown.correlation_id if self._shown else None
        transition = None
        if self.reported and status is not self._status_seen:
            transition = Transition(
                check=self.name,
                old=self._status_seen,
                new=status,
                code=code,
                message=message,
                at=at,
                correlation_id=correlation_id,
            )
            self._status_seen = status
            self._since = at
        report = CheckReport(
            name=self.name,
            status=status,
            message=message,
            details=details,
            code=code,
            correlation_id=correlation_id,
            response_time=self._response_time,
            checked_at=self._checked_at,
            since=self._since,
            policy=self.policy,
        )
        return report, transition

    def _verdict(self, monotonic: float) -> tuple[Status, str, str | None, Details]:
        if self._shown is None:
            return Status.FAIL, f"{self.name} has not been checked yet", "pending", {}
        shown = self._shown.observation
        if shown.status is not Status.FAIL and monotonic >= self.stale_at:
            message = f"{self.name} has no result newer than {self.policy.oldest_allowed:g} s"
            return Status.FAIL, message, "stale", shown.details
        if shown.status is Status.PASS:
            return shown.status, shown.message, None, shown.details
        # One that did not answer tells nothing; who reads a list must find one all the same.
        details = shown.details or self._nothing
        return shown.status, shown.message, shown.code or str(shown.status), details
