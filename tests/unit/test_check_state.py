"""The state of one check: thresholds, age, and the details that belong to a status."""

from datetime import UTC, datetime, timedelta

import pytest
from tests.unit.doubles import observed

from viralfx.domain.health.check_state import CheckTracker
from viralfx.domain.health.model import (
    CheckPolicy,
    CheckReport,
    Details,
    Observation,
    Status,
    Transition,
)

EPOCH = datetime(2026, 1, 6, 12, tzinfo=UTC)
P, W, F = Status.PASS, Status.WARN, Status.FAIL


class Track:
    """A tracker with a clock: observations are one second apart."""

    def __init__(self, policy: CheckPolicy) -> None:
        self.track = CheckTracker("database", policy, EPOCH)
        self.time = 0.0

    def see(self, observation: Observation) -> CheckReport:
        """Record one observation and evaluate."""
        self.time += 1
        self.track.record(
            observation,
            response_time=0.25,
            correlation_id=f"id-{self.time:g}",
            monotonic=self.time,
            at=EPOCH + timedelta(seconds=self.time),
        )
        return self.observe()[0]

    def observe(self, later: float = 0.0) -> tuple[CheckReport, Transition | None]:
        """Evaluate ``later`` seconds from the last observation."""
        return self.track.evaluate(self.time + later, EPOCH + timedelta(seconds=self.time + later))


def statuses(policy: CheckPolicy, *seen: Status) -> list[Status]:
    """Return the published status after each observation."""
    track = Track(policy)
    return [track.see(observed(status)).status for status in seen]


@pytest.mark.parametrize(
    ("seen", "published"),
    [
        ([P, F, F, F], [P, P, P, F]),
        ([P, F, F, P, F, F, F], [P, P, P, P, P, P, F]),
        ([P, W, W, W], [P, P, P, W]),
        ([P, W, F, F], [P, P, P, W]),
        ([P, F, F, W, F, F, F], [P, P, P, W, W, W, F]),
    ],
    ids=["steady", "interrupted", "warnings", "mildest of the run", "worse in steps"],
)
def test_a_worse_status_needs_the_failure_threshold(
    seen: list[Status], published: list[Status]
) -> None:
    """It becomes the mildest status of the run of worse observations."""
    assert published == statuses(CheckPolicy(failure_threshold=3), *seen)


@pytest.mark.parametrize(
    ("seen", "published"),
    [
        ([F, P, P], [F, F, P]),
        ([F, P, F, P, P], [F, F, F, F, P]),
        ([F, W, P], [F, F, W]),
        ([F, W, P, P], [F, F, W, P]),
    ],
    ids=["steady", "interrupted", "worst of the run", "better in steps"],
)
def test_a_better_status_needs_the_recovery_threshold(
    seen: list[Status], published: list[Status]
) -> None:
    """It becomes the worst status of the run of better observations."""
    assert published == statuses(CheckPolicy(recovery_threshold=2), *seen)


@pytest.mark.parametrize("seen", [[P, F], [P, F, F, P], [F, P], [W, P], [W, F], [P, W, F]])
def test_message_code_and_details_belong_to_the_status(seen: list[Status]) -> None:
    """They come from an observation with the published status."""
    track = Track(CheckPolicy(failure_threshold=2, recovery_threshold=2))

    for status in seen:
        report = track.see(observed(status))
        shown = observed(report.status)

        assert (shown.message, shown.details) == (report.message, report.details)
        assert shown.code == report.code


def test_the_newest_observation_with_the_status_is_shown() -> None:
    """Older observations with the same status are not shown."""
    track = Track(CheckPolicy())
    track.see(Observation(status=W, message="first", code="one"))

    report = track.see(Observation(status=W, message="second", code="two"))

    assert (report.message, report.code) == ("second", "two")


def test_passing_check_shows_no_code() -> None:
    """A code names a problem, so a passing check has none."""
    assert Track(CheckPolicy()).see(observed(P, code="odd")).code is None


def test_problem_without_code_gets_its_status_as_code() -> None:
    """A failing check without a code gets one."""
    report = Track(CheckPolicy()).see(Observation(status=W, message="hm"))

    assert report.code == "warn"


def test_a_check_without_a_result_fails_as_pending() -> None:
    """It fails until the first observation."""
    report, transition = Track(CheckPolicy()).observe()

    assert (
        report.status,
        report.code,
        report.checked_at,
        report.response_time,
    ) == (F, "pending", None, None)
    assert transition is None


@pytest.mark.parametrize("status", [P, W])
def test_a_result_is_stale_exactly_at_its_maximum_age(status: Status) -> None:
    """From then on the check fails with code ``stale``."""
    track = Track(CheckPolicy(max_age=10.0))
    track.see(observed(status))

    just_before, _ = track.observe(later=9.999)
    at, transition = track.observe(later=10.0)

    assert just_before.status is status
    assert (at.status, at.code) == (F, "stale")
    assert transition is not None
    assert (status, F, "stale") == (transition.old, transition.new, transition.code)


def test_a_failure_does_not_become_stale() -> None:
    """Age does not hide the reason of a failure."""
    track = Track(CheckPolicy(max_age=10.0))
    track.see(observed(F))

    report, _ = track.observe(later=1000.0)

    assert (report.status, report.code) == (F, "code-fail")


def test_a_stale_check_recovers_with_the_next_observation() -> None:
    """One observation with the same status is enough."""
    track = Track(CheckPolicy(max_age=1.5, recovery_threshold=3))
    track.see(observed(P))
    track.observe(later=2.0)

    assert track.see(observed(P)).status is P


def test_any_observation_renews_the_age() -> None:
    """An observation below a threshold keeps the published status from becoming stale."""
    track = Track(CheckPolicy(max_age=1.5, failure_threshold=9))
    track.see(observed(P))
    track.see(observed(F))

    assert track.observe(later=1.0)[0].status is P


@pytest.mark.parametrize(
    ("policy", "oldest"),
    [
        (CheckPolicy(interval=5, timeout=2), 17.0),
        (CheckPolicy(interval=30, retry_interval=5, timeout=2), 92.0),
        (CheckPolicy(interval=5, retry_interval=10, timeout=1), 31.0),
        (CheckPolicy(max_age=0.5), 0.5),
    ],
    ids=["three intervals", "the longer interval", "retries are slower", "given"],
)
def test_default_age_is_three_intervals_and_a_timeout(policy: CheckPolicy, oldest: float) -> None:
    """Without ``max_age`` the longer of the two intervals counts."""
    assert oldest == policy.oldest_allowed


def test_each_change_causes_one_transition() -> None:
    """Evaluating again without a change returns no transition."""
    track = Track(CheckPolicy())
    track.track.record(observed(P), response_time=0.1, correlation_id="a", monotonic=1.0, at=EPOCH)

    first = track.observe()[1]
    second = track.observe()[1]

    assert first is not None
    assert (first.old, first.new, first.correlation_id) == (None, P, "a")
    assert second is None


def test_since_is_the_time_of_the_last_change() -> None:
    """``since`` changes with the status only."""
    track = Track(CheckPolicy())

    assert track.observe()[0].since == EPOCH
    assert EPOCH + timedelta(seconds=1) == track.see(observed(P)).since
    assert EPOCH + timedelta(seconds=1) == track.see(observed(P)).since
    assert EPOCH + timedelta(seconds=3) == track.see(observed(F)).since


def test_passing_needs_the_status_and_the_last_observation() -> None:
    """The slow interval applies only if the last observation passed as well."""
    track = Track(CheckPolicy(failure_threshold=2, recovery_threshold=2))
    passing = []
    for status in (P, F, P, F, F, P, P):
        track.see(observed(status))
        passing.append(track.track.passing)

    assert passing == [True, False, True, False, False, False, True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval": 0.0},
        {"interval": float("nan")},
        {"retry_interval": -1.0},
        {"timeout": float("inf")},
        {"max_age": 0.0},
        {"failure_threshold": 0},
        {"recovery_threshold": -1},
    ],
    ids=str,
)
def test_an_invalid_policy_is_rejected(wrong: dict[str, float]) -> None:
    """The error names the invalid value."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CheckPolicy(**wrong)  # type: ignore[arg-type]


def test_the_correlation_id_belongs_to_the_shown_observation() -> None:
    """Below the recovery threshold it is that of the failed attempt."""
    track = Track(CheckPolicy(recovery_threshold=2))
    track.see(observed(F))
    report = track.see(observed(P))

    assert (report.status, report.correlation_id) == (F, "id-1")


@pytest.mark.parametrize(
    ("details", "nothing"), [([{"name": "default"}], ()), ({"isConnected": True}, {})]
)
def test_a_timeout_has_empty_details_of_the_same_type(details: Details, nothing: Details) -> None:
    """A client that expects a list gets an empty list."""
    track = Track(CheckPolicy())
    seen = track.see(Observation(status=P, message="fine", details=details))
    late = track.see(Observation(status=F, message="no answer", code="timeout"))

    assert (seen.details, late.details) == (details, nothing)


def test_a_message_and_a_code_are_cut() -> None:
    """The monitor keeps those of 100 changes, and each page of the console shows them."""
    track = Track(CheckPolicy())
    huge = Observation(status=F, message="m" * 10_000_000, code="c" * 10_000_000)
    report = track.see(huge)

    assert (len(report.message), len(report.code or "")) == (2000, 2000)
    assert report.message.endswith("m...")
    whole = Observation(status=W, message="m" * 2000, code="c")
    assert (whole.message, whole.code) == ("m" * 2000, "c")
