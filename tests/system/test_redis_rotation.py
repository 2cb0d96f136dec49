"""The password of Redis changes and all connections are cut, while the service runs."""

import time
from pathlib import Path

import pytest
from tests.servers.postgres import Database
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import wait_until
from tests.system.service import Service, running
from tests.system.workers import environment_of

APP = ("--app", "tests.system.rotating_app:app", "--worker")
INTERVAL = 1.0
TOLERANCE = 15.0
"""Seconds for the processes on a busy machine."""
FIRST, SECOND, THIRD = "first-secret", "second-secret", "third-secret"


def change(server: RedisServer, password: str) -> None:
    """Change the password of both users and end all connections."""
    server.command("ACL", "SETUSER", "alice", "resetpass", f">{password}")
    server.command("CONFIG", "SET", "requirepass", password)
    server.password = password
    server.command("CLIENT", "KILL", "TYPE", "normal")


def sent_by(server: RedisServer) -> int:
    """Return the number of notifications so far."""
    calls: int = server.command("INFO", "commandstats").get("cmdstat_xadd", {}).get("calls", 0)
    return calls


def is_back(service: Service) -> bool:
    """Return True if check and cache use Redis."""
    ready = bool(service.get("/health/redis").json()["status"] == "pass")
    return ready and service.get("/cached").json() == {"value": "planted"}


@pytest.mark.each_python
@pytest.mark.parametrize("source", ["file", "callable"])
def test_rotated_credentials_need_no_restart(
    database: Database, tmp_path: Path, source: str
) -> None:
    """Cache, notifications and check are back within one interval, in both orders of change."""
    path = tmp_path / "secret"
    path.write_text(FIRST)
    users = [f"alice on >{FIRST} ~* +@all"]
    with redis_server(password=FIRST, users=users) as server:
        server.command("SET", "viralfx:cache:planted", "planted")
        variable = "REDIS_PASSWORD_FILE" if source == "file" else "TOKEN_PATH"
        environment = environment_of(
            database,
            REDIS_HOST=server.host,
            REDIS_PORT=str(server.port),
            HEALTH_CHECK_INTERVAL=str(int(INTERVAL * 1000)),
            JOB_POLL_INTERVAL="60000",
            TASK_MODULES="tests.system.fault_tasks",
            **{variable: str(path)},
        )
        with running(*APP, environment=environment) as service:
            service.wait_ready()
            wait_until(lambda: is_back(service), what="Redis is in use")
            # The file first: nothing is noticed.
            path.write_text(SECOND)
            change(server, SECOND)
            began = time.monotonic()
            wait_until(lambda: is_back(service), what="the second password is in use")
            first = time.monotonic() - began
            # The server first: the service is degraded until the file follows.
            change(server, THIRD)
            wait_until(
                lambda: service.get("/health/redis").json().get("error", {}).get("code") == "auth",
                what="the password is refused",
            )
            path.write_text(THIRD)
            began = time.monotonic()
            wait_until(lambda: is_back(service), what="the third password is in use")
            second = time.monotonic() - began
            # Nothing but a notification starts a job within the minute of a poll.
            sent = sent_by(server)
            wait_until(
                lambda: service.get("/run", method="POST").json() == {"state": "completed"},
                what="a notified job runs",
            )
            assert sent_by(server) > sent
            output = "".join([*service.output, *service.errors])

        assert first < INTERVAL + TOLERANCE
        assert second < INTERVAL + TOLERANCE
        assert not any(secret in output for secret in (FIRST, SECOND, THIRD))
