"""The password of Postgres changes and all connections are cut, while the service runs."""

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.service import Service, running
from tests.system.workers import environment_of

APP = ("--app", "tests.system.rotating_app:app", "--worker")
INTERVAL = 1.0
TOLERANCE = 15.0
"""Seconds for the processes on a busy machine."""
FIRST, SECOND, THIRD = "first-secret", "second-secret", "third-secret"
CONNECTIONS = {"viralfx", "viralfx-health", "viralfx-heartbeat"}
"""The application names of pool, check and lease."""
SOURCES = ["file", "callable", "address"]
"""A usual run has the first two; tests/integration has an address in a file."""


class Role:
    """A role whose password changes."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.name = f"role_{urlsplit(database.url).path[1:]}"
        database.execute(f"create role {self.name} login superuser password '{FIRST}'")

    def change(self, password: str) -> None:
        """Change the password and end all sessions."""
        self.database.execute(f"alter role {self.name} password '{password}'")
        self.database.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"  # noqa: S608
            f" where usename = '{self.name}'"
        )

    def connections(self) -> set[str]:
        """Return the application names of all sessions."""
        rows = self.database.execute(
            f"select application_name from pg_stat_activity where usename = '{self.name}'"  # noqa: S608
        )
        return {name for (name,) in rows}

    def url(self, password: str | None = None) -> str:
        """Return the address for this role."""
        parts = urlsplit(self.database.url)
        account = self.name if password is None else f"{self.name}:{password}"
        return f"postgresql://{account}@{parts.netloc.split('@')[1]}{parts.path}"


@pytest.fixture
def role(database: Database) -> Iterator[Role]:
    """Return a role of the test."""
    role = Role(database)
    yield role
    role.change("last-secret")
    database.execute(f"drop owned by {role.name} cascade")
    database.execute(f"drop role {role.name}")


def is_back(service: Service, role: Role) -> bool:
    """Return True if all connections are open, and the service is ready."""
    return role.connections() >= CONNECTIONS and service.status("/health/ready") == 200


@pytest.mark.soak
@pytest.mark.parametrize("source", SOURCES if SOAK else SOURCES[:2])
def test_rotated_password_needs_no_restart(role: Role, tmp_path: Path, source: str) -> None:
    """Pool, check and lease are back within one interval, in both orders of change."""
    path = tmp_path / "secret"

    def write(password: str) -> None:
        path.write_text(role.url(password) if source == "address" else password)

    write(FIRST)
    variable = {
        "file": "DB_PASSWORD_FILE",
        "address": "DATABASE_URL_FILE",
        "callable": "DB_TOKEN_PATH",
    }
    environment = environment_of(
        role.database,
        HEALTH_CHECK_INTERVAL=str(int(INTERVAL * 1000)),
        DB_HEALTH_CHECK_INTERVAL=str(int(INTERVAL * 1000)),
        TASK_MODULES="tests.system.fault_tasks",
    )
    environment["DATABASE_URL"] = "" if source == "address" else role.url()
    environment[variable[source]] = str(path)
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        wait_until(lambda: is_back(service, role), what="all connections are open")
        # The file first: the service is ready all the time.
        write(SECOND)
        role.change(SECOND)
        began = time.monotonic()
        wait_until(lambda: is_back(service, role), what="the second password is in use")
        first = time.monotonic() - began
        # The server first: the service is not ready until the file follows.
        role.change(THIRD)
        wait_until(
            lambda: service.get("/health/database").json().get("error", {}).get("code") == "auth",
            what="the password is refused",
        )
        write(THIRD)
        began = time.monotonic()
        wait_until(lambda: is_back(service, role), what="the third password is in use")
        second = time.monotonic() - began
        assert service.get("/run", method="POST").json() == {"state": "completed"}
        output = "".join([*service.output, *service.errors])

    assert first < INTERVAL + TOLERANCE
    assert second < INTERVAL + TOLERANCE
    assert not any(secret in output for secret in (FIRST, SECOND, THIRD))
