"""A short run of tests/chaos: every fault at least once within a minute.

A usual run has fewer jobs, in less time, and no pooler. It ends once each fault has happened.
"""

import random
from collections.abc import Iterator

import pytest
from tests.chaos.cluster import Cluster, cluster
from tests.chaos.ordeal import Report, lines_of, main, suffer
from tests.servers.fixtures import or_skip
from tests.servers.redis import RedisServer
from tests.soak import SOAK, only_in_soak

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

_SEED = 20
_JOBS, _SECONDS = (600, 50.0) if SOAK else (75, 20.0)
_JOBS_POOLED, _SECONDS_POOLED = 300, 40.0


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """Return a primary and a standby, behind a proxy."""
    with or_skip(), cluster(random.Random(_SEED)) as running:  # noqa: S311 - to be repeated
        yield running


@pytest.mark.parametrize("notified_by", ["streams", "notify"] if SOAK else ["streams"])
async def test_nothing_accepted_is_lost(
    own_cluster: Cluster, own_redis: RedisServer, notified_by: str
) -> None:
    """Each accepted job completes, with its transactional effect once, under all faults.

    Workers are notified by Redis, and in a soak run also by Postgres, without a Redis.
    """
    redis = own_redis if notified_by == "streams" else None
    report = await suffer(_JOBS, _SEED, _SECONDS, postgres=own_cluster, redis=redis)
    print(report)  # noqa: T201 - to explain a failure
    assert not report.problems
    assert report.jobs >= _JOBS
    assert not report.spared, "each kind of fault happened"
    assert report.cut
    figures = "\n".join(lines_of(report, "a trial"))
    assert f"| jobs: completed | {report.states['completed']} |" in figures
    assert all(f"| fault: {kind} | " in figures for kind in report.faults)
    assert "| problems | 0 |" in figures


def test_problems_are_part_of_the_published_report() -> None:
    """Each is a line of its own, however many lines it has."""
    report = Report(jobs=2, problems=["job-1 is lost", "worker-2 did not stop:\n  Traceback"])
    lines = list(lines_of(report, "a trial"))

    assert "| problems | 2 |" in lines
    assert lines[-3:] == ["", "- job-1 is lost", "- worker-2 did not stop: Traceback"]


def test_prepared_statements_need_a_pooler(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe says so before it starts anything."""
    with pytest.raises(SystemExit) as ended:
        main(["10", "1", "5", "notify", "--prepared", "200"])

    assert ended.value.code == 2
    assert "--prepared needs a pooler: add session or transaction" in capsys.readouterr().err


@only_in_soak
async def test_nothing_accepted_is_lost_behind_a_pooler(own_redis: RedisServer) -> None:
    """The same in transaction mode without prepared statements, where the pooler fails, too."""
    random_cuts = random.Random(_SEED)  # noqa: S311 - to be repeated
    with or_skip(), cluster(random_cuts, pooler="transaction") as pooled:
        report = await suffer(
            _JOBS_POOLED, _SEED, _SECONDS_POOLED, postgres=pooled, redis=own_redis
        )
    print(report)  # noqa: T201 - to explain a failure
    assert not report.problems
    assert report.jobs >= _JOBS_POOLED
    assert not report.spared, "each kind of fault happened"
