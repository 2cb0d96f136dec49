"""Jobs of a WSGI application, under a real server that forks."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.service import ROOT, Reply, clean_environment, request
from tests.system.workers import environment_of, worker

KINDS = ("plain", "psycopg", "psycopg2", "sqlalchemy")


@contextmanager
def gunicorn(environment: dict[str, str]) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """Serve the application with two processes, forked after its import, of four threads each."""
    port = free_port()
    options = ["--preload", "--workers", "2", "--threads", "4", "--bind", f"127.0.0.1:{port}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *options, "tests.system.wsgi_app:app"],
        cwd=ROOT,
        env={**clean_environment(), **environment},
    )
    try:
        wait_until(lambda: _answers(port), what="an answer")
        yield port, process
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        return request(port, "/plain/commit/first").status == 200
    except OSError:
        return False


def test_a_wsgi_application_submits_jobs(database: Database) -> None:
    """From threads of forked processes, and in transactions of each synchronous driver."""
    environment = environment_of(database, TASK_MODULES="tests.system.wsgi_app")
    paths = [
        f"/{kind}/{end}/{end}{number}"
        for number in range(10)
        for kind in KINDS
        for end in ("commit", "leave")
    ]
    with gunicorn(environment) as (port, process):
        with ThreadPoolExecutor(8) as clients:
            replies: list[Reply] = list(
                clients.map(lambda path: request(port, path, timeout=60), paths)
            )
        process.terminate()
        exit_code = process.wait(30)
    jobs = Counter(
        dict(
            database.execute(
                "SELECT left(payload #>> '{}', 6), count(*)::int"
                " FROM viralfx_ops.viralfx_all_jobs GROUP BY 1"
            )
        )
    )

    assert {reply.status for reply in replies} == {200}
    assert len({reply.body for reply in replies}) == 2
    assert exit_code == 0
    # Each request asks for three jobs, and only those without a transaction survive `leave`.
    assert jobs["import"] == 1
    assert jobs["commit"] == 3 * 10 * len(KINDS)
    assert jobs["leave0"] + sum(jobs[f"leave{n}"] for n in range(1, 10)) == 3 * 10


def test_a_worker_finds_them_at_once(database: Database) -> None:
    """The transaction of each driver notifies the workers."""
    environment = environment_of(database, TASK_MODULES="tests.system.wsgi_app")
    environment |= {"JOB_POLL_INTERVAL": "60000"}
    states = "SELECT state, count(*)::int FROM viralfx_ops.viralfx_all_jobs GROUP BY 1"
    with worker(environment), gunicorn(environment) as (port, _):
        for kind in KINDS:
            assert request(port, f"/{kind}/commit/now").status == 200
        expected = dict(database.execute(states))
        wait_until(
            lambda: dict(database.execute(states)) == {"completed": sum(expected.values())},
            what=lambda: str(database.execute(states)),
        )
