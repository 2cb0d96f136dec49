"""The service while Postgres is frozen, killed, restarted or refuses connections."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tests import forked
from tests.servers.certificates import Certificates
from tests.servers.pgbouncer import MODES, Poolers
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import wait_until
from tests.soak import SOAK, Record, cycles
from tests.system.jobs import JOBS, accept
from tests.system.load import Load
from tests.system.service import READY_WITHIN, Prober, Service, command, running

from viralfx.postgres.migrations import REVISIONS

APP = ("--app", "tests.system.backend_app:app")
TIMEOUT, INTERVAL = 2.0, 0.5
"""Seconds of HEALTH_CHECK_TIMEOUT and of both intervals in these tests."""
RATES = {"/query": 20.0, "/health/live": 15.0, "/health/ready": 15.0}
PROBES = 20
"""Probes of each path that are counted in a state."""

TIMES = {
    "HEALTH_CHECK_TIMEOUT": str(round(TIMEOUT * 1000)),
    "HEALTH_CHECK_INTERVAL": str(round(INTERVAL * 1000)),
    "DB_HEALTH_CHECK_INTERVAL": str(round(INTERVAL * 1000)),
    "DB_POOL_TIMEOUT": "2000",
    "DB_CONNECTION_TIMEOUT": "2000",
    "DB_STATEMENT_TIMEOUT": "3000",
    "SHUTDOWN_DRAIN_TIMEOUT": "10000",
}


def freeze(server: PostgresServer) -> None:
    """Stop all processes of the server; connections stay open."""
    server.freeze()


def kill(server: PostgresServer) -> None:
    """Kill the server; it refuses connections from then on."""
    server.kill()


def stop(server: PostgresServer) -> None:
    """Stop the server gracefully; it notifies its clients, then refuses connections."""
    server.stop()


FAULTS: dict[str, tuple[Callable[[PostgresServer], None], Callable[[PostgresServer], None]]] = {
    "frozen": (freeze, PostgresServer.thaw),
    "killed": (kill, PostgresServer.start),
    "refusing": (stop, PostgresServer.start),
}


def migrated(server: PostgresServer) -> dict[str, str]:
    """Migrate the schema and return the variables that name the server."""
    environment = {"DATABASE_URL": server.url(), **TIMES}
    result = forked.viralfx("migrate", environ=environment)
    assert result.returncode == 0, result.stderr
    return environment


@contextmanager
def serving(server: PostgresServer, **more: str) -> Iterator[Service]:
    """Run the application on the server and wait until it is ready."""
    with running(*APP, environment={**migrated(server), **more}) as service:
        yield service.wait_ready()


def answered(load: Load, path: str, status: int, *, since: float) -> bool:
    """Return whether a request that was sent since then got a status."""
    return any(a.status == status for a in load.of(path, since=since))


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS if SOAK else ["frozen", "killed"])
def test_probes_stay_fast_and_correct(own_postgres: PostgresServer, fault: str) -> None:
    """Probes are answered during the fault; 503, then 200, and one log line for each change."""
    begin, end = FAULTS[fault]
    with serving(own_postgres) as service:
        with Load(service.port, RATES) as load:
            wait_until(lambda: len(load.of("/query")) > 20, what="traffic")
            began = time.monotonic()
            begin(own_postgres)
            wait_until(lambda: answered(load, "/health/ready", 503, since=began), what="not ready")
            known = time.monotonic()
            paths = ("/health/live", "/health/ready")
            wait_until(
                lambda: all(len(load.of(path, since=known)) >= PROBES for path in paths),
                what="probes are answered while the fault lasts",
            )
            live, ready = ({a.status for a in load.of(path, since=known)} for path in paths)
            medians = [load.median(path, since=began) for path in paths]
            lost = wait_until(lambda: service.logged("Database connection lost"), what="a line")
            end(own_postgres)
            ended = time.monotonic()
            # The start of the server may take longer than the way back.
            wait_until(
                lambda: answered(load, "/health/ready", 200, since=ended), what="ready again"
            )
            again = time.monotonic()
            wait_until(lambda: answered(load, "/query", 200, since=again), what="answers")
        assert service.process.poll() is None
        assert (live, ready) == ({200}, {503})
        # A probe that waits for a frozen database waits for the time limit of the check.
        assert max(medians) < TIMEOUT / 2
        assert {a.status for a in load.of("/health/live")} == {200}
        assert {a.status for a in load.of("/health/ready")} == {200, 503}
        assert len(lost) == 1
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        assert len(service.logged("Database connection lost")) == 1
        assert len(service.logged("Database connection restored")) == 1


def test_the_service_survives_a_restart(own_postgres: PostgresServer) -> None:
    """Under the same load, the pool and the check reconnect to the new server."""
    with serving(own_postgres) as service:
        with Load(service.port, RATES) as load:
            wait_until(lambda: len(load.of("/query")) > 20, what="traffic")
            own_postgres.restart()
            up = time.monotonic()
            wait_until(lambda: answered(load, "/query", 200, since=up), what="answers")
            wait_until(
                lambda: service.get("/health/database").json()["status"] == "pass", what="healthy"
            )
            healthy = time.monotonic()
            wait_until(
                lambda: len(load.of("/health/ready", since=healthy)) >= PROBES, what="probes"
            )
        assert service.process.poll() is None
        assert {a.status for a in load.of("/health/live")} == {200}
        assert {a.status for a in load.of("/health/ready", since=healthy)} == {200}
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        # The server may be up again before the service notices its absence.
        lost = service.logged("Database connection lost")
        assert len(lost) == len(service.logged("Database connection restored")) <= 1


@pytest.mark.parametrize("fault", ["frozen", "killed"])
@pytest.mark.soak
@pytest.mark.timeout(240)
def test_repeated_outages_leak_nothing(own_postgres: PostgresServer, fault: str) -> None:
    """After outages and recoveries there are no more descriptors, connections and tasks."""
    begin, end = FAULTS[fault]
    # Long enough that a busy machine causes no timeout; only a frozen server does.
    quick = {
        "HEALTH_CHECK_TIMEOUT": "500" if fault == "frozen" else "2000",
        "HEALTH_CHECK_INTERVAL": "50",
    }
    # A pool of one size: it would keep the connections that requests needed at the same time.
    quick |= {"DB_POOL_MIN": "2", "DB_POOL_MAX": "2"}
    with serving(own_postgres, **quick, DB_HEALTH_CHECK_INTERVAL="50") as service:
        process = psutil.Process(service.process.pid)

        def sessions() -> int:
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'viralfx%'"
            return int(own_postgres.execute(query)[0][0])

        def state() -> tuple[int, int, int]:
            return process.num_fds(), sessions(), service.get("/tasks").json()["tasks"]

        wait_until(lambda: sessions() >= 3, what="pool and check are connected")
        # Checks run all the time, and each has a task and a descriptor now and then.
        seen = [state() for _ in range(30)]
        before, repeats = tuple(map(max, zip(*seen, strict=True))), cycles(50)
        for _ in repeats:
            begin(own_postgres)
            wait_until(lambda: service.status("/health/ready") == 503, what="not ready")
            end(own_postgres)
            wait_until(lambda: service.status("/health/ready") == 200, what="ready again")
        # A cut session is gone once the server has noticed it, too.
        wait_until(
            lambda: all(now <= then for now, then in zip(state(), before, strict=True)),
            what=lambda: f"no more than {before}: {state()}",
        )
        wait_until(
            lambda: len(service.logged("Database connection restored")) >= len(repeats),
            what="all is logged",
        )
        assert len(service.logged("Database connection lost")) == len(repeats)
        assert len(service.logged("Database connection restored")) == len(repeats)


def test_an_exhausted_pool_is_a_warning(own_postgres: PostgresServer) -> None:
    """Health waits for no connection and counts the waiters; it stays ready; statements end."""
    waits = 5.0
    small = {"DB_POOL_MIN": "1", "DB_POOL_MAX": "2", "DB_POOL_TIMEOUT": f"{waits * 1000:.0f}"}
    with serving(own_postgres, **small) as service:
        rates = {"/slow-query/30": 4.0, "/health/ready": 10.0, "/health/detailed": 10.0}
        with Load(service.port, rates) as load:
            wait_until(
                lambda: service.get("/health/database").json()["status"] == "warn",
                what="a warning",
            )
            seen = service.get("/health/database").json()
            assert seen["error"]["code"] == "pool_exhausted"
            stats = seen["details"]["stats"]
            assert (stats["activeConnections"], stats["idleConnections"]) == (2, 0)
            assert stats["waitingRequests"] >= 1
            # The figures are of this moment, the message of the check's last attempt.
            assert re.search(r"exhausted: [1-9]\d* wait for", seen["message"])
            assert service.get("/health/detailed").json()["status"] == "degraded"
            wait_until(lambda: service.logged("Slow query"), what="a slow query")
        assert {a.status for a in load.of("/health/ready")} == {200}
        assert max(map(load.median, ("/health/ready", "/health/detailed"))) < waits / 2
        # The server cancelled each statement of 30 s after 3 s; each was logged once.
        slow = service.logged("Slow query")
        assert all(2900 < line["duration"] < 15_000 for line in slow)
        assert {line["statement"] for line in slow} == {"SELECT pg_sleep(?), ?"}
        # Two connections with statements of three seconds: none was logged twice.
        seconds = max(a.at + a.seconds for a in load.responses) - load.responses[0].at
        assert len(slow) <= 2 * (seconds / 2.9 + 1)
        assert len({(line["timestamp"], line["duration"]) for line in slow}) == len(slow)
        assert "planted-literal" not in "".join(service.output)


def test_a_schema_behind_is_not_ready_and_names_the_remedy(own_postgres: PostgresServer) -> None:
    """The service starts, names the command to run, and is ready after the migration."""
    times = {"HEALTH_CHECK_INTERVAL": "200", "DB_HEALTH_CHECK_INTERVAL": "200"}
    with running(*APP, environment={"DATABASE_URL": own_postgres.url(), **times}) as service:

        def behind() -> bool:
            seen = service.get("/health/database")
            return seen.status == 503 and seen.json()["error"]["code"] == "schema_behind"

        wait_until(
            lambda: service.status("/health/live") == 200, seconds=READY_WITHIN, what="alive"
        )
        wait_until(behind, what="the check reports it")
        ready, check = service.get("/health/ready"), service.get("/health/database").json()
        assert ready.status == 503
        assert ready.json()["checks"]["database"] is False
        assert check["message"] == (
            f"Database schema is behind: {', '.join(REVISIONS)} pending; run `viralfx migrate`"
        )
        result = command("migrate", environment={"DATABASE_URL": own_postgres.url()})
        assert result.returncode == 0, result.stderr
        wait_until(lambda: service.status("/health/ready") == 200, what="ready")


@pytest.mark.each_python
def test_a_database_without_writes_is_not_ready(own_postgres: PostgresServer) -> None:
    """The service says so, names the remedy, and recovers by itself."""
    times = {"HEALTH_CHECK_INTERVAL": "200", "DB_HEALTH_CHECK_INTERVAL": "200"}
    environment = {"DATABASE_URL": own_postgres.url(), **times}
    result = command("migrate", environment=environment)
    assert result.returncode == 0, result.stderr
    with running(*APP, environment=environment) as service:

        def is_ready() -> bool:
            return service.status("/health/ready") == 200

        wait_until(is_ready, seconds=READY_WITHIN, what="ready")
        own_postgres.execute("alter system set default_transaction_read_only = on")
        own_postgres.execute("select pg_reload_conf()")
        wait_until(lambda: not is_ready(), what="not ready")
        check = service.get("/health/database")
        assert (check.status, check.json()["error"]["code"]) == (503, "read_only")
        assert "name the primary" in check.json()["message"]

        own_postgres.execute("alter system reset default_transaction_read_only")
        own_postgres.execute("select pg_reload_conf()")
        wait_until(is_ready, what="ready again")


def test_wrong_credentials_end_the_start_after_all_attempts(own_postgres: PostgresServer) -> None:
    """Exit code 3 and one line with the remedy; until then probes respond; no secret is logged."""
    environment = {
        "DATABASE_URL": own_postgres.url(password="planted:wrong@"),
        "DB_MAX_RECONNECT_ATTEMPTS": "3",
        "DB_RECONNECT_DELAY": "700",
    }
    with running(environment=environment) as service:
        wait_until(
            lambda: service.status("/health/live") == 200,
            seconds=READY_WITHIN,
            what="alive while it tries",
        )
        assert service.status("/health/ready") == 503
        assert service.exit_code() == 3
        attempts = service.logged("Database connection attempt failed")
        assert [(line["attempt"], line["code"]) for line in attempts] == [
            (1, "auth"),
            (2, "auth"),
            (3, "auth"),
        ]
        [line] = service.logged("Start-up failed")
        assert line["detail"].startswith("DATABASE_URL: the database at 127.0.0.1:")
        assert line["detail"].endswith(
            " refuses the user or password, after 3 attempts; check the user and password"
        )
        output = "".join([*service.output, *service.errors])
        assert "planted" not in output
        assert "Traceback" not in output


def test_an_untrusted_certificate_is_not_the_clients_fault(
    tls_postgres: PostgresServer, certificates: Certificates, tmp_path: Path
) -> None:
    """Every route of jobs is 503 with code ``tls``, until the server is trusted again."""
    environment = {
        **migrated(tls_postgres),
        "DB_TLS_MODE": "verify-full",
        "DB_TLS_CA_FILE": str(certificates.ca),
        "TASK_MODULES": "tests.system.fault_tasks",
    }
    cut = (
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name ~ 'viralfx'"
    )
    with running("--no-worker", environment=environment) as service:
        service.wait_ready()
        job_id = accept(service, "faults.work", 0)
        tls_postgres.present(Certificates(tmp_path))
        tls_postgres.execute(cut)
        # The first failure may be a connection that the server has cut.
        wait_until(lambda: _code(service) == "tls", what="the check says tls")
        assert service.status("/health/ready") == 503
        for method, path in (
            ("GET", ""),
            ("GET", f"/{job_id}"),
            ("DELETE", f"/{job_id}"),
            ("POST", f"/{job_id}/retry"),
            ("GET", f"/{job_id}/events"),
        ):
            reply = service.get(f"{JOBS}{path}", method=method)
            assert (reply.status, reply.json().get("code")) == (503, "tls"), (method, path, reply)
        body = {"task": "faults.work", "payload": 0}
        reply = service.get(JOBS, method="POST", json_body=body)
        assert (reply.status, reply.json().get("code")) == (503, "tls")
        tls_postgres.present(certificates)
        service.wait_ready()
        accept(service, "faults.work", 0)


def _code(service: Service) -> object:
    error = service.get("/health/database").json().get("error")
    return error and error["code"]


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES if SOAK else ["transaction"])
def test_locked_jobs_behind_a_pooler_keep_the_service_ready(
    migrated_database: Database, pgbouncer: Poolers, mode: str, record_property: Record
) -> None:
    """The check's counting ends within its time limit; the jobs are not seen.

    In a soak run the lock is held for ten seconds, and else until the check meets it.
    """
    seconds = 10 if SOAK else 0
    server = migrated_database.server
    pooler = pgbouncer(server, mode)
    environment = {
        **TIMES,
        "HEALTH_CHECK_TIMEOUT": "2000",
        "DATABASE_URL": server.url(migrated_database.name, host=pooler.host, port=pooler.port),
        "DB_POOLER": mode,
        "TASK_MODULES": "tests.system.fault_tasks",
    }
    migrated_database.execute("create table released (n int)")
    lock = (
        "begin lock table viralfx_ops.viralfx_jobs; while not exists (select from released)"
        " loop perform pg_sleep(0.05); end loop; end"
    )
    with running(*APP, environment=environment) as service, ThreadPoolExecutor(1) as thread:
        service.wait_ready()
        with Prober(service.port, "/health/ready", timeout=20.0) as probes:
            locked = thread.submit(migrated_database.execute, f"do $$ {lock} $$")
            ends = time.monotonic() + seconds
            try:
                unseen = wait_until(
                    lambda: service.get("/health/queues").json().get("error"),
                    what="the check of queues meets the lock",
                )
                wait_until(lambda: time.monotonic() > ends, what="the end of the lock")
            finally:
                migrated_database.execute("insert into released values (1)")
            locked.result()
            wait_until(
                lambda: "error" not in service.get("/health/queues").json(), what="jobs are seen"
            )

    assert unseen["code"] == "unavailable"
    assert probes.order() == [200]
    record_property(f"answers of readiness in {mode} mode, all 200", len(probes.seen))
