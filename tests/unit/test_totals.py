"""The totals over all checks against a model that recomputes them each time."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from viralfx.domain.health.check_state import HealthTotals
from viralfx.domain.health.model import CheckPolicy, CheckReport, Health, HealthReport, Status

AT = datetime(2026, 1, 6, 12, tzinfo=UTC)
FAIL_OPEN_AFTER = 4.0
MAX_AGE = 3.0

policies = st.builds(
    CheckPolicy,
    critical=st.booleans(),
    required_for_readiness=st.booleans(),
    shared=st.booleans(),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 4), st.sampled_from(Status)),
        st.sampled_from([0.5, 1.0, 2.5]),
    ),
    max_size=40,
)


def reported(name: str, policy: CheckPolicy, status: Status, *, seen: bool = True) -> CheckReport:
    """Return the report of one check."""
    return CheckReport(
        name=name,
        status=status,
        message="",
        details={},
        code=None,
        correlation_id=None,
        response_time=None,
        checked_at=AT if seen else None,
        since=AT,
        policy=policy,
    )


@dataclass
class Model:
    """Keeps every report and recomputes the totals after each change."""

    reports: dict[str, CheckReport]
    stale_at: dict[str, float] = field(default_factory=dict)
    started: bool = False
    failing_since: float | None = None

    def settle(self, now: float) -> None:
        """Apply ages, then update start-up and fail-open state."""
        for name, stale_at in self.stale_at.items():
            if now >= stale_at and self.reports[name].status is not Status.FAIL:
                self.reports[name] = replace(self.reports[name], status=Status.FAIL)
        failing = self.failing()
        reported_all = all(r.checked_at is not None for r in self.reports.values())
        self.started = self.started or (reported_all and not failing)
        if not failing or not all(r.policy.shared for r in failing):
            self.failing_since = None
        elif self.failing_since is None:
            self.failing_since = now

    def failing(self) -> list[CheckReport]:
        """Return the failing checks that readiness requires."""
        gates = (r for r in self.reports.values() if r.policy.required_for_readiness)
        return [r for r in gates if r.status is Status.FAIL]

    def report(self, now: float) -> HealthReport:
        """Build the whole report."""
        opens_at = float("inf")
        if self.failing_since is not None:
            opens_at = self.failing_since + FAIL_OPEN_AFTER
        health = Health.HEALTHY
        if any(r.status is not Status.PASS for r in self.reports.values()):
            health = Health.DEGRADED
        if any(r.status is Status.FAIL and r.policy.critical for r in self.reports.values()):
            health = Health.UNHEALTHY
        ages = [at for n, at in self.stale_at.items() if self.reports[n].status is not Status.FAIL]
        return HealthReport(
            checks=dict(self.reports),
            health=health,
            started=self.started,
            failing_gates=tuple(r.name for r in self.failing()),
            fail_open=now >= opens_at,
            valid_until=min([float("inf") if now >= opens_at else opens_at, *ages]),
        )


@given(st.tuples(*[policies] * 5), steps)
def test_incremental_totals_equal_recomputed_totals(
    policies: tuple[CheckPolicy, ...], steps: list[tuple[int, Status] | float]
) -> None:
    """The names sort against the order of registration."""
    names = ["e", "d", "c", "b", "a"]
    totals, now = HealthTotals(FAIL_OPEN_AFTER), 100.0
    pending = {
        n: reported(n, p, Status.FAIL, seen=False) for n, p in zip(names, policies, strict=True)
    }
    for report in pending.values():
        totals.add(report)
    model = Model(dict(pending))
    kept: list[tuple[HealthReport, dict[str, CheckReport]]] = []
    for step in steps:
        if isinstance(step, float):
            now += step
        else:
            name = names[step[0]]
            report = reported(name, policies[step[0]], step[1])
            model.reports[name], model.stale_at[name] = report, now + MAX_AGE
            totals.update(report, now + MAX_AGE)
        for expired in totals.take_expired(now):
            failed = replace(model.reports[expired], status=Status.FAIL)
            totals.update(failed, model.stale_at[expired])
        totals.settle(now)
        model.settle(now)
        report_now = totals.report(now)

        assert report_now == model.report(now)
        kept.append((report_now, dict(model.reports)))

    assert all(report.checks == checks for report, checks in kept)


def test_a_renewed_result_has_one_heap_entry() -> None:
    """Renewing a result before it is stale uses no further memory."""
    totals, policy = HealthTotals(0.0), CheckPolicy()
    totals.add(reported("one", policy, Status.FAIL, seen=False))
    report = reported("one", policy, Status.PASS)
    for time in range(10_000):
        totals.update(report, time + 1_000_000.0)

    assert totals.report(0.0).valid_until == 9_999 + 1_000_000.0
    assert len(totals._expiry._heap) == 1


def test_checks_are_copied_only_while_a_report_is_held() -> None:
    """A held report does not change; without one nothing is copied."""
    totals, policy = HealthTotals(0.0), CheckPolicy()
    totals.add(reported("one", policy, Status.FAIL, seen=False))
    held = totals.report(0.0)
    same = totals.report(1.0)
    totals.update(reported("one", policy, Status.PASS), 10.0)

    assert held.checks is same.checks
    assert held.checks["one"].status is Status.FAIL
    assert totals.report(1.0).checks["one"].status is Status.PASS
    assert list(held.checks) == ["one"]
    assert repr(held.checks) == repr(dict(held.checks))
