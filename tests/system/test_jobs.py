"""Jobs in memory, in one real process: accepted over HTTP, run beside it, finished at the stop."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS, accept, job, until
from tests.system.service import Service, running

TASKS = {"TASK_MODULES": "tests.job_tasks"}


@contextmanager
def serving(**environment: str) -> Iterator[Service]:
    """Run the service with tasks of somebody else."""
    with running(environment={**TASKS, **environment}) as service:
        yield service.wait_ready()


def test_an_accepted_job_is_run() -> None:
    """From the request to the result, in one conversation."""
    with serving() as service:
        job_id = accept(service, "parcels.ship", {"weight": 3}, **{"X-Correlation-ID": "order-17"})
        done = until(service, job_id, "completed")
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
    assert done["result"] == {"weight": 3, "attempt": 1, "correlationId": "order-17"}
    assert (done["attempts"], done["error"], done["correlationId"]) == (1, None, "order-17")


def test_a_failure_is_told_in_the_job_and_in_the_log() -> None:
    """Each attempt is a line with the conversation's id; then the job says why."""
    with serving(JOB_MAX_ATTEMPTS="2") as service:
        job_id = accept(service, "parcels.lose", {}, **{"X-Correlation-ID": "order-18"})
        failed = until(service, job_id, "failed")
        again = service.get(f"{JOBS}/{job_id}/retry", method="POST")
        until(service, job_id, "failed")
        service.signal(signal.SIGTERM)
        code = service.exit_code()

    assert (failed["attempts"], failed["error"]) == (
        2,
        {"code": "error", "message": "planted: the parcel is lost"},
    )
    assert (again.status, code) == (202, 0)
    lines = [*service.logged("Job attempt failed"), *service.logged("Job failed")]
    assert [line["correlationId"] for line in lines] == ["order-18"] * 4


def test_the_counts_are_in_the_details_of_health() -> None:
    """What waits, runs, completed and failed, by queue, with the guide's names."""
    with serving(JOB_CONCURRENCY="1", JOB_MAX_ATTEMPTS="1") as service:
        for payload in (0.01, 600, 600):
            accept(service, "parcels.wait", payload)
        wait_until(
            lambda: (
                _metrics(service, "notifications")
                == {"waiting": 1, "active": 1, "completed": 1, "failed": 0}
            ),
            what="counts",
        )


def _metrics(service: Service, queue: str) -> dict[str, int]:
    details = service.get("/health/detailed?fresh=1").json()["checks"]["queues"]["details"]
    (metrics,) = (each["metrics"] for each in details if each["name"] == queue)
    return {name: metrics[name] for name in ("waiting", "active", "completed", "failed")}


def test_the_stop_finishes_the_jobs_in_memory() -> None:
    """Those that run and those that wait; nobody else could."""
    with serving(JOB_CONCURRENCY="2") as service:
        ids = [accept(service, "parcels.wait", 2.0) for _ in range(4)]
        wait_until(lambda: job(service, ids[0])["state"] != "waiting", what="some run")
        service.signal(signal.SIGTERM)
        code = service.exit_code()

    (left,) = service.logged("Job worker left")
    assert code == 0
    assert left["finished"] + 1 >= len(ids)
    assert [line["outcome"] for line in service.logged("Shutdown stage ended")].count("ok") == 8


def test_jobs_that_do_not_end_within_the_budget_are_told() -> None:
    """Exit code 4, in time, also with a task that ignores its cancellation."""
    with serving(SHUTDOWN_DRAIN_TIMEOUT="1500") as service:
        hangs = accept(service, "parcels.never", None)
        accept(service, "parcels.wait", 600)
        until(service, hangs, "active")
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        code = service.exit_code()

        assert time.monotonic() - began < 4.0
    (stage,) = (s for s in service.logged("Shutdown stage ended") if s["stage"] == "jobs")
    assert (code, stage["outcome"]) == (4, "failed")


def test_progress_is_told_until_the_end() -> None:
    """Server-sent events over a real connection, closed by the server after the last."""
    with serving() as service:
        job_id = accept(service, "parcels.wait", 0.3)
        told = _listen(service, job_id)

    states = [json.loads(line[6:])["state"] for line in told if line.startswith("data: ")]
    assert states[-1] == "completed"
    assert set(states) <= {"waiting", "active", "completed"}


def test_the_stop_ends_what_is_followed() -> None:
    """A client that follows a job is told, and keeps nobody from leaving."""
    with serving(JOB_CONCURRENCY="1") as service:
        first, second = (accept(service, "parcels.wait", 1.5) for _ in range(2))
        until(service, first, "active")
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            connection.sendall(
                f"GET {JOBS}/{second}/events HTTP/1.1\r\nHost: test\r\n\r\n".encode()
            )
            received = connection.recv(65536)
            while b"data: " not in received:
                received += connection.recv(65536)
            service.signal(signal.SIGTERM)
            while chunk := connection.recv(65536):
                received += chunk
        code = service.exit_code()

    assert b"event: shutdown" in received
    assert received.endswith(b"0\r\n\r\n")
    assert code == 0


def _listen(service: Service, job_id: str) -> list[str]:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        head = f"GET {JOBS}/{job_id}/events HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received.decode().splitlines()


def test_a_large_body_is_refused_before_it_is_there() -> None:
    """By its announced length, and by what came of one without."""
    with serving() as service:
        replies = [
            _post(service, b"Content-Length: 70000\r\n", b""),
            _post(
                service,
                b"Transfer-Encoding: chunked\r\n",
                b"".join(b"4000\r\n%s\r\n" % (b"x" * 0x4000) for _ in range(5)),
            ),
        ]

    assert [reply.startswith(b"HTTP/1.1 413 ") for reply in replies] == [True, True]


def _post(service: Service, header: bytes, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        head = f"POST {JOBS} HTTP/1.1\r\nHost: test\r\n".encode()
        connection.sendall(head + header + b"\r\n" + body)
        return connection.recv(65536)


def test_the_api_is_guarded_by_its_token() -> None:
    """In production as well, where there must be one."""
    environment = {
        "API_TOKEN": "planted",
        "ENVIRONMENT": "production",
        "ALLOW_MEMORY_ADAPTERS": "true",
    }
    with serving(**environment) as service:
        statuses = [
            service.get(JOBS, headers=headers).status
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer planted"})
        ]

    assert statuses == [401, 401, 200]


def test_without_a_worker_jobs_wait() -> None:
    """--no-worker is obeyed in memory, too; what waits at the stop is lost, and that is told."""
    with running("--no-worker", environment=TASKS) as service:
        service.wait_ready()
        job_id = accept(service, "parcels.ship", {"weight": 1})
        wait_until(
            lambda: service.get("/health/queues?fresh=1").json()["status"] == "pass", what="a check"
        )
        waiting = job(service, job_id)["state"]
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 4
    assert waiting == "waiting"
    assert service.logged("Listening")[0].get("queues") is None


@pytest.mark.parametrize("management", [False, True])
def test_jobs_are_on_the_api_s_port_alone(*, management: bool) -> None:
    """The management port knows operations endpoints only."""
    with running(management=management) as service:
        service.wait_ready()

        assert service.get(JOBS).status == 200
        if management:
            assert service.manage(JOBS).status == 404
