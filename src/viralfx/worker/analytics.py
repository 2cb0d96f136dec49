"""``analytics.rollup_health``: how the process that runs it has been, kept as the job's result."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.health import CheckReport, Status, Transition
from viralfx.domain.jobs.tasks import task
from viralfx.domain.monitor import HealthMonitor

RollupHealth = Callable[[None], Awaitable[dict[str, object]]]


def rollup_health(
    monitor: HealthMonitor, *, clock: Clock, period: float, instance: str
) -> RollupHealth:
    """Return the task, which looks back over ``period`` seconds."""

    @task("analytics.rollup_health", queue="analytics", timeout=30.0)
    async def rollup(_payload: None) -> dict[str, object]:
        """Roll up this process's health."""
        now, report, counts = clock.now(), monitor.report(), monitor.transition_counts
        since = now - timedelta(seconds=period)
        recent = [each for each in monitor.history if each.at > since]
        return {
            "instance": instance,
            "from": timestamp(since),
            "to": timestamp(now),
            "health": str(report.health),
            "checks": {
                name: {
                    "status": str(check.status),
                    "transitions": counts.get(name, 0),
                    "seconds": seconds_in_each(
                        check, [each for each in recent if each.check == name], since, now
                    ),
                }
                for name, check in report.checks.items()
            },
        }

    return rollup


def seconds_in_each(
    check: CheckReport, recent: Sequence[Transition], since: datetime, now: datetime
) -> dict[str, float]:
    """Return how long a check had each status between two moments.

    ``recent`` are its changes in between, oldest first. Time before its first result is nobody's.
    """
    seconds = dict.fromkeys(map(str, Status), 0.0)
    begun: datetime | None = since
    status = recent[0].old if recent else check.status
    for change in recent:
        if status is not None and begun is not None:
            seconds[str(status)] += (change.at - begun).total_seconds()
        begun, status = change.at, change.new
    if status is not None and begun is not None:
        seconds[str(status)] += (now - begun).total_seconds()
    return {name: round(total, 3) for name, total in seconds.items()}
