"""``viralfx migrate`` as a program on a real server: what it does, says, and exits with."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import asyncpg
import pytest
from tests import forked
from tests.servers.certificates import Certificates
from tests.servers.fault_proxy import BLACKHOLE, REFUSE, RESET
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import wait_until

from viralfx.adapters.postgres.migrate import LOCK, scripts
from viralfx.adapters.postgres.schema import LOCK_PATIENCE, REVISIONS
from viralfx.bootstrap.migration import migrate_schema
from viralfx.domain.errors import StartupError
from viralfx.settings import read_settings

DONE, PENDING, WRONG, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes."""

SECRET = "hunt:e@r/2"
TABLES = "select relname from pg_class where relname like 'viralfx%' and relkind = 'r' order by 1"
AT = "select version_num from viralfx_migrations"
APPLIED = [f"applied {n}: {scripts().get_revision(n).doc}" for n in REVISIONS]


def place(database: Database) -> str:
    """Return where a database is, as it is told."""
    return f"{database.server.host}:{database.server.port}/{database.name}"


def quick(url: str, **more: str) -> dict[str, str]:
    """Return the variables for a database that is tried once only."""
    return {
        "DATABASE_URL": url,
        "DB_MAX_RECONNECT_ATTEMPTS": "1",
        "DB_CONNECTION_TIMEOUT": "10000",
        **more,
    }


def migrate(environ: Mapping[str, str], *arguments: str) -> tuple[int, list[str], list[str]]:
    """Run it; return the exit code and the lines of both outputs."""
    done = forked.viralfx("migrate", *arguments, environ=environ)
    for secret in (SECRET, "hunt%3Ae%40r%2F2"):
        assert secret not in done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def refused(environ: Mapping[str, str], *arguments: str) -> str:
    """Run what has to fail because of the server; return the one line that says why."""
    code, out, told = migrate(environ, *arguments)
    assert (code, out) == (UNREACHABLE, [])
    [line] = told
    return line.removeprefix("viralfx: DATABASE_URL: the database at ")


# -- what it does ----------------------------------------------------------------------------


def test_it_applies_what_is_pending_once(database: Database) -> None:
    """Each with its meaning; a second run has nothing to do and changes nothing."""
    environ, address = quick(database.url), place(database)

    assert migrate(environ) == (DONE, [*APPLIED, f"{address} is current at {REVISIONS[-1]}"], [])
    assert [name for (name,) in database.execute(TABLES)] == [
        "viralfx_job_counters",
        "viralfx_jobs",
        "viralfx_migrations",
        "viralfx_state",
        "viralfx_workers",
    ]
    assert database.execute(AT) == [(REVISIONS[-1],)]
    database.execute("insert into viralfx_state values ('a', now(), '{}')")
    assert migrate(environ) == (DONE, [f"{address} is current at {REVISIONS[-1]}"], [])
    assert database.execute("select instance from viralfx_state") == [("a",)]


def test_check_says_what_is_pending_and_changes_nothing(database: Database) -> None:
    """1 while something is, 0 once nothing is."""
    environ, address = quick(database.url), place(database)
    behind = f"{address} is behind: {', '.join(REVISIONS)} pending; run `viralfx migrate`"

    assert migrate(environ, "--check") == (PENDING, [], [behind])
    assert database.execute(TABLES) == []
    migrate(environ)
    assert migrate(environ, "--check") == (DONE, [f"{address} is current at {REVISIONS[-1]}"], [])


def test_a_schema_of_a_later_version_is_left_alone(database: Database) -> None:
    """It is usable, so both ways of asking are content."""
    environ = quick(database.url)
    migrate(environ)
    database.execute("update viralfx_migrations set version_num = '9999'")
    line = f"{place(database)} is at 9999, which a later version made; it is usable"

    assert migrate(environ, "--check") == (DONE, [line], [])
    assert migrate(environ) == (DONE, [line], [])
    assert database.execute(AT) == [("9999",)]


def test_a_schema_of_its_own(database: Database) -> None:
    """Tables and bookkeeping go where the address says, and nothing to where others are."""
    database.execute('create schema "Mine"')
    environ = quick(f"{database.url}?schema=Mine")

    assert migrate(environ)[0] == DONE
    where = "select distinct relnamespace::regnamespace::text from pg_class"
    assert database.execute(f"{where} where relname like 'viralfx%'") == [('"Mine"',)]
    assert migrate(environ, "--check")[0] == DONE
    assert migrate(quick(database.url), "--check")[0] == PENDING


@pytest.mark.parametrize("count", [2, 4])
def test_several_at_once(database: Database, count: int) -> None:
    """One does the work, all succeed, and it is done once."""
    with ExitStack() as stack:
        # All of them have looked and found it behind before any of them may begin.
        with locked(database):
            runs = [stack.enter_context(started(quick(database.url))) for _ in range(count)]
            wait_until(
                lambda: len(waiting(database.server)) == count,
                seconds=60.0,
                what="all wait for the lock",
            )
        outputs = [(run.communicate(timeout=30), run.returncode) for run in runs]

    current = f"{place(database)} is current at {REVISIONS[-1]}\n"
    told = "".join(f"{line}\n" for line in APPLIED)
    assert {code for _, code in outputs} == {DONE}
    assert sorted(out for (out, _), _ in outputs) == sorted(
        [told + current, *[current] * (count - 1)]
    )
    assert {err for (_, err), _ in outputs} == {""}


def test_it_does_not_wait_for_another_run_for_ever(database: Database) -> None:
    """It says what it waited for; how long that is, --help has as well."""
    settings = read_settings(quick(database.url))
    with locked(database):
        began = time.monotonic()
        with pytest.raises(StartupError) as raised:
            asyncio.run(migrate_schema(settings, patience=0.5))
        took = time.monotonic() - began
    said = str(raised.value)

    assert 0.5 <= took < 5.0
    assert said == (
        f"DATABASE_URL: the database at {place(database)} is being migrated by another run, which"
        " took longer than 0.5 s, so nothing was migrated; run it again when that one has ended"
    )
    assert LOCK_PATIENCE == 60.0
    assert "60 s" in " ".join(migrate({}, "--help")[1])
    assert migrate(quick(database.url))[0] == 0


def test_a_failure_in_the_middle_leaves_nothing(database: Database) -> None:
    """What it had made before that is gone, and it works once the reason is mended."""
    # A type of that name has a hint in the server's error, which is a line of its own.
    database.execute("create domain viralfx_state as int")
    assert refused(quick(database.url)) == (
        f"{place(database)} failed, so nothing was migrated"
        ' (type "viralfx_state" already exists); mend that, and run it again'
    )
    assert database.execute(TABLES) == []
    database.execute("drop domain viralfx_state")
    assert migrate(quick(database.url))[0] == DONE


# -- what the server refuses -----------------------------------------------------------------


def test_wrong_credentials(database: Database) -> None:
    """One line with the remedy, of either mode, however the password is given."""
    text = " refuses the user or password, after 1 attempt; check the user and password"
    server, name = database.server, database.name
    for environ in (
        quick(server.url(name, password=SECRET)),
        quick(server.url(name, user="nobody", password=SECRET)),
        quick(f"postgresql://{server.user}@{server.host}:{server.port}/{name}", DB_PASSWORD=SECRET),
    ):
        assert refused(environ) == refused(environ, "--check") == place(database) + text


def test_an_unknown_database(database: Database) -> None:
    """It is not created: whoever runs this may not be allowed to, and a typing error is likely."""
    server = database.server
    assert refused(quick(server.url("nowhere"))) == (
        f"{server.host}:{server.port}/nowhere has no database of that name, after 1 attempt;"
        " check the name, or create it"
    )


def test_an_unknown_schema(database: Database) -> None:
    """Likewise."""
    assert refused(quick(f"{database.url}?schema=nowhere")) == (
        f"{place(database)} has no schema of that name, so nothing was migrated;"
        " check the name, or create it"
    )


@pytest.fixture
def poor(database: Database) -> Iterator[str]:
    """Return the address for a user who may connect, and nothing else."""
    role = f"{database.name}_poor"
    database.execute(f"create role {role} login password '{SECRET}'")
    yield database.server.url(database.name, user=role, password=SECRET)
    database.execute(f"drop owned by {role}")
    database.execute(f"drop role {role}")


def test_no_permission_to_create(database: Database, poor: str) -> None:
    """With the server's words for what it denies; once granted, it goes on."""
    assert refused(quick(poor)) == (
        f"{place(database)} denies this user a permission, so nothing was migrated"
        " (permission denied for schema public); grant it"
    )
    database.execute(f"grant create on schema public to {database.name}_poor")
    assert migrate(quick(poor))[0] == DONE


def test_no_permission_to_look(database: Database, poor: str) -> None:
    """A schema that another user migrated, and lets nobody see."""
    migrate(quick(database.url))
    for arguments in ((), ("--check",)):
        assert refused(quick(poor), *arguments) == (
            f"{place(database)} denies this user a permission when asked for its migrations"
            " (permission denied for table viralfx_migrations); grant it"
        )


def test_a_database_that_takes_no_writes(database: Database) -> None:
    """A replica's address is a frequent mistake."""
    database.execute(f"alter database {database.name} set default_transaction_read_only = on")
    assert refused(quick(database.url)) == (
        f"{place(database)} accepts no writes, so nothing was migrated; name the primary"
    )


def test_a_server_that_cannot_be_reached(database: Database, fault_proxy: FaultProxies) -> None:
    """Refused, silent, unknown or without TLS: each in one line, after all of the attempts."""
    proxy = fault_proxy(database.server.port)
    url = database.server.url(database.name, host=proxy.host, port=proxy.port)
    patient = {"DB_MAX_RECONNECT_ATTEMPTS": "3", "DB_RECONNECT_DELAY": "10"}
    proxy.mode = REFUSE
    assert refused(quick(url, **patient)).endswith(
        " refuses connections, after 3 attempts; check host and port, and that it runs"
    )
    proxy.mode = BLACKHOLE
    assert refused(quick(url, DB_CONNECTION_TIMEOUT="100")).endswith(
        " does not answer, after 1 attempt; look at the server, and at what is in between"
    )
    assert refused(quick(database.server.url(host="nowhere.invalid"))).endswith(
        " has a host name that is not known, after 1 attempt; check the host"
    )
    assert refused(quick(database.url, DB_TLS_MODE="require")).endswith(
        " speaks no TLS, after 1 attempt; turn it on there, or see DB_TLS_MODE"
    )


def test_tls(tls_postgres: PostgresServer, certificates: Certificates) -> None:
    """It migrates over TLS, and not past a certificate that it cannot trust."""
    verified = {"DB_TLS_MODE": "verify-full", "DB_TLS_CA_FILE": str(certificates.ca)}
    other = {**verified, "DB_TLS_CA_FILE": str(certificates.other_ca)}

    assert refused(quick(tls_postgres.url(), **other)).endswith(
        " cannot be trusted over TLS, after 1 attempt; check DB_TLS_MODE and DB_TLS_CA_FILE"
    )
    assert migrate(quick(tls_postgres.url(), **verified))[0] == DONE


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_what_is_wrong_in_the_settings_is_told_before_anything_connects(
    database: Database, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Exit code 2, one line for each problem, and no secret."""
    empty = tmp_path / "empty.pem"
    empty.touch()
    right = quick(database.url)
    for environ, variable in (
        ({}, "DATABASE_URL: not set"),
        ({"DATABASE_URL": f"postgres//u:{SECRET}@h/d"}, "DATABASE_URL: "),
        ({"DATABASE_URL": f"mysql://u:{SECRET}@h/d"}, "DATABASE_URL: "),
        ({**right, "DB_POOL_MIN": "11"}, "DB_POOL_MIN: "),
        ({**right, "DB_PASWORD": SECRET}, "DB_PASWORD: unknown variable"),
        (
            {**right, "DB_TLS_MODE": "verify-full", "DB_TLS_CA_FILE": str(empty)},
            "DB_TLS_CA_FILE: ",
        ),
    ):
        code, out, told = migrate(environ, *arguments)
        assert (code, out, len(told)) == (WRONG, [], 1)
        assert told[0].startswith(f"viralfx: {variable}")
    assert database.execute(TABLES) == []


# -- how it is interrupted -------------------------------------------------------------------


@contextmanager
def started(environ: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """Start it, and leave nothing of it."""
    with subprocess.Popen(
        [sys.executable, "-m", "viralfx", "migrate"],
        env={"PATH": os.environ["PATH"], **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has all of them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one call
    ) as run:
        try:
            yield run
        finally:
            run.kill()


@contextmanager
def locked(database: Database) -> Iterator[None]:
    """Hold what a migration has to wait for, as another run in the middle of its work would."""
    with asyncio.Runner() as runner:
        holder = runner.run(asyncpg.connect(database.url, ssl=False))
        try:
            runner.run(holder.execute(f"select pg_advisory_lock({LOCK})"))
            yield
        finally:
            runner.run(holder.close())


def waiting(server: PostgresServer) -> list[int]:
    """Return the server's processes that wait for the lock of migrations."""
    rows = server.execute("select pid from pg_locks where locktype = 'advisory' and not granted")
    return [pid for (pid,) in rows]


def interrupted(run: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Press Ctrl-C once; return how it ended."""
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=5)
    return run.returncode, out, err


SAID = (INTERRUPTED, "", "viralfx: interrupted\n")


def test_ctrl_c_while_it_connects(database: Database, fault_proxy: FaultProxies) -> None:
    """In an attempt that hangs, and in the pause between two."""
    proxy = fault_proxy(database.server.port)
    url = database.server.url(database.name, host=proxy.host, port=proxy.port)
    proxy.mode = BLACKHOLE
    with started(quick(url, DB_CONNECTION_TIMEOUT="60000")) as run:
        wait_until(lambda: proxy.open, what="it connects")
        assert interrupted(run) == SAID
    proxy.mode = RESET
    patient = {"DB_MAX_RECONNECT_ATTEMPTS": "2", "DB_RECONNECT_DELAY": "60000"}
    before = proxy.accepted
    with started(quick(url, **patient)) as run:
        wait_until(lambda: proxy.accepted > before, what="the first attempt failed")
        assert interrupted(run) == SAID


@pytest.mark.parametrize("frozen", [False, True], ids=["in order", "frozen"])
def test_ctrl_c_while_it_migrates(own_postgres: PostgresServer, *, frozen: bool) -> None:
    """It ends at once, whether the server answers or not, and nothing was changed."""
    database = Database(own_postgres, own_postgres.create_database())
    with locked(database), started(quick(database.url)) as run:
        wait_until(lambda: waiting(own_postgres), what="it waits for the lock")
        if frozen:
            own_postgres.freeze()
        try:
            assert interrupted(run) == SAID
        finally:
            own_postgres.thaw()
    assert database.execute(TABLES) == []
    # What waited for the lock goes on until it has it, and then finds nobody to work for.
    wait_until(lambda: not waiting(own_postgres), what="the server noticed")
    assert migrate(quick(database.url))[0] == DONE
