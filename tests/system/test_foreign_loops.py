"""Calls of the services from other event loops and threads than those of the application."""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.service import ROOT, clean_environment, request
from tests.system.workers import api, environment_of, worker

APP = "tests.system.foreign_app:app"
CALLS = 20_000 if SOAK else 100
CLIENTS = 16


@contextmanager
def served(environment: Mapping[str, str], server: str) -> Iterator[tuple[int, list[int]]]:
    """Serve the application; yield its port, and the list that gets its exit code."""
    ended: list[int] = []
    if server == "viralfx serve":
        with api(environment, "--app", APP) as service:
            yield service.port, ended
            service.signal(signal.SIGTERM)
            ended.append(service.exit_code())
        return
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", APP, "--port", str(port), "--log-level", "warning"],
        cwd=ROOT,
        env={**clean_environment(), **environment},
    )
    try:
        wait_until(lambda: _is_ready(port), what="ready")
        yield port, ended
        process.send_signal(signal.SIGTERM)
        ended.append(process.wait(30))
    finally:
        process.kill()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        return request(port, "/health/ready").status == 200
    except OSError:
        return False


pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800 if SOAK else 90)]


@pytest.mark.each_python
@pytest.mark.parametrize(("server", "code"), [("viralfx serve", 0), ("uvicorn", -signal.SIGTERM)])
def test_plain_endpoints_use_every_service_beside_asynchronous_ones(
    database: Database,
    redis: RedisServer,
    record_property: Callable[[str, object], None],
    server: str,
    code: int,
) -> None:
    """Each request is answered, no call hangs, and the process stops in order."""
    environment = {**environment_of(database, TASK_MODULES=""), "REDIS_HOST": "127.0.0.1"}
    environment["REDIS_PORT"] = str(redis.port)
    paths = [
        f"/{kind}/{number}"
        for number in range(CALLS)
        for kind in ("plain/jobs", "native/jobs", "blocking")
    ]
    paths += [
        f"/{kind}/{service}/{number}"
        for number in range(CALLS // 4)
        for service in ("cache", "database", "redis")
        for kind in ("plain", "native")
    ]
    with served(environment, server) as (port, ended):
        with ThreadPoolExecutor(CLIENTS) as clients:
            found = Counter(clients.map(lambda path: request(port, path, timeout=60).status, paths))
        answers = {path: request(port, path).body.decode() for path in ("/acquire", "/on-the-loop")}
    accepted = database.execute(
        "SELECT count(*) FROM viralfx_ops.viralfx_all_jobs WHERE task = 'foreign.note'"
    )

    record_property("requests", len(paths))
    record_property("jobs", 3 * CALLS)
    assert found == {200: len(paths)}
    assert accepted == [(3 * CALLS,)]
    assert "execute_with_retry()" in answers["/acquire"]
    assert "await jobs.submit(...)" in answers["/on-the-loop"]
    assert ended == [code]


def test_plain_tasks_use_every_service(
    database: Database, redis: RedisServer, record_property: Callable[[str, object], None]
) -> None:
    """Their jobs are accepted beside those of asynchronous tasks, and none fails."""
    environment = environment_of(database, TASK_MODULES="none")
    environment |= {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(redis.port)}
    with worker(environment, "--app", APP) as process:
        for name in ("foreign.plain", "foreign.native"):
            database.execute(
                f"SELECT viralfx_ops.enqueue('{name}', to_jsonb(number))"  # noqa: S608 - constants
                f" FROM generate_series(1, {CALLS}) AS number"
            )
        states = "SELECT task, state, count(*) FROM viralfx_ops.viralfx_all_jobs GROUP BY 1, 2"
        wait_until(
            lambda: (
                sorted(database.execute(states))
                == [
                    ("foreign.native", "completed", CALLS),
                    ("foreign.note", "completed", 3 * CALLS),
                    ("foreign.plain", "completed", CALLS),
                ]
            ),
            seconds=600 if SOAK else 60,
            what=lambda: str(database.execute(states)),
        )
        process.signal(signal.SIGTERM)

        assert process.exit_code() == 0
    record_property("jobs", 5 * CALLS)
