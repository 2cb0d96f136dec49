"""Postgres frozen, killed, restarted and refusing while the service runs, seen from outside."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
from tests import forked
from tests.servers.postgres import PostgresServer
from tests.servers.waiting import wait_until
from tests.system.load import Load, require_quick
from tests.system.service import READY_WITHIN, Prober, Service, command, running

from viralfx.adapters.postgres.schema import REVISIONS

APP = ("--app", "tests.system.backend_app:app")
TIMEOUT, INTERVAL = 1.0, 0.5
"""Seconds of HEALTH_CHECK_TIMEOUT and of both intervals in these tests."""
MARGIN = 1.0
"""Seconds that a machine of two cores with everything on it may be late."""
QUICK = 0.05
"""Seconds that a probe may take, whatever the database does."""


def freeze(server: PostgresServer) -> None:
    """Stop every process of it, connections open."""
    server.freeze()


def kill(server: PostgresServer) -> None:
    """End it by force; connections are refused from then on."""
    server.kill()


def stop(server: PostgresServer) -> None:
    """End it in order; it says so to its clients and refuses connections from then on."""
    server.stop()


FAULTS: dict[str, tuple[Callable[[PostgresServer], None], Callable[[PostgresServer], None]]] = {
    "frozen": (freeze, PostgresServer.thaw),
    "killed": (kill, PostgresServer.start),
    "refusing": (stop, PostgresServer.start),
}


def migrated(server: PostgresServer) -> dict[str, str]:
    """Bring the server's schema up to date; return the variables that name it."""
    environment = {
        "DATABASE_URL": server.url(),
        "HEALTH_CHECK_TIMEOUT": str(round(TIMEOUT * 1000)),
        "HEALTH_CHECK_INTERVAL": str(round(INTERVAL * 1000)),
        "DB_HEALTH_CHECK_INTERVAL": str(round(INTERVAL * 1000)),
        "DB_POOL_TIMEOUT": "2000",
        "DB_CONNECTION_TIMEOUT": "2000",
        "DB_STATEMENT_TIMEOUT": "3000",
        "SHUTDOWN_DRAIN_TIMEOUT": "10000",
    }
    result = forked.viralfx("migrate", environ=environment)
    assert result.returncode == 0, result.stderr
    return environment


@contextmanager
def serving(server: PostgresServer, **more: str) -> Iterator[Service]:
    """Run the application on the server until it is ready."""
    with running(*APP, environment={**migrated(server), **more}) as service:
        yield service.wait_ready()


def first(probes: Prober, status: int, *, since: float) -> float:
    """Return the seconds after ``since`` of the first probe that saw a status."""
    return next(
        s.at + s.seconds - since for s in probes.seen if s.at >= since and s.status == status
    )


@pytest.mark.alone
@pytest.mark.parametrize("fault", FAULTS)
def test_probes_stay_quick_and_tell_the_truth(own_postgres: PostgresServer, fault: str) -> None:
    """Under 200 requests/s: p99 under 50 ms, 503 in time, 200 again in time, one line each."""
    begin, end = FAULTS[fault]
    with serving(own_postgres) as service:
        rates = {"/query": 140.0, "/health/live": 30.0, "/health/ready": 30.0}
        with Load(service.port, rates) as load, Prober(service.port, "/health/ready") as ready:
            wait_until(lambda: len(load.of("/query")) > 200, what="traffic")
            began = time.monotonic()
            begin(own_postgres)
            wait_until(lambda: ready.seen[-1].status == 503, what="not ready")
            wait_until(lambda: time.monotonic() > began + 4, what="four seconds of it")
            lost = service.logged("Database connection lost")
            end(own_postgres)
            ended = time.monotonic()
            wait_until(lambda: ready.seen[-1].status == 200, what="ready again")
            again = time.monotonic()
            wait_until(
                lambda: any(a.status == 200 for a in load.of("/query", since=again)), what="answers"
            )
        assert service.process.poll() is None
        print(  # noqa: T201 - the timeline, for whoever wonders why it failed
            f"{fault}: 503 after {first(ready, 503, since=began):.2f} s, 200 again after"
            f" {first(ready, 200, since=ended):.2f} s, p99 live {load.slowest('/health/live'):.4f}"
            f" ready {load.slowest('/health/ready'):.4f} s of {len(load.answers)} requests"
        )
        assert {a.status for a in load.of("/health/live")} == {200}
        assert {a.status for a in load.of("/health/ready")} == {200, 503}
        require_quick(load.slowest("/health/live"), QUICK, "/health/live")
        require_quick(load.slowest("/health/ready"), QUICK, "/health/ready")
        require_quick(first(ready, 503, since=began), TIMEOUT + INTERVAL + MARGIN, "503")
        require_quick(first(ready, 200, since=ended), INTERVAL + MARGIN, "200")
        assert len(lost) == 1
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        assert len(service.logged("Database connection lost")) == 1
        assert len(service.logged("Database connection restored")) == 1


@pytest.mark.alone
def test_a_restart_is_survived(own_postgres: PostgresServer) -> None:
    """Under the same load: the pool and the check find the new server by themselves."""
    with serving(own_postgres) as service:
        rates = {"/query": 140.0, "/health/live": 30.0, "/health/ready": 30.0}
        with Load(service.port, rates) as load:
            wait_until(lambda: len(load.of("/query")) > 200, what="traffic")
            own_postgres.restart()
            up = time.monotonic()
            wait_until(
                lambda: any(a.status == 200 for a in load.of("/query", since=up)), what="answers"
            )
            wait_until(
                lambda: service.get("/health/database").json()["status"] == "pass", what="healthy"
            )
            healthy = time.monotonic()
            wait_until(lambda: len(load.of("/health/ready", since=healthy)) > 30, what="probes")
        assert service.process.poll() is None
        print(  # noqa: T201 - the timeline, for whoever wonders why it failed
            f"restarted: healthy again {healthy - up:.2f} s after it was up, p99 live"
            f" {load.slowest('/health/live'):.4f} ready {load.slowest('/health/ready'):.4f} s of"
            f" {len(load.answers)} requests"
        )
        require_quick(healthy - up, INTERVAL + MARGIN, "healthy again")
        assert {a.status for a in load.of("/health/live")} == {200}
        assert {a.status for a in load.of("/health/ready", since=healthy)} == {200}
        require_quick(load.slowest("/health/live"), QUICK, "/health/live")
        require_quick(load.slowest("/health/ready"), QUICK, "/health/ready")
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        # It may be up again before anybody has noticed.
        lost = service.logged("Database connection lost")
        assert len(lost) == len(service.logged("Database connection restored")) <= 1


@pytest.mark.parametrize("fault", ["frozen", "killed"])
@pytest.mark.timeout(240)
def test_nothing_leaks_in_fifty_cycles(own_postgres: PostgresServer, fault: str) -> None:
    """Fifty times away and back: as many descriptors, connections and tasks as before."""
    begin, end = FAULTS[fault]
    # Long enough that a busy machine is no fault; only who is frozen makes it wait for that.
    quick = {
        "HEALTH_CHECK_TIMEOUT": "500" if fault == "frozen" else "2000",
        "HEALTH_CHECK_INTERVAL": "50",
    }
    with serving(own_postgres, **quick, DB_HEALTH_CHECK_INTERVAL="50") as service:
        process = psutil.Process(service.process.pid)

        def sessions() -> int:
            ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'viralfx%'"
            return int(own_postgres.execute(ours)[0][0])

        def state() -> tuple[int, int, int]:
            return process.num_fds(), sessions(), service.get("/tasks").json()["tasks"]

        wait_until(lambda: sessions() >= 3, what="pool and check are connected")
        before = state()
        for _ in range(50):
            begin(own_postgres)
            wait_until(lambda: service.status("/health/ready") == 503, what="not ready")
            end(own_postgres)
            wait_until(lambda: service.status("/health/ready") == 200, what="ready again")
        # What was cut is gone once the server noticed it, too.
        wait_until(
            lambda: all(now <= then for now, then in zip(state(), before, strict=True)),
            what=f"no more than {before}",
        )
        wait_until(
            lambda: len(service.logged("Database connection restored")) >= 50, what="all is logged"
        )
        assert len(service.logged("Database connection lost")) == 50
        assert len(service.logged("Database connection restored")) == 50


@pytest.mark.alone
def test_an_exhausted_pool_is_a_warning(own_postgres: PostgresServer) -> None:
    """Health answers in time and counts the waiters; ready stays; statements end by the limit."""
    small = {"DB_POOL_MIN": "1", "DB_POOL_MAX": "2", "DB_POOL_TIMEOUT": "5000"}
    with serving(own_postgres, **small) as service:
        rates = {"/slow-query/30": 4.0, "/health/ready": 30.0, "/health/detailed": 30.0}
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
            assert f"{stats['waitingRequests']} wait" in seen["message"]
            assert service.get("/health/detailed").json()["status"] == "degraded"
            wait_until(lambda: service.logged("Slow query"), what="a slow query")
            running_longest = own_postgres.execute(
                "SELECT max(extract(epoch FROM now() - query_start)) FROM pg_stat_activity"
                " WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid() AND state = 'active'"
            )[0][0]
            assert running_longest is None or running_longest < 3 + MARGIN
        assert {a.status for a in load.of("/health/ready")} == {200}
        require_quick(load.slowest("/health/ready"), QUICK, "/health/ready")
        require_quick(load.slowest("/health/detailed"), QUICK, "/health/detailed")
        # Each was cancelled by the server after three seconds, and said so once.
        slow = service.logged("Slow query")
        assert all(2900 < line["duration"] < 4500 for line in slow)
        assert {line["statement"] for line in slow} == {"SELECT pg_sleep(?), ?"}
        # Two connections for at most so many seconds of three each: none was logged twice.
        seconds = max(a.at + a.seconds for a in load.answers) - load.answers[0].at
        assert len(slow) <= 2 * (seconds / 2.9 + 1)
        assert len({(line["timestamp"], line["duration"]) for line in slow}) == len(slow)
        assert "planted-literal" not in "".join(service.output)


def test_a_schema_that_is_behind_is_not_ready_and_says_why(own_postgres: PostgresServer) -> None:
    """It starts, tells what to run, and is ready once somebody has."""
    times = {"HEALTH_CHECK_INTERVAL": "200", "DB_HEALTH_CHECK_INTERVAL": "200"}
    with running(*APP, environment={"DATABASE_URL": own_postgres.url(), **times}) as service:

        def behind() -> bool:
            seen = service.get("/health/database")
            return seen.status == 503 and seen.json()["error"]["code"] == "schema_behind"

        wait_until(
            lambda: service.status("/health/live") == 200, seconds=READY_WITHIN, what="alive"
        )
        wait_until(behind, what="looked at")
        ready, check = service.get("/health/ready"), service.get("/health/database").json()
        assert ready.status == 503
        assert ready.json()["checks"]["database"] is False
        assert check["message"] == (
            f"Database schema is behind: {', '.join(REVISIONS)} pending; run `viralfx migrate`"
        )
        result = command("migrate", environment={"DATABASE_URL": own_postgres.url()})
        assert result.returncode == 0, result.stderr
        wait_until(lambda: service.status("/health/ready") == 200, what="ready")


def test_wrong_credentials_end_the_start_after_all_attempts(own_postgres: PostgresServer) -> None:
    """Exit code 3, one line that says what to do; until then probes answer, and no secret shows."""
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
        said = "".join([*service.output, *service.errors])
        assert "planted" not in said
        assert "Traceback" not in said
