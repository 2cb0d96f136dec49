"""The load that an idle worker process puts on the database."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests import forked
from tests.servers.postgres import Database, PostgresServer, postgres_server, transactions
from tests.servers.waiting import wait_until
from tests.soak import Record, only_in_soak
from tests.system.service import Service
from tests.system.workers import environment_of, worker

WORKERS = 100
MAX_TRANSACTIONS = 70.0
"""A second, of all workers together."""
MAX_ALONE = 1.0
"""A second, of one worker: lease, sweeps, polls, health checks and the listening connection."""
SECONDS = 180.0
"""Many of each interval: most are random, so that the minutes of one worker differ by a sixth."""

POLLING, MAX_POLLING = 10, 10.0
"""Workers that no notification reaches, and their transactions in a second, in all."""
REGISTER_OTHERS = """
INSERT INTO viralfx_workers (worker, queues, lease_until)
SELECT '!another-' || number, '{{default}}', now() + interval '1 hour'
FROM generate_series(2, {}) AS number
"""

pytestmark = pytest.mark.timeout(300)

INTERVAL = 1.0
"""Seconds of each interval of a worker, except the renewals of its lease, which are fewer."""
KINDS = 8
"""Of statements that are repeated: polls, checks, sweeps and claims, some with their settings."""
_STATEMENT = re.compile(
    r"^\[viralfx[^\]]*\] LOG: +(?:execute \S+|statement): (.*(?:\n\t.*)*)", re.MULTILINE
)
_OF_CONNECTIONS = re.compile(r"SELECT 1\b|BEGIN|COMMIT|.*(?:typeinfo_tree|'jit')", re.DOTALL)
"""Transactions, tests of a connection, and the set-up of one: a late answer causes more."""


def test_an_idle_process_repeats_few_statements_once_an_interval() -> None:
    """Its polls, sweeps and checks have few kinds of statements, none of them more often."""
    settings = {"log_statement": "all", "log_line_prefix": "[%a] "}
    interval = f"{INTERVAL * 1000:.0f}"
    names = ("JOB_SWEEP", "JOB_POLL", "HEALTH_CHECK", "DB_HEALTH_CHECK")
    with postgres_server(settings=settings) as postgres:
        more = {f"{name}_INTERVAL": interval for name in names}
        environment = environment_of(postgres, JOB_LEASE="30000", **more)

        def sent() -> Counter[str]:
            found = _STATEMENT.findall(postgres.log())
            return Counter(each for each in found if not _OF_CONNECTIONS.match(each))

        with worker(environment):
            wait_until(lambda: any("LISTEN" in each for each in sent()), what="it listens")
            began, before = time.monotonic(), sent()
            wait_until(lambda: time.monotonic() > began + 4 * INTERVAL, what="four intervals")
            new, seconds = sent() - before, time.monotonic() - began

    # Without notifications it would poll five times in an interval.
    assert 2 <= max(new.values()) <= 2 * (seconds / INTERVAL + 1)
    assert len([each for each in new.values() if each > 1]) <= KINDS


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
def idle(
    postgres: PostgresServer, template: str, *, workers: int = 1, **more: str
) -> Iterator[Idle]:
    """Run a worker with ``more`` variables beside rows of others, ``workers`` in all."""
    database = Database(postgres, postgres.create_database(template))
    environment = environment_of(database, JOB_LEASE="30000", JOB_SWEEP_INTERVAL="5000", **more)
    database.execute(REGISTER_OTHERS.format(workers))
    with worker(environment) as process:
        yield Idle(database, process)
    postgres.drop_database(database.name)


@pytest.fixture(scope="module")
def rates() -> Iterator[tuple[float, float, float]]:
    """Return the rates of a worker beside others, of one alone, and of one that polls.

    They are counted during one wait.
    """
    # Postgres counts the transactions of autovacuum, too.
    with postgres_server(settings={"autovacuum": "off"}) as postgres:
        template = postgres.create_database()
        environment = {"DATABASE_URL": postgres.url(template)}
        assert forked.viralfx("migrate", environ=environment).returncode == 0
        yield _rates(postgres, template)


def _rates(postgres: PostgresServer, template: str) -> tuple[float, float, float]:
    with (
        idle(postgres, template) as alone,
        idle(postgres, template, workers=WORKERS) as beside,
        # As behind a pooler, so that it does not listen.
        idle(postgres, template, workers=POLLING, DB_POOLER="transaction") as polling,
    ):
        # The first renewal knows of the others, and the leader sweeps once its own lease is valid
        # for some time. By then the work of the start is over.
        time.sleep(22.0)
        counted = (beside, alone, polling)
        for each in counted:
            each.count()
        time.sleep(SECONDS)
        of_beside, of_alone, of_polling = (each.rate() for each in counted)
        return of_beside, of_alone, of_polling


@only_in_soak
def test_a_hundred_idle_processes_make_fewer_than_seventy_transactions_a_second(
    rates: tuple[float, float, float], record_property: Record
) -> None:
    """One of them with its health checks, beside rows of the others, makes less than its share."""
    assert 0.0 < rates[0] * WORKERS < MAX_TRANSACTIONS
    record_property(f"transactions/s of {WORKERS} processes", f"{rates[0] * WORKERS:.1f}")


@only_in_soak
def test_an_idle_process_makes_at_most_one_transaction_a_second(
    rates: tuple[float, float, float],
) -> None:
    """Without Redis, and with all the work that the leader of the workers does."""
    assert 0.0 < rates[1] <= MAX_ALONE


@only_in_soak
def test_ten_idle_processes_that_poll_make_at_most_ten_transactions_a_second(
    rates: tuple[float, float, float], record_property: Record
) -> None:
    """No notification reaches them, and one of them makes no more than its share."""
    assert 0.0 < rates[2] * POLLING <= MAX_POLLING
    record_property(f"transactions/s of {POLLING} that poll", f"{rates[2] * POLLING:.1f}")
