"""One check's memory: thresholds, age, and what stands beside the status."""

from datetime import UTC, datetime, timedelta

import pytest
from tests.unit.doubles import observed

from viralfx.domain.health import (
    CheckPolicy,
    CheckReport,
    Details,
    Observation,
    Status,
    Transition,
)
from viralfx.domain.tracking import CheckTrack

EPOCH = datetime(2026, 1, 6, 12, tzinfo=UTC)
P, W, F = Status.PASS, Status.WARN, Status.FAIL


class Track:
    """A track with a clock: each observation comes one second after the other."""

    def __init__(self, policy: CheckPolicy) -> None:
        self.track = CheckTrack("database", policy, EPOCH)
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
        return self.look()[0]

    def look(self, later: float = 0.0) -> tuple[CheckReport, Transition | None]:
        """Evaluate ``later`` seconds from the last observation."""
        return self.track.evaluate(self.time + later, EPOCH + timedelta(seconds=self.time + later))


def statuses(policy: CheckPolicy, *seen: Status) -> list[Status]:
    """Say what is believed after each of the observations."""
    track = Track(policy)
    return [track.see(observed(status)).status for status in seen]


def test_first_observation_is_believed_at_once() -> None:
    """Thresholds delay changes, not the first result."""
    policy = CheckPolicy(failure_threshold=3, recovery_threshold=3)

    assert statuses(policy, F) == [F]
    assert statuses(policy, P) == [P]


def test_without_thresholds_each_observation_counts() -> None:
    """Thresholds of one follow every observation."""
    assert statuses(CheckPolicy(), P, F, P, W, F, W, P) == [P, F, P, W, F, W, P]


@pytest.mark.parametrize(
    ("seen", "believed"),
    [
        ([P, F, F, F], [P, P, P, F]),
        ([P, F, F, P, F, F, F], [P, P, P, P, P, P, F]),
        ([P, W, W, W], [P, P, P, W]),
        ([P, W, F, F], [P, P, P, W]),
        ([P, F, F, W, F, F, F], [P, P, P, W, W, W, F]),
    ],
    ids=["steady", "interrupted", "warnings", "mildest of the run", "worse in steps"],
)
def test_worse_takes_the_failure_threshold(seen: list[Status], believed: list[Status]) -> None:
    """A status gets worse to the mildest of a full run of worse observations."""
    assert believed == statuses(CheckPolicy(failure_threshold=3), *seen)


@pytest.mark.parametrize(
    ("seen", "believed"),
    [
        ([F, P, P], [F, F, P]),
        ([F, P, F, P, P], [F, F, F, F, P]),
        ([F, W, P], [F, F, W]),
        ([F, W, P, P], [F, F, W, P]),
    ],
    ids=["steady", "interrupted", "worst of the run", "better in steps"],
)
def test_better_takes_the_recovery_threshold(seen: list[Status], believed: list[Status]) -> None:
    """A status gets better to the worst of a full run of better observations."""
    assert believed == statuses(CheckPolicy(recovery_threshold=2), *seen)


def test_thresholds_differ_by_direction() -> None:
    """Each direction has its own threshold."""
    policy = CheckPolicy(failure_threshold=1, recovery_threshold=3)

    assert statuses(policy, P, F, P, P, P, F) == [P, F, F, F, P, F]


@pytest.mark.parametrize("seen", [[P, F], [P, F, F, P], [F, P], [W, P], [W, F], [P, W, F]])
def test_message_code_and_details_belong_to_the_status(seen: list[Status]) -> None:
    """What is shown beside a status comes from an observation that had that status."""
    track = Track(CheckPolicy(failure_threshold=2, recovery_threshold=2))

    for status in seen:
        report = track.see(observed(status))
        shown = observed(report.status)

        assert (shown.message, shown.details) == (report.message, report.details)
        assert shown.code == report.code


def test_newest_fitting_observation_is_shown() -> None:
    """Among observations of the believed status the newest is shown."""
    track = Track(CheckPolicy())
    track.see(Observation(status=W, message="first", code="one"))

    report = track.see(Observation(status=W, message="second", code="two"))

    assert (report.message, report.code) == ("second", "two")


def test_passing_check_shows_no_code() -> None:
    """A code says what is wrong, so a check that passes has none."""
    assert Track(CheckPolicy()).see(observed(P, code="odd")).code is None


def test_problem_without_code_gets_its_status_as_code() -> None:
    """A check that names no code is given one."""
    report = Track(CheckPolicy()).see(Observation(status=W, message="hm"))

    assert report.code == "warn"


def test_never_checked_is_a_failure() -> None:
    """Before the first observation a check fails with code ``pending``."""
    report, transition = Track(CheckPolicy()).look()

    assert (
        report.status,
        report.code,
        report.checked_at,
        report.response_time,
    ) == (F, "pending", None, None)
    assert transition is None


@pytest.mark.parametrize("status", [P, W])
def test_result_gets_stale_exactly_at_its_age(status: Status) -> None:
    """A result counts until its maximum age and fails with code ``stale`` from there."""
    track = Track(CheckPolicy(max_age=10.0))
    track.see(observed(status))

    just_before, _ = track.look(later=9.999)
    at, transition = track.look(later=10.0)

    assert just_before.status is status
    assert (at.status, at.code) == (F, "stale")
    assert transition is not None
    assert (status, F, "stale") == (transition.old, transition.new, transition.code)


def test_failure_stays_the_failure_it_was_however_old() -> None:
    """Age does not hide why a check failed."""
    track = Track(CheckPolicy(max_age=10.0))
    track.see(observed(F))

    report, _ = track.look(later=1000.0)

    assert (report.status, report.code) == (F, "code-fail")


def test_stale_result_recovers_with_the_next_observation() -> None:
    """One fresh observation of the same status makes a stale check what it was."""
    track = Track(CheckPolicy(max_age=1.5, recovery_threshold=3))
    track.see(observed(P))
    track.look(later=2.0)

    assert track.see(observed(P)).status is P


def test_age_counts_observations_of_any_status() -> None:
    """An observation under the threshold keeps the believed status from getting stale."""
    track = Track(CheckPolicy(max_age=1.5, failure_threshold=9))
    track.see(observed(P))
    track.see(observed(F))

    assert track.look(later=1.0)[0].status is P


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
    """Without ``max_age`` the longer of both intervals decides."""
    assert oldest == policy.oldest_allowed


def test_each_change_is_told_once() -> None:
    """Evaluating again without a change tells of no transition."""
    track = Track(CheckPolicy())
    track.track.record(observed(P), response_time=0.1, correlation_id="a", monotonic=1.0, at=EPOCH)

    first = track.look()[1]
    second = track.look()[1]

    assert first is not None
    assert (first.old, first.new, first.correlation_id) == (None, P, "a")
    assert second is None


def test_since_is_the_time_of_the_last_change() -> None:
    """``since`` moves with the status and with nothing else."""
    track = Track(CheckPolicy())

    assert track.look()[0].since == EPOCH
    assert EPOCH + timedelta(seconds=1) == track.see(observed(P)).since
    assert EPOCH + timedelta(seconds=1) == track.see(observed(P)).since
    assert EPOCH + timedelta(seconds=3) == track.see(observed(F)).since


def test_passing_needs_belief_and_the_last_observation() -> None:
    """The slow interval is for a check whose last look passed as well."""
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
def test_policy_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    """A policy names the value that is wrong."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CheckPolicy(**wrong)  # type: ignore[arg-type]


def test_correlation_id_belongs_to_what_is_shown() -> None:
    """While a recovery is not yet believed, the id still leads to the attempt that failed."""
    track = Track(CheckPolicy(recovery_threshold=2))
    track.see(observed(F))
    report = track.see(observed(P))

    assert (report.status, report.correlation_id) == (F, "id-1")


@pytest.mark.parametrize(
    ("details", "nothing"), [([{"name": "default"}], ()), ({"isConnected": True}, {})]
)
def test_without_an_answer_the_details_are_empty_but_of_their_form(
    details: Details, nothing: Details
) -> None:
    """Who reads a list finds a list, also after a timeout."""
    track = Track(CheckPolicy())
    seen = track.see(Observation(status=P, message="fine", details=details))
    late = track.see(Observation(status=F, message="no answer", code="timeout"))

    assert (seen.details, late.details) == (details, nothing)
