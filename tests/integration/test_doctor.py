"""``viralfx doctor`` with real servers finds planted misconfigurations."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
from tests import forked
from tests.integration.doctor import GOOD, TOKEN, USER_PASSWORD, program, visit
from tests.servers.certificates import Certificates
from tests.servers.ports import free_port
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.redis import redis_server
from tests.servers.waiting import wait_until

from viralfx.postgres.migrations import OBJECTS, REVISIONS

USER = "planted_user"


@dataclass(frozen=True)
class Place:
    """A migrated database, and a service user with the required permissions."""

    database: Database

    @property
    def server(self) -> PostgresServer:
        """Where it is."""
        return self.database.server

    def url(self, *, user: str = USER, password: str = USER_PASSWORD) -> str:
        """Return its address."""
        return self.server.url(self.database.name, user=user, password=password)

    def execute(self, sql: str) -> None:
        """Run one statement as the superuser."""
        self.database.execute(sql)

    @property
    def good(self) -> dict[str, str]:
        """A right configuration."""
        return {**GOOD, "DATABASE_URL": self.url()}


def prepare(database: Database) -> Place:
    """Migrate a database as a separate user."""
    place = Place(database)
    database.execute(f"CREATE ROLE {USER} LOGIN PASSWORD '{USER_PASSWORD}'")
    database.execute(f'GRANT CREATE ON DATABASE "{database.name}" TO {USER}')
    done = forked.viralfx("migrate", environ={"DATABASE_URL": place.url()})
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def own_template(postgres: PostgresServer) -> Iterator[str]:
    """Return the name of a database that a separate user has migrated: copying it is fast."""
    template = Database(postgres, postgres.create_database())
    prepare(template)
    yield template.name
    postgres.drop_database(template.name)
    postgres.execute(f"DROP ROLE {USER}")


@pytest.fixture
def place(postgres: PostgresServer, own_template: str) -> Iterator[Place]:
    """Return a database that is ready for the service."""
    database = Database(postgres, postgres.create_database(own_template))
    # A permission on the database itself is not copied.
    database.execute(f'GRANT CREATE ON DATABASE "{database.name}" TO {USER}')
    yield Place(database)
    postgres.drop_database(database.name)
    # The role is that of all these tests.
    postgres.execute(f"ALTER ROLE {USER} CONNECTION LIMIT -1")
    postgres.execute(f"ALTER ROLE {USER} RESET ALL")


# -- what is right ---------------------------------------------------------------------------


def test_correct_configuration_passes(place: Place) -> None:
    """Exit code 0 and no warning; the servers are unchanged."""
    before = contents(place)
    with redis_server(password="h:u@s%41", arguments=["--appendonly", "yes"]) as redis:
        own = {"REDIS_HOST": redis.host, "REDIS_PORT": str(redis.port)}
        environ = {**place.good, **own, "REDIS_PASSWORD": "h:u@s%41"}
        del environ["ALLOW_MEMORY_ADAPTERS"]
        found = visit(environ, secrets=("h:u@s%41",))
        done = program(environ)
        keys = redis.command("DBSIZE")

    assert (found.code, found.status) == (0, "pass"), found
    passed = [f["area"] for f in found.findings if f["status"] == "pass"]
    assert passed == [
        "environment",
        "environment",
        "secrets",
        "secrets",
        "shutdown budgets",
        "database",
        "pool",
        "migrations",
        "redis",
        "memory",
        "ports",
        "health endpoints",
        "logging",
    ]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "0 failed, 0 warned, 13 passed, 3 skipped"
    assert not [
        s for s in (TOKEN, USER_PASSWORD, "h:u@s%41", place.server.password) if s in done.stdout
    ]
    assert (contents(place), keys) == (before, 0)


def contents(place: Place) -> dict[str, list[tuple[object, ...]]]:
    """Return the rows of each table of the service, by its name."""
    tables = place.database.execute(
        "SELECT relname FROM pg_class WHERE relname LIKE 'viralfx%' AND relkind = 'r' ORDER BY 1"
    )
    return {name: place.database.execute(f"TABLE {name}") for (name,) in tables}


def test_doctor_leaves_no_row_behind(place: Place, tmp_path: Path) -> None:
    """It is no process of the fleet, and sends no alert about a check that fails here."""
    (tmp_path / "planted.py").write_text(APPLICATION.format(status="FAIL"))
    before = contents(place)
    environ = {
        **place.good,
        "PYTHONPATH": str(tmp_path),
        "ALERT_WEBHOOK_URL": "https://alerts.invalid/hook",
    }
    found = visit(environ, "--app", "planted:app")

    assert found.judged("health endpoints", "degraded: disk: the disk is FAIL") == ["warn"], found
    assert contents(place) == before


def test_the_objects_of_the_last_migration_are_known(place: Place) -> None:
    """All tables, views and functions are looked for, and the indexes that keep keys unique."""
    found = place.database.execute(
        """
        SELECT relname FROM pg_class WHERE relnamespace = 'viralfx_ops'::regnamespace
            AND (relkind IN ('r', 'v') OR relname IN (
                SELECT indexrelid::regclass::text FROM pg_index
                WHERE indisunique AND NOT indisprimary
            ))
        UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'viralfx_ops'::regnamespace
        """
    )

    assert sorted(name for (name,) in found) == sorted(OBJECTS)


async def test_doctor_says_nothing_false_about_a_busy_server(place: Place) -> None:
    """A locked table is no outage, and others' connections do not count for the user's limit."""
    place.execute(f"ALTER ROLE {USER} CONNECTION LIMIT 40")
    others = [await asyncpg.connect(place.database.url) for _ in range(30)]
    await others[0].execute("BEGIN; LOCK TABLE viralfx_ops.viralfx_migrations")
    found = visit(place.good)
    for connection in others:
        await connection.close()

    assert found.of("pool") == [], found
    assert found.of("database") == [], found
    (locked,) = found.of("migrations")
    assert locked["found"] == (
        "another session locks the table viralfx_ops.viralfx_migrations, as a migration does"
    )


SLOW = """
import time
time.sleep(60)
"""
HASTY = """
import sys
import viralfx.cli.doctor
viralfx.cli.doctor.LIMIT = 1.0
from viralfx.cli import main
sys.exit(main(["doctor", "--app", "planted:app"]))
"""


def test_an_application_that_loads_slowly_is_no_problem_of_a_server(tmp_path: Path) -> None:
    """The finding names the step that took so long."""
    (tmp_path / "planted.py").write_text(SLOW)
    done = subprocess.run(
        [sys.executable, "-c", HASTY],
        env={**GOOD, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    said = " ".join(done.stdout.split())

    assert "loading the application takes longer than 0.9 s on this machine" in said
    assert "network" not in said


def test_doctor_closes_its_connections() -> None:
    """In order, so that the server does not log a lost client."""
    left = f"SELECT 1 FROM pg_stat_activity WHERE usename = '{USER}'"  # noqa: S608 - a constant
    with postgres_server(
        settings={"log_line_prefix": "[%u] ", "log_disconnections": "on"}
    ) as server:
        place = prepare(Database(server=server, name=server.create_database()))
        visit(place.good)
        wait_until(lambda: not place.database.execute(left), what="connections are closed")
        log = server.log()
    assert f"[{USER}]" in log
    assert "unexpected EOF" not in log


# -- what is planted in the database ---------------------------------------------------------

Plant = Callable[[Place], dict[str, str]]


def changed(*statements: str, **environ: str) -> Plant:
    """Change the database by SQL of the superuser, and variables."""

    def plant(place: Place) -> dict[str, str]:
        for sql in statements:
            place.execute(sql)
        return environ

    return plant


def url(**parts: str) -> Plant:
    """Change a part of the address."""
    return lambda place: {"DATABASE_URL": place.url(**parts)}


def garbage(place: Place) -> dict[str, str]:
    """Write a file that holds no certificates."""
    del place
    return {"DB_TLS_MODE": "verify-ca", "DB_TLS_CA_FILE": __file__}


DATABASE: dict[str, tuple[Plant, str, str, str]] = {
    "wrong password": (
        url(password="wr0ng"),
        "database",
        "fail",
        "refuses the user or password",
    ),
    "unknown user": (url(user="nobody"), "database", "fail", "refuses the user or password"),
    "unknown host": (
        lambda _: {"DATABASE_URL": "postgresql://u:p@db.invalid/app"},
        "database",
        "fail",
        "db.invalid:5432/app has an unknown host name",
    ),
    "refused port": (
        lambda _: {"DATABASE_URL": f"postgresql://u:p@127.0.0.1:{free_port()}/app"},
        "database",
        "fail",
        "refuses connections",
    ),
    "no such database": (
        lambda p: {"DATABASE_URL": p.server.url("nothing", user=USER, password=USER_PASSWORD)},
        "database",
        "fail",
        "has no database of that name",
    ),
    "TLS with a server that has none": (
        lambda _: {"DB_TLS_MODE": "require"},
        "database",
        "fail",
        "does not support TLS",
    ),
    "certificates that are none": (garbage, "database", "fail", "holds no certificates"),
    "schema behind": (
        changed("DROP TABLE viralfx_migrations"),
        "migrations",
        "fail",
        "the schema is behind: 0001",
    ),
    "schema of a later version": (
        changed("UPDATE viralfx_migrations SET version_num = '9999'"),
        "migrations",
        "warn",
        "the schema is at 9999",
    ),
    "a dropped table of jobs": (
        changed("DROP TABLE viralfx_jobs CASCADE"),
        "migrations",
        "fail",
        f"the schema is at {REVISIONS[-1]}, but without viralfx_jobs, viralfx_all_jobs",
    ),
    "a dropped table of the fleet": (
        changed("DROP TABLE viralfx_instances"),
        "migrations",
        "fail",
        "but without viralfx_instances",
    ),
    "a dropped index that keeps keys unique": (
        changed("DROP INDEX viralfx_jobs_key"),
        "migrations",
        "fail",
        "but without viralfx_jobs_key",
    ),
    "no right to migrate": (
        changed(
            "DROP TABLE viralfx_migrations", f"REVOKE CREATE ON SCHEMA viralfx_ops FROM {USER}"
        ),
        "migrations",
        "fail",
        "may not create tables in the schema viralfx_ops, so `viralfx migrate` would fail",
    ),
    "no right to read the versions": (
        changed(
            "ALTER TABLE viralfx_migrations OWNER TO viralfx",
            f"REVOKE ALL ON viralfx_migrations FROM {USER}",
        ),
        "migrations",
        "fail",
        "may not read the table viralfx_ops.viralfx_migrations",
    ),
    "no right to save state": (
        changed(
            "ALTER TABLE viralfx_state OWNER TO viralfx",
            f"GRANT SELECT ON viralfx_state TO {USER}",
        ),
        "database",
        "fail",
        "may not DELETE, INSERT, UPDATE on the table viralfx_ops.viralfx_state",
    ),
    "no right to read all jobs": (
        changed(
            "ALTER VIEW viralfx_all_jobs OWNER TO viralfx",
            f"REVOKE ALL ON viralfx_all_jobs FROM {USER}",
        ),
        "database",
        "fail",
        "may not SELECT on the table viralfx_ops.viralfx_all_jobs",
    ),
    "tables of another user": (
        changed(
            "DROP TABLE viralfx_migrations",
            "ALTER TABLE viralfx_unknown_tasks OWNER TO viralfx",
        ),
        "migrations",
        "fail",
        "tables of the service belong to viralfx, so `viralfx migrate` would fail",
    ),
    "no right to use the schema": (
        changed(
            "ALTER SCHEMA viralfx_ops OWNER TO viralfx",
            f"REVOKE ALL ON SCHEMA viralfx_ops FROM {USER}",
        ),
        "migrations",
        "fail",
        "may not use the schema viralfx_ops",
    ),
    "no such schema": (
        changed(DB_SCHEMA="elsewhere"),
        "migrations",
        "fail",
        "the schema is behind: 0001",
    ),
    "no right to create the schema": (
        changed(
            "DROP SCHEMA viralfx_ops CASCADE",
            # The server's user owns the database.
            f"DROP OWNED BY {USER}",
        ),
        "migrations",
        "fail",
        "may not create the schema viralfx_ops, so `viralfx migrate` would fail",
    ),
    "superuser": (
        lambda p: {"DATABASE_URL": p.database.url},
        "database",
        "warn",
        "the user is a superuser",
    ),
    "nothing may be written": (
        changed(f"ALTER ROLE {USER} SET default_transaction_read_only = on"),
        "database",
        "fail",
        "nothing can be written",
    ),
    "a statement timeout of the server's": (
        changed(f"ALTER ROLE {USER} SET statement_timeout = 4321", DB_STATEMENT_TIMEOUT="0"),
        "database",
        "warn",
        "cancels statements after 4321 ms",
    ),
    "idle connections are ended": (
        changed(f"ALTER ROLE {USER} SET idle_session_timeout = 4321"),
        "database",
        "warn",
        "ends the pool's idle connections after 4321 ms",
    ),
    "a statement timeout that nothing keeps": (
        lambda _: {"DB_STATEMENT_TIMEOUT": "1", "DB_SLOW_QUERY_THRESHOLD": "0"},
        "database",
        "fail",
        "cancelled a statement",
    ),
    "more connections than there are": (
        lambda _: {"DB_POOL_MAX": "500"},
        "pool",
        "fail",
        "DB_POOL_MAX=500 and two connections for health and heartbeats are more than the 97",
    ),
    "none is left for heartbeats": (
        changed(f"ALTER ROLE {USER} CONNECTION LIMIT 11", DB_POOL_MAX="10"),
        "pool",
        "fail",
        "DB_POOL_MAX=10 and two connections for health and heartbeats are more than the 11",
    ),
    "no second instance fits": (
        lambda _: {"POOL_PROFILE": "large"},
        "pool",
        "warn",
        "more than half of the 97",
    ),
    "a limit of the user's": (
        changed(f"ALTER ROLE {USER} CONNECTION LIMIT 9"),
        "pool",
        "fail",
        "more than the 9 that the server allows",
    ),
}


@pytest.mark.parametrize("planted", DATABASE.values(), ids=DATABASE)
def test_each_problem_of_the_database_is_found(
    place: Place, planted: tuple[Plant, str, str, str]
) -> None:
    """Once, in its area; failures determine the exit code."""
    plant, area, status, text = planted
    environ = {**place.good, **plant(place)}
    if environ.get("DB_STATEMENT_TIMEOUT") == "1" and sys.platform != "linux":
        pytest.skip("a millisecond is long there")
    found = visit(environ, secrets=("wr0ng", place.server.password))

    assert found.judged(area, text) == [status], found
    assert (found.code, found.status) == ((1, "fail") if status == "fail" else (0, "warn")), found


def test_each_of_several_hosts_is_tried(place: Place) -> None:
    """The service works with one of them; the other could not take over."""
    dead = f"127.0.0.1:{free_port()}"
    url = place.url().replace("@", f"@{dead},", 1)
    found = visit({**GOOD, "DATABASE_URL": url})

    assert found.judged("database", f"the host {dead} refuses connections") == ["warn"], found
    assert found.code == 0, found


def test_password_of_the_application_is_used(place: Place, tmp_path: Path) -> None:
    """With ``--app``; without it there is none."""
    path = tmp_path / "token"
    path.write_text(USER_PASSWORD)
    url = place.url().replace(f":{quote(USER_PASSWORD, safe='')}@", "@")
    environ = {**GOOD, "DATABASE_URL": url, "DB_TOKEN_PATH": str(path)}
    with_app = visit(environ, "--app", "tests.system.rotating_app:app")
    without = visit(environ)

    assert with_app.of("database") == [], with_app
    assert without.judged("database", "refuses the user or password") == ["fail"], without


def test_other_encoding_is_found(postgres: PostgresServer) -> None:
    """It refuses some characters."""
    postgres.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    found = visit({**GOOD, "DATABASE_URL": postgres.url("ascii")})
    postgres.drop_database("ascii")

    assert found.judged("database", "encoded in SQL_ASCII") == ["warn"], found


def test_replica_is_found(own_postgres: PostgresServer) -> None:
    """It accepts no writes."""
    [(data,)] = own_postgres.execute("show data_directory")
    own_postgres.execute(f"copy (select 1) to '{data}/standby.signal'")
    own_postgres.restart()
    found = visit({**GOOD, "DATABASE_URL": own_postgres.url()}, secrets=(own_postgres.password,))

    assert found.judged("database", "is a replica that accepts no writes") == ["fail"], found


def test_frozen_server_is_found(own_postgres: PostgresServer) -> None:
    """The doctor waits less long than the service."""
    own_postgres.freeze()
    found = visit({**GOOD, "DATABASE_URL": own_postgres.url()}, secrets=(own_postgres.password,))

    assert found.judged("database", "does not answer") == ["fail"], found


@pytest.mark.parametrize(
    ("environ", "text", "remedy"),
    [
        (
            {"DB_TLS_MODE": "verify-full", "DB_TLS_CA_FILE": "other-ca"},
            "cannot be trusted over TLS",
            "DB_TLS_CA_FILE",
        ),
        ({"DB_TLS_MODE": "verify-ca"}, "cannot be trusted over TLS", "DB_TLS_MODE"),
        (
            {"DB_TLS_MODE": "verify-full", "DB_TLS_CA_FILE": "own-ca", "other": "name"},
            "presents a certificate for another host",
            "DB_TLS_MODE",
        ),
        ({"DB_TLS_MODE": "disable"}, "does not admit this user", "DB_TLS_MODE"),
    ],
)
def test_wrong_tls_to_the_database_is_found(
    tls_postgres: PostgresServer,
    certificates: Certificates,
    environ: dict[str, str],
    text: str,
    remedy: str,
) -> None:
    """A wrong CA, none, and plain text where the server requires TLS."""
    files = {"other-ca": str(certificates.other_ca), "own-ca": str(certificates.ca)}
    environ = {name: files.get(value, value) for name, value in environ.items()}
    # The same address in a form that the certificate does not contain.
    host = "127.1" if environ.pop("other", None) else None
    address = tls_postgres.url(host=host)
    found = visit({**GOOD, "DATABASE_URL": address, **environ}, secrets=(tls_postgres.password,))

    assert found.judged("database", text) == ["fail"], found
    assert remedy in found.of("database")[0]["remedy"]


def test_correct_tls_to_the_database_passes(
    tls_postgres: PostgresServer, certificates: Certificates
) -> None:
    """The finding says that TLS is used."""
    environ = {
        **GOOD,
        "DATABASE_URL": tls_postgres.url(),
        "DB_TLS_MODE": "verify-full",
        "DB_TLS_CA_FILE": str(certificates.ca),
    }
    found = visit(environ, secrets=(tls_postgres.password,))

    assert [f["status"] for f in found.findings if "answers over TLSv1" in f["found"]] == ["pass"]


# -- what is planted around the process ------------------------------------------------------


def test_port_in_use_is_found() -> None:
    """Of either server."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = visit({**GOOD, "HOST": "127.0.0.1", "PORT": port})
        second = visit({**GOOD, "HOST": "127.0.0.1", "MANAGEMENT_PORT": port})

    assert found.judged("ports", f"PORT: port {port} on 127.0.0.1 is in use") == ["fail"], found
    assert second.judged("ports", f"MANAGEMENT_PORT: port {port} on 127.0.0.1") == ["fail"], second


def test_address_of_another_machine_is_found() -> None:
    """The server cannot listen there."""
    found = visit({**GOOD, "HOST": "192.0.2.1"})

    assert found.judged("ports", "HOST: 192.0.2.1 is not an address of this machine") == ["fail"]


def test_privileged_port_is_found() -> None:
    """Also if the user of this test may use it."""
    found = visit({**GOOD, "HOST": "127.0.0.1", "PORT": "3"})

    assert [f["status"] for f in found.of("ports")] in (["warn"], ["fail"]), found


@pytest.mark.parametrize("folder", ["/nowhere", "/dev/null", "/proc"])
def test_unwritable_folder_is_found(folder: str) -> None:
    """The application does not start with a missing one either."""
    found = visit({**GOOD, "STATE_DIR": folder})

    assert found.judged("saved state", f"STATE_DIR: {folder}") == ["fail"], found


def test_full_disk_is_found(tmp_path: Path) -> None:
    """Simulated by a file size limit of the shell."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'ulimit -f 0; exec "{sys.executable}" -m viralfx doctor'],
        env={**GOOD, "STATE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert "cannot be written to: File too large" in " ".join(done.stdout.split()), done
    assert list(tmp_path.iterdir()) == []


APPLICATION = """
from litestar import Litestar
from viralfx import Observation, OperationsConfig, OperationsPlugin, Status
class Check:
    async def check(self):
        return Observation(status=Status.{status}, message="the disk\\nis {status}")
app = Litestar(plugins=[OperationsPlugin(OperationsConfig(checks={{"disk": Check()}}))])
"""


@pytest.mark.parametrize(
    ("status", "requires", "expected", "text"),
    [
        ("PASS", "disk", None, ""),
        ("FAIL", "database", "warn", "degraded: disk: the disk is FAIL"),
        ("FAIL", "disk", "fail", "/health/ready 503 (disk: the disk is FAIL)"),
    ],
)
def test_custom_application_is_checked(
    tmp_path: Path, status: str, requires: str, expected: str | None, text: str
) -> None:
    """With its own checks, which settings may name."""
    (tmp_path / "planted.py").write_text(APPLICATION.format(status=status))
    environ = {**GOOD, "PYTHONPATH": str(tmp_path), "READINESS_REQUIRES": requires}
    found = visit(environ, "--app", "planted:app")

    if expected is None:
        assert "/health/" not in str(found.of("health endpoints")), found
    else:
        assert found.judged("health endpoints", text) == [expected], found


@pytest.mark.parametrize(
    ("code", "text"),
    [("1 / 0", "ZeroDivisionError"), ("app = 1", "is not an ASGI application")],
)
def test_broken_application_is_found(tmp_path: Path, code: str, text: str) -> None:
    """It cannot be imported, or is not an application."""
    (tmp_path / "planted.py").write_text(code)
    found = visit({**GOOD, "PYTHONPATH": str(tmp_path)}, "--app", "planted:app")

    assert (found.code, found.judged("health endpoints", text)) == (1, ["fail"]), found


def test_unknown_check_is_found() -> None:
    """As at the start of the service."""
    found = visit({**GOOD, "READINESS_REQUIRES": "databse"})

    assert found.judged("health endpoints", "no check named 'databse'") == ["fail"], found


@pytest.mark.parametrize("details", ["always", "authorized"])
def test_doctor_sends_the_token(details: str) -> None:
    """So it may read the details."""
    found = visit({**GOOD, "HEALTH_DETAILS": details})

    assert found.judged("health endpoints", "") == [], found


# -- how it ends -----------------------------------------------------------------------------

HANGS = """
import socket, sys, time
import viralfx.cli.doctor
viralfx.cli.doctor.LIMIT = 0.5
socket.getaddrinfo = lambda *_, **__: time.sleep(60)
from viralfx.cli import main
sys.exit(main(["doctor"]))
"""


def test_doctor_ends_if_a_name_lookup_hangs() -> None:
    """A lookup cannot be cancelled and is not awaited."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS],
        env={**GOOD, "DATABASE_URL": f"postgresql://u:{TOKEN}@db.invalid/app"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert (done.returncode, done.stderr) == (1, "")
    assert "no result within 0.5 s" in done.stdout
    assert TOKEN not in done.stdout


def test_another_user_migrates(place: Place) -> None:
    """With DATABASE_MIGRATION_URL, the service's user needs no right to create tables."""
    place.execute(f"REVOKE CREATE ON SCHEMA viralfx_ops FROM {USER}")
    place.execute("DELETE FROM viralfx_migrations")
    environ = {**place.good, "DATABASE_MIGRATION_URL": place.database.url}
    behind = [f"the schema is behind: {', '.join(REVISIONS)} pending"]
    assert _about_migrations(environ) == behind

    place.execute("ALTER SCHEMA viralfx_ops OWNER TO viralfx")
    place.execute(f"REVOKE ALL ON SCHEMA viralfx_ops FROM {USER}")
    unusable = "the user may not use the schema viralfx_ops"
    assert _about_migrations(environ) == [unusable, *behind]


def _about_migrations(environ: Mapping[str, str]) -> list[str]:
    return [f["found"] for f in visit(environ).findings if f["area"] == "migrations"]


def test_invalid_settings_are_reported_without_connecting(place: Place) -> None:
    """One finding per problem, and exit code 2."""
    found = visit({**place.good, "DB_POOL_MIN": "20", "DB_POL_MAX": "9"})

    assert (found.code, found.status) == (2, "fail")
    assert found.judged("pool", "DB_POOL_MIN: 20 is more than DB_POOL_MAX=10") == ["fail"]
    assert found.judged("environment", "DB_POL_MAX: unknown variable") == ["fail"]
    assert {f["status"] for f in found.findings if f["area"] == "migrations"} == {"skip"}
