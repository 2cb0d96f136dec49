"""The load that an idle worker process puts on the database."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests import forked
from tests.servers.postgres import Database, PostgresServer, postgres_server, transactions
from tests.system.service import Service
from tests.system.workers import environment_of, worker

WORKERS = 100
MAX_TRANSACTIONS = 50.0
"""A second, of all workers together."""
MAX_ALONE = 1.0
"""A second, of one worker: lease, sweeps, polls, health checks and the listening connection."""
SECONDS = 60.0
"""Several of the longest interval, so that one more transaction in the window changes little."""

REGISTER_OTHERS = """
INSERT INTO viralfx_workers (worker, queues, lease_until)
SELECT '!another-' || number, '{default}', now() + interval '1 hour'
FROM generate_series(2, 100) AS number
"""

# Beside other tests, a connection that answers late is checked and opened again.
pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]


class Idle:
    """An idle worker on a database of its own, and the rate of its transactions."""

    def __init__(self, database: Database, process: Service) -> None:
        self._database, self._process = database, process
        self._before, self._began = 0, 0.0

    def count(self) -> None:
        """Count from now on."""
        self._before, self._began = transactions(self._database), time.monotonic()

    def rate(self) -> float:
        """Return the transactions of a second since :meth:`count`."""
        rate = (transactions(self._database) - self._before) / (time.monotonic() - self._began)
        assert self._process.manage("/health/ready").status == 200
        return rate


@contextmanager
def idle(postgres: PostgresServer, template: str, *, registered: str = "") -> Iterator[Idle]:
    """Run a worker; ``registered`` is a statement that registers others before."""
    database = Database(postgres, postgres.create_database(template))
    environment = environment_of(database, JOB_LEASE="30000", JOB_SWEEP_INTERVAL="5000")
    if registered:
        database.execute(registered)
    with worker(environment) as process:
        yield Idle(database, process)
    postgres.drop_database(database.name)


@pytest.fixture(scope="module")
def rates() -> Iterator[tuple[float, float]]:
    """Return the rates of a worker beside others, and of one alone, counted during one wait."""
    # Postgres counts the transactions of autovacuum, too.
    with postgres_server(settings={"autovacuum": "off"}) as postgres:
        template = postgres.create_database()
        environment = {"DATABASE_URL": postgres.url(template)}
        assert forked.viralfx("migrate", environ=environment).returncode == 0
        yield _rates(postgres, template)


def _rates(postgres: PostgresServer, template: str) -> tuple[float, float]:
    with (
        idle(postgres, template) as alone,
        idle(postgres, template, registered=REGISTER_OTHERS) as beside,
    ):
        # The first renewal knows of the others, and the leader sweeps once its own lease is valid
        # for some time. By then the work of the start is over.
        time.sleep(22.0)
        beside.count()
        alone.count()
        time.sleep(SECONDS)
        return beside.rate(), alone.rate()


def test_a_hundred_idle_processes_make_fewer_than_fifty_transactions_a_second(
    rates: tuple[float, float],
) -> None:
    """One of them with its health checks, beside rows of the others, makes less than its share."""
    assert 0.0 < rates[0] * WORKERS < MAX_TRANSACTIONS


def test_an_idle_process_makes_at_most_one_transaction_a_second(
    rates: tuple[float, float],
) -> None:
    """Without Redis, and with all the work that the leader of the workers does."""
    assert 0.0 < rates[1] <= MAX_ALONE
