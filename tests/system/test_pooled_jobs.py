"""Jobs of an API and a worker that reach Postgres only through PgBouncer in transaction mode."""

import signal

import pytest
from tests.servers.pgbouncer import Poolers
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS
from tests.system.service import Service
from tests.system.workers import api, environment_of, worker

COUNT = 100
SUBMITTED = "from viralfx_ops.viralfx_all_jobs where task = 'faults.work'"


@pytest.mark.timeout(120)
def test_a_hundred_jobs_without_prepared_statements(database: Database, pgbouncer: Poolers) -> None:
    """All complete at the first attempt, over fewer connections than the processes have."""
    pooler = pgbouncer(
        database.server, "transaction", max_prepared_statements=0, default_pool_size=5
    )
    environment = environment_of(
        database,
        DATABASE_URL=database.server.url(database.name, host=pooler.host, port=pooler.port),
        DB_POOLER="transaction",
        TASK_MODULES="tests.system.fault_tasks",
        JOB_LEASE="30000",
    )
    jobs = [
        {"task": "faults.work", "payload": 0, "key": f"pooled-{number}"} for number in range(COUNT)
    ]
    with api(environment) as service, worker(environment) as process:
        reply = service.get(f"{JOBS}/batch", method="POST", json_body={"jobs": jobs})
        assert reply.status == 202, reply
        select = f"select state::text, count(*) {SUBMITTED} group by 1"
        wait_until(
            lambda: database.execute(select) == [("completed", COUNT)],
            seconds=60,
            what=lambda: str(database.execute(select)),
        )
        again = service.get(f"{JOBS}/batch", method="POST", json_body={"jobs": jobs})
        codes = [stopped(each) for each in (process, service)]
        lines = [line for each in (process, service) for line in complaints(each)]

    assert codes == [0, 0]
    assert lines == []
    # The same keys are the same jobs, also through the pooler.
    assert {each["id"] for each in again.json()["jobs"]} == {
        each["id"] for each in reply.json()["jobs"]
    }
    assert database.execute(f"select distinct claims, crashes {SUBMITTED}") == [(1, 0)]


def stopped(process: Service) -> int | None:
    """Stop a process in order, and return its exit code."""
    process.signal(signal.SIGTERM)
    return process.exit_code()


def complaints(process: Service) -> list[str]:
    """Return the log lines about a ledger or a database that did not answer."""
    messages = ("Job ledger unavailable", "Database connection lost")
    return [message for message in messages if process.logged(message)]
