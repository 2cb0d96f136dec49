"""The ordeal of tests/chaos in short: every fault at least once within a minute."""

import pytest
from tests.chaos.ordeal import suffer
from tests.servers.postgres import PostgresServer
from tests.servers.redis import RedisServer

pytestmark = pytest.mark.alone

_JOBS, _SECONDS, _SEED = 600, 40.0, 20


@pytest.mark.timeout(300)
async def test_nothing_accepted_is_lost(
    own_postgres: PostgresServer, own_redis: RedisServer
) -> None:
    """Each acknowledged job completes, its transactional effect once, whatever dies meanwhile."""
    report = await suffer(_JOBS, _SEED, _SECONDS, postgres=own_postgres, redis=own_redis)
    print(report)  # noqa: T201 - for whoever wonders why it failed
    assert not report.problems
    assert report.jobs == _JOBS
    assert len(report.faults) == 8, "each kind of fault happened"
