"""Jobs in memory in one real process: accepted over HTTP, and finished at the stop."""

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.servers.waiting import wait_until
from tests.system.culprit_tasks import RUNS
from tests.system.culprits import CODE, CULPRITS
from tests.system.jobs import JOBS, accept, job, until
from tests.system.service import Service, running

TASKS = {"TASK_MODULES": "tests.job_tasks"}


@contextmanager
def serving(**environment: str) -> Iterator[Service]:
    """Run the service with a user's tasks."""
    with running(environment={**TASKS, **environment}) as service:
        yield service.wait_ready()


@pytest.mark.each_python
def test_an_accepted_job_is_run() -> None:
    """Request, job and result share one correlation id."""
    with serving() as service:
        job_id = accept(service, "parcels.ship", {"weight": 3}, **{"X-Correlation-ID": "order-17"})
        done = until(service, job_id, "completed")
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
    assert done["result"] == {"weight": 3, "attempt": 1, "correlationId": "order-17"}
    assert (done["attempts"], done["error"], done["correlationId"]) == (1, None, "order-17")


def test_a_failure_is_in_the_job_and_in_the_log() -> None:
    """Each attempt logs a line with the correlation id; the job then holds the error."""
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
    """Waiting, running, completed and failed jobs by queue, named as in docs/operations.md."""
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
    """Running and waiting jobs, since no other process has them."""
    with serving(JOB_CONCURRENCY="2") as service:
        ids = [accept(service, "parcels.wait", 2.0) for _ in range(4)]
        wait_until(lambda: job(service, ids[0])["state"] != "waiting", what="some run")
        service.signal(signal.SIGTERM)
        code = service.exit_code()

    (left,) = service.logged("Job worker drained")
    assert code == 0
    assert left["finished"] + 1 >= len(ids)
    assert [line["outcome"] for line in service.logged("Shutdown stage ended")].count("ok") == 9


@pytest.mark.each_python
def test_an_exit_in_a_task_or_a_callback_of_a_job_ends_no_api(tmp_path: Path) -> None:
    """A job that waits for it fails alone. The process goes on, and its exit code stays 0."""
    exits = [one for one in CODE if "exit" in one.task]
    runs = tmp_path / "runs"
    more = {"TASK_MODULES": CULPRITS, "JOB_MAX_ATTEMPTS": "1", RUNS: str(runs)}
    with serving(**more) as service:
        ids = [accept(service, one.task, one.payload) for one in exits]
        shown = [until(service, job_id, one.state) for job_id, one in zip(ids, exits, strict=True)]
        ready = service.status("/health/ready")
        service.signal(signal.SIGTERM)

        assert (ready, service.exit_code()) == (200, 0)
    ends = [(each["state"], each["error"] and each["error"]["code"]) for each in shown]
    assert ends == [(one.state, one.code) for one in exits]
    assert "SystemExit" in str(service.logged("Uncaught exception"))


def test_timers_that_exit_do_not_change_the_end_of_the_process(tmp_path: Path) -> None:
    """A job has left them; they run until the event loop is closed."""
    with serving(TASK_MODULES=CULPRITS, **{RUNS: str(tmp_path / "runs")}) as service:
        until(service, accept(service, "culprits.exit_beside", "timers"), "completed")
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0


def test_a_failure_that_a_job_leaves_behind_ends_no_process(tmp_path: Path) -> None:
    """Of a task that nothing awaits, and of a callback; the log names the job."""
    left = [one for one in CODE if one.task == "culprits.fail_beside"]
    more = {"TASK_MODULES": CULPRITS, RUNS: str(tmp_path / "runs")}
    with serving(**more) as service:
        ids = [accept(service, one.task, one.payload) for one in left]
        for job_id in ids:
            until(service, job_id, "completed")
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
    lines = {line["job"]: line["where"] for line in service.logged("Uncaught exception")}
    assert lines == dict(zip(ids, ("a task of a job", "a callback of a job"), strict=True))


@pytest.mark.parametrize("how", ["of all", "of all, repeatedly"])
def test_a_job_that_cancels_all_tasks_ends_the_process_in_order(tmp_path: Path, how: str) -> None:
    """The stages run, and other jobs are not lost: the exit code is 1."""
    more = {"TASK_MODULES": CULPRITS, RUNS: str(tmp_path / "runs")}
    with serving(**more) as service:
        accept(service, "culprits.cancel", how)
        code = service.exit_code()

    ended = {line["stage"]: line["outcome"] for line in service.logged("Shutdown stage ended")}
    (line,) = service.logged("Uncaught exception")
    assert (code, line["where"]) == (1, "the main task")
    assert {"listeners", "requests", "jobs", "state", "server"} <= ended.keys()


def test_jobs_beyond_the_budget_are_logged() -> None:
    """Exit code 4 within the budget, even if a task ignores its cancellation."""
    with serving(SHUTDOWN_DRAIN_TIMEOUT="1500") as service:
        hangs = accept(service, "parcels.never", None)
        accept(service, "parcels.wait", 600)
        until(service, hangs, "active")
        service.signal(signal.SIGTERM)
        code = service.exit_code()
    (stage,) = (s for s in service.logged("Shutdown stage ended") if s["stage"] == "jobs")
    assert (code, stage["outcome"]) == (4, "failed")


@pytest.mark.each_python
def test_progress_is_streamed_until_the_end() -> None:
    """Server-sent events over a real connection, which the server closes after the last one."""
    with serving() as service:
        job_id = accept(service, "parcels.wait", 0.3)
        received = _listen(service, job_id)

    states = [json.loads(line[6:])["state"] for line in received if line.startswith("data: ")]
    assert states[-1] == "completed"
    assert set(states) <= {"waiting", "active", "completed"}


def test_the_stop_ends_event_streams_of_jobs() -> None:
    """A client that follows a job gets an event and does not delay the stop."""
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


def test_a_large_body_is_refused_before_it_arrives() -> None:
    """By its announced length, or by the bytes received so far without one."""
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
    assert [b"\r\nconnection: close\r\n" in reply.lower() for reply in replies] == [True, True]


def _post(service: Service, header: bytes, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        head = f"POST {JOBS} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n".encode()
        connection.sendall(head + header + b"\r\n" + body)
        return connection.recv(65536)


def test_a_client_disconnect_in_its_body_changes_nothing() -> None:
    """The received part is valid JSON each time, and shorter than announced."""
    token = "planted-management-token"
    job = b'{"task":"parcels.ship","payload":{"weight":3}}'
    with serving(MANAGEMENT_TOKEN=token, ACCESS_LOG="true") as service:
        before = service.get("/health/loggers/viralfx.jobs").json()
        for line, body in (
            ("PUT /health/loggers/viralfx.jobs", b'{"level":"debug"}'),
            (f"POST {JOBS}", job),
        ):
            with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
                head = (
                    f"{line} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {token}\r\n"
                    "Content-Type: application/json\r\nContent-Length: 500\r\n\r\n"
                )
                connection.sendall(head.encode() + body)
        # The server answers a new request after it has dropped the old ones.
        wait_until(lambda: _cut(service), what="the cut request in the log")
        after = service.get("/health/loggers/viralfx.jobs").json()
        listed = [each["task"] for each in service.get(JOBS).json()["items"]]
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
    assert after == before
    assert "parcels.ship" not in listed
    assert service.logged("Request failed") == []


def _cut(service: Service) -> list[str]:
    lines = list(service.output)
    return [line for line in lines if '"method":"POST"' in line and '"cut":true' in line]


def test_head_of_an_event_stream_ends_and_keeps_the_connection() -> None:
    """No body follows, so the client can read the next response on the connection."""
    with serving() as service:
        body = {"task": "parcels.ship", "payload": {"weight": 1}, "runAt": "2999-01-01T00:00:00Z"}
        path = service.get(JOBS, method="POST", json_body=body).json()["links"]["events"]
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            head = f"HEAD {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()
            live = b"GET /health/live HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
            connection.sendall(head + live)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk

    first, _, rest = received.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"text/event-stream" in first
    assert rest.startswith(b"HTTP/1.1 200 ")
    assert b'"alive":true' in rest


def test_the_api_is_guarded_by_its_token() -> None:
    """In production as well, where the token is mandatory."""
    environment = {
        "API_TOKEN": "planted-Qw7rT2zXk9Lm4vNc",
        "ENVIRONMENT": "production",
        "ALLOW_MEMORY_ADAPTERS": "true",
    }
    with serving(**environment) as service:
        statuses = [
            service.get(JOBS, headers=headers).status
            for headers in (
                {},
                {"Authorization": "Bearer x"},
                {"Authorization": "Bearer planted-Qw7rT2zXk9Lm4vNc"},
            )
        ]

    assert statuses == [401, 401, 200]


def test_without_a_worker_jobs_wait() -> None:
    """--no-worker applies in memory as well; the stop logs the waiting jobs as lost."""
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
def test_jobs_are_only_on_the_api_port(*, management: bool) -> None:
    """The management port serves only operations endpoints."""
    with running(management=management) as service:
        service.wait_ready()

        assert service.get(JOBS).status == 200
        if management:
            assert service.manage(JOBS).status == 404
