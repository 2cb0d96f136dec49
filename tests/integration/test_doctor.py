"""``viralfx doctor`` with real servers: misconfigurations are planted, and each is found."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests import forked
from tests.integration.doctor import GOOD, TOKEN, USER_PASSWORD, program, visit
from tests.servers.certificates import Certificates
from tests.servers.ports import free_port
from tests.servers.postgres import Database, PostgresServer
from tests.servers.redis import redis_server
from tests.servers.waiting import wait_until

USER = "planted_user"


@dataclass(frozen=True)
class Place:
    """A migrated database, and a user for the service who may do what it needs."""

    database: Database

    @property
    def server(self) -> PostgresServer:
        """Where it is."""
        return self.database.server

    def url(self, *, user: str = USER, password: str = USER_PASSWORD, schema: str = "") -> str:
        """Return its address."""
        address = self.server.url(self.database.name, user=user, password=password)
        return f"{address}?schema={schema}" if schema else address

    def execute(self, sql: str) -> None:
        """Run one statement as the superuser."""
        self.database.execute(sql)

    @property
    def good(self) -> dict[str, str]:
        """A right configuration."""
        return {**GOOD, "DATABASE_URL": self.url()}


def settle(database: Database) -> Place:
    """Migrate a database, as a user of its own."""
    place = Place(database)
    database.execute(f"CREATE ROLE {USER} LOGIN PASSWORD '{USER_PASSWORD}'")
    database.execute(f"GRANT CREATE ON SCHEMA public TO {USER}")
    done = forked.viralfx("migrate", environ={"DATABASE_URL": place.url()})
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def place(database: Database) -> Iterator[Place]:
    """Return a database that is ready for the service."""
    yield settle(database)
    database.execute(f"DROP OWNED BY {USER}")
    database.execute(f"DROP ROLE {USER}")


# -- what is right ---------------------------------------------------------------------------


def test_a_right_configuration_passes(place: Place) -> None:
    """Exit code 0 and no warning, with a database and a Redis; and nothing was changed there."""
    tables = "SELECT relname FROM pg_class WHERE relname LIKE 'viralfx%' ORDER BY 1"
    before = place.database.execute(tables), place.database.execute("TABLE viralfx_state")
    with redis_server(password="h:u@sh", arguments=["--appendonly", "yes"]) as redis:
        own = {"REDIS_HOST": redis.host, "REDIS_PORT": str(redis.port), "REDIS_PASSWORD": "h:u@sh"}
        environ = {**place.good, **own}
        del environ["ALLOW_MEMORY_ADAPTERS"]
        found = visit(environ, secrets=("h:u@sh",))
        done = program(environ)
        keys = redis.command("DBSIZE")

    assert (found.code, found.status) == (0, "pass"), found
    passed = [f["area"] for f in found.findings if f["status"] == "pass"]
    assert passed == [
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
    assert done.stdout.splitlines()[-1] == "0 failed, 0 warned of, 12 passed, 3 skipped"
    assert not [
        s for s in (TOKEN, USER_PASSWORD, "h:u@sh", place.server.password) if s in done.stdout
    ]
    after = place.database.execute(tables), place.database.execute("TABLE viralfx_state")
    assert (after, keys) == (before, 0)


def test_nothing_is_left_on_the_server(place: Place) -> None:
    """Its connections are closed in order."""
    visit(place.good)
    left = f"SELECT 1 FROM pg_stat_activity WHERE usename = '{USER}'"  # noqa: S608 - a constant

    wait_until(lambda: not place.database.execute(left), what="connections are closed")
    assert "unexpected EOF" not in place.server.log()


# -- what is planted in the database ---------------------------------------------------------

Plant = Callable[[Place], dict[str, str]]


def changed(*statements: str, **environ: str) -> Plant:
    """Plant by statements of the superuser, and variables."""

    def plant(place: Place) -> dict[str, str]:
        for sql in statements:
            place.execute(sql)
        return environ

    return plant


def url(**parts: str) -> Plant:
    """Plant a part of the address."""
    return lambda place: {"DATABASE_URL": place.url(**parts)}


def garbage(place: Place) -> dict[str, str]:
    """Plant a file of certificates that is none."""
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
        "db.invalid:5432/app has a host name that is not known",
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
        "speaks no TLS",
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
    "no right to migrate": (
        changed("DROP TABLE viralfx_migrations", f"REVOKE CREATE ON SCHEMA public FROM {USER}"),
        "migrations",
        "fail",
        "cannot create tables as this user in the schema public",
    ),
    "no right to read the versions": (
        changed(
            "ALTER TABLE viralfx_migrations OWNER TO viralfx",
            f"REVOKE ALL ON viralfx_migrations FROM {USER}",
        ),
        "migrations",
        "fail",
        "may not read the table viralfx_migrations",
    ),
    "no right to save state": (
        changed(
            "ALTER TABLE viralfx_state OWNER TO viralfx",
            f"GRANT SELECT ON viralfx_state TO {USER}",
        ),
        "database",
        "fail",
        "may not DELETE, INSERT, UPDATE on the table viralfx_state",
    ),
    "no such schema": (url(schema="elsewhere"), "database", "fail", "no schema of the search path"),
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
def test_what_is_wrong_with_the_database_is_found(
    place: Place, planted: tuple[Plant, str, str, str]
) -> None:
    """Each is found once, where it is, and what fails decides the exit code."""
    plant, area, status, text = planted
    environ = {**place.good, **plant(place)}
    if environ.get("DB_STATEMENT_TIMEOUT") == "1" and sys.platform != "linux":
        pytest.skip("a millisecond is long there")
    found = visit(environ, secrets=("wr0ng", place.server.password))

    assert found.judged(area, text) == [status], found
    assert (found.code, found.status) == ((1, "fail") if status == "fail" else (0, "warn")), found


def test_a_database_of_another_encoding_is_found(postgres: PostgresServer) -> None:
    """Texts that it cannot hold would be refused one day."""
    postgres.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    found = visit({**GOOD, "DATABASE_URL": postgres.url("ascii")})
    postgres.drop_database("ascii")

    assert found.judged("database", "encoded in SQL_ASCII") == ["warn"], found


def test_a_replica_is_found(own_postgres: PostgresServer) -> None:
    """A server that only recovers accepts no writes."""
    [(data,)] = own_postgres.execute("show data_directory")
    own_postgres.execute(f"copy (select 1) to '{data}/standby.signal'")
    own_postgres.restart()
    found = visit({**GOOD, "DATABASE_URL": own_postgres.url()}, secrets=(own_postgres.password,))

    assert found.judged("database", "is a replica that accepts no writes") == ["fail"], found


def test_a_frozen_server_is_found(own_postgres: PostgresServer) -> None:
    """It does not wait as long as the service may, and says so."""
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
            "shows a certificate for another host",
            "DB_TLS_MODE",
        ),
        ({"DB_TLS_MODE": "disable"}, "does not let this user in", "DB_TLS_MODE"),
    ],
)
def test_wrong_tls_to_the_database_is_found(
    tls_postgres: PostgresServer,
    certificates: Certificates,
    environ: dict[str, str],
    text: str,
    remedy: str,
) -> None:
    """An authority that did not sign, none at all, and plain text where TLS is a must."""
    files = {"other-ca": str(certificates.other_ca), "own-ca": str(certificates.ca)}
    environ = {name: files.get(value, value) for name, value in environ.items()}
    # Another way to write the same address, which the certificate does not hold.
    host = "127.1" if environ.pop("other", None) else None
    address = tls_postgres.url(host=host)
    found = visit({**GOOD, "DATABASE_URL": address, **environ}, secrets=(tls_postgres.password,))

    assert found.judged("database", text) == ["fail"], found
    assert remedy in found.of("database")[0]["remedy"]


def test_right_tls_to_the_database_passes(
    tls_postgres: PostgresServer, certificates: Certificates
) -> None:
    """It says that TLS is spoken."""
    environ = {
        **GOOD,
        "DATABASE_URL": tls_postgres.url(),
        "DB_TLS_MODE": "verify-full",
        "DB_TLS_CA_FILE": str(certificates.ca),
    }
    found = visit(environ, secrets=(tls_postgres.password,))

    assert [f["status"] for f in found.findings if "answers over TLSv1" in f["found"]] == ["pass"]


# -- what is planted around the process ------------------------------------------------------


def test_a_port_in_use_is_found() -> None:
    """Whichever variable names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = visit({**GOOD, "HOST": "127.0.0.1", "PORT": port})
        second = visit({**GOOD, "HOST": "127.0.0.1", "MANAGEMENT_PORT": port})

    assert found.judged("ports", f"PORT: port {port} on 127.0.0.1 is in use") == ["fail"], found
    assert second.judged("ports", f"MANAGEMENT_PORT: port {port} on 127.0.0.1") == ["fail"], second


def test_an_address_of_another_machine_is_found() -> None:
    """One cannot listen there."""
    found = visit({**GOOD, "HOST": "192.0.2.1"})

    assert found.judged("ports", "HOST: 192.0.2.1 is no address of this machine") == ["fail"]


def test_a_privileged_port_is_found() -> None:
    """Whether or not the user of this test may listen on it."""
    found = visit({**GOOD, "HOST": "127.0.0.1", "PORT": "3"})

    assert [f["status"] for f in found.of("ports")] in (["warn"], ["fail"]), found


@pytest.mark.parametrize("folder", ["/nowhere", "/dev/null", "/proc"])
def test_a_folder_that_cannot_be_written_to_is_found(folder: str) -> None:
    """Nor does the application start with one that is none."""
    found = visit({**GOOD, "STATE_DIR": folder})

    assert found.judged("saved state", f"STATE_DIR: {folder}") == ["fail"], found


def test_a_full_disk_is_found(tmp_path: Path) -> None:
    """Here a limit of the shell's plays one: no file may be longer than nothing."""
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
def test_an_application_of_ones_own_is_tried(
    tmp_path: Path, status: str, requires: str, expected: str | None, text: str
) -> None:
    """With its own checks, which the settings may name."""
    (tmp_path / "planted.py").write_text(APPLICATION.format(status=status))
    environ = {**GOOD, "PYTHONPATH": str(tmp_path), "READINESS_REQUIRES": requires}
    found = visit(environ, "--app", "planted:app")

    if expected is None:
        assert "/health/" not in str(found.of("health endpoints")), found
    else:
        assert found.judged("health endpoints", text) == [expected], found


@pytest.mark.parametrize(
    ("code", "text"),
    [("1 / 0", "ZeroDivisionError"), ("app = 1", "is not a Litestar application")],
)
def test_a_broken_application_is_found(tmp_path: Path, code: str, text: str) -> None:
    """One that cannot be imported, and one that is none."""
    (tmp_path / "planted.py").write_text(code)
    found = visit({**GOOD, "PYTHONPATH": str(tmp_path)}, "--app", "planted:app")

    assert (found.code, found.judged("health endpoints", text)) == (1, ["fail"]), found


def test_a_check_that_is_not_there_is_found() -> None:
    """As the service finds it when it starts."""
    found = visit({**GOOD, "READINESS_REQUIRES": "databse"})

    assert found.judged("health endpoints", "no check named 'databse'") == ["fail"], found


@pytest.mark.parametrize("details", ["always", "authorized"])
def test_details_are_asked_with_the_token(details: str) -> None:
    """Who may not read them learns nothing; the doctor may."""
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


def test_it_ends_whatever_hangs() -> None:
    """A look-up of a name cannot be cancelled, and is not waited for."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS],
        env={**GOOD, "DATABASE_URL": f"postgresql://u:{TOKEN}@db.invalid/app"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert (done.returncode, done.stderr) == (1, "")
    assert "nothing was found out within 0.5 s" in done.stdout
    assert TOKEN not in done.stdout


def test_wrong_settings_are_told_without_servers(place: Place) -> None:
    """One finding for each problem, exit code 2; the database is not asked."""
    found = visit({**place.good, "DB_POOL_MIN": "20", "DB_POL_MAX": "9"})

    assert (found.code, found.status) == (2, "fail")
    assert found.judged("pool", "DB_POOL_MIN: 20 is more than DB_POOL_MAX=10") == ["fail"]
    assert found.judged("environment", "DB_POL_MAX: unknown variable") == ["fail"]
    assert {f["status"] for f in found.findings if f["area"] == "migrations"} == {"skip"}
