"""``viralfx migrate`` as a program on a real server: effects, output and exit codes."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import asyncpg
import pytest
from tests import forked
from tests.forked import ForkedProcess
from tests.integration.postgres_clients import config_of, sessions
from tests.servers.certificates import Certificates
from tests.servers.fault_proxy import BLACKHOLE, REFUSE, RESET
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database, PostgresServer
from tests.servers.waiting import wait_until

from viralfx.bootstrap.postgres import migrate_schema
from viralfx.core.errors import StartupError
from viralfx.postgres.migrate import LOCK, apply_migrations, description_of
from viralfx.postgres.migrations import LOCK_TIMEOUT_SECONDS, REVISIONS
from viralfx.settings import read_settings

DONE, PENDING, WRONG, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes."""

SECRET = "hunt:e@r/2"
TABLES = "select relname from pg_class where relname like 'viralfx%' and relkind = 'r' order by 1"
AT = "select version_num from viralfx_migrations"
TAKEN = """enqueue(
    text, jsonb, text, timestamptz, integer, text, text, text, text, text, text, boolean, integer
)"""
"""The function that the last statement of migration 0006 makes."""
ADDED = "select from pg_attribute where attname = 'max_attempts'"
"""The columns that its first statements make."""
WAITING = """
select xact_start from pg_stat_activity join pg_locks using (pid)
where not granted and relation = 'viralfx_ops.viralfx_jobs'::regclass
    and mode = 'AccessExclusiveLock'
"""
APPLIED = [f"applied {n}: {description_of(n)}" for n in REVISIONS]


def place(database: Database) -> str:
    """Return the database's address as in messages."""
    return f"{database.server.host}:{database.server.port}/{database.name}"


def quick(url: str, **more: str) -> dict[str, str]:
    """Return the variables for a database with a single connection attempt."""
    return {
        "DATABASE_URL": url,
        "DB_MAX_RECONNECT_ATTEMPTS": "1",
        "DB_CONNECTION_TIMEOUT": "10000",
        **more,
    }


def migrate(environ: Mapping[str, str], *arguments: str) -> tuple[int, list[str], list[str]]:
    """Run it; return exit code and output lines."""
    done = forked.viralfx("migrate", *arguments, environ=environ)
    for secret in (SECRET, "hunt%3Ae%40r%2F2"):
        assert secret not in done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def refused(environ: Mapping[str, str], *arguments: str) -> str:
    """Run a case that the server makes fail; return the error line."""
    code, out, errors = migrate(environ, *arguments)
    assert (code, out) == (UNREACHABLE, [])
    [line] = errors
    return line.removeprefix("viralfx: DATABASE_URL: the database at ")


# -- what it does ----------------------------------------------------------------------------


@pytest.mark.each_python
def test_pending_migrations_are_applied_once(database: Database) -> None:
    """Each is printed with its description; a second run changes nothing."""
    environ, address = quick(database.url), place(database)

    assert migrate(environ) == (DONE, [*APPLIED, f"{address} is current at {REVISIONS[-1]}"], [])
    assert [name for (name,) in database.execute(TABLES)] == [
        "viralfx_audit_events",
        "viralfx_finished_jobs",
        "viralfx_instances",
        "viralfx_job_counters",
        "viralfx_jobs",
        "viralfx_migrations",
        "viralfx_paused_queues",
        "viralfx_schedules",
        "viralfx_state",
        "viralfx_task_limits",
        "viralfx_transitions",
        "viralfx_unknown_tasks",
        "viralfx_workers",
    ]
    assert database.execute(AT) == [(REVISIONS[-1],)]
    database.execute("insert into viralfx_state values ('a', now(), '{}')")
    assert migrate(environ) == (DONE, [f"{address} is current at {REVISIONS[-1]}"], [])
    assert database.execute("select instance from viralfx_state") == [("a",)]


def test_check_lists_pending_migrations_and_changes_nothing(database: Database) -> None:
    """Exit code 1 if there are any, else 0."""
    environ, address = quick(database.url), place(database)
    behind = f"{address} is behind: {', '.join(REVISIONS)} pending; run `viralfx migrate`"

    assert migrate(environ, "--check") == (PENDING, [], [behind])
    assert database.execute(TABLES) == []
    migrate(environ)
    assert migrate(environ, "--check") == (DONE, [f"{address} is current at {REVISIONS[-1]}"], [])


def test_later_schema_is_not_changed(database: Database) -> None:
    """It is usable, so both modes succeed."""
    environ = quick(database.url)
    migrate(environ)
    database.execute("update viralfx_migrations set version_num = '9999'")
    line = f"{place(database)} is at 9999, which a later version created; it is usable"

    assert migrate(environ, "--check") == (DONE, [line], [])
    assert migrate(environ) == (DONE, [line], [])
    assert database.execute(AT) == [("9999",)]


def test_custom_schema(database: Database) -> None:
    """All tables are in the schema of DB_SCHEMA; Prisma's parameter for its own has no effect."""
    environ = {**quick(f"{database.url}?schema=public"), "DB_SCHEMA": "mine"}

    assert migrate(environ)[0] == DONE
    where = "select distinct relnamespace::regnamespace::text from pg_class"
    assert database.execute(f"{where} where relname like 'viralfx%'") == [("mine",)]
    assert migrate(environ, "--check")[0] == DONE
    assert migrate(quick(database.url), "--check")[0] == PENDING


@pytest.mark.parametrize(("count", "isolation"), [(2, "read committed"), (4, "serializable")])
def test_concurrent_runs_migrate_once(database: Database, count: int, isolation: str) -> None:
    """Each migration is applied by one of them, and all succeed, at any isolation level."""
    setting = "default_transaction_isolation"
    database.execute(f"alter database {database.name} set {setting} = '{isolation}'")
    with ExitStack() as stack:
        # All runs have found pending migrations before one may begin.
        with locked(database):
            runs = [stack.enter_context(started(quick(database.url))) for _ in range(count)]
            wait_until(
                lambda: len(waiting(database.server)) == count,
                seconds=60.0,
                what="all wait for the lock",
            )
        outputs = [(run.communicate(timeout=30), run.returncode) for run in runs]

    current = f"{place(database)} is current at {REVISIONS[-1]}\n"
    assert {code for _, code in outputs} == {DONE}
    assert {out.splitlines(keepends=True)[-1] for (out, _), _ in outputs} == {current}
    assert sorted("".join(out.replace(current, "") for (out, _), _ in outputs).splitlines()) == (
        APPLIED
    )
    assert {err for (_, err), _ in outputs} == {""}


def test_wait_for_another_run_is_limited(database: Database) -> None:
    """The error says so; --help has the limit."""
    settings = read_settings(quick(database.url))
    with locked(database):
        began = time.monotonic()
        with pytest.raises(StartupError) as raised:
            asyncio.run(migrate_schema(settings, lock_timeout=0.5))
        took = time.monotonic() - began
    message = str(raised.value)

    assert 0.5 <= took < 30.0
    assert message == (
        f"DATABASE_URL: the database at {place(database)} is being migrated by another run, which"
        " took longer than 0.5 s, so nothing was migrated; run it again when the other run has"
        " ended"
    )
    assert LOCK_TIMEOUT_SECONDS == 60.0
    assert "60 s" in " ".join(migrate({}, "--help")[1])
    assert migrate(quick(database.url))[0] == 0


def test_failed_migration_is_rolled_back(database: Database) -> None:
    """It succeeds once the cause is fixed."""
    # The server's error for an existing type has a hint on a separate line.
    database.execute("create schema viralfx_ops")
    database.execute("create domain viralfx_ops.viralfx_state as int")
    assert refused(quick(database.url)) == (
        f"{place(database)} failed, so nothing was migrated"
        ' (type "viralfx_state" already exists); fix the cause, and run it again'
    )
    assert database.execute(TABLES) == []
    database.execute("drop domain viralfx_ops.viralfx_state")
    assert migrate(quick(database.url))[0] == DONE


def test_migrations_before_a_failed_one_stay(database: Database) -> None:
    """Each is a transaction, so that the next one does not keep tables locked."""
    database.execute("create schema viralfx_ops")
    database.execute(f"create function viralfx_ops.{TAKEN} returns int return 1")
    failing = REVISIONS.index("0006")
    before = ", ".join(REVISIONS[:failing])
    assert refused(quick(database.url)) == (
        f"{place(database)} failed, so only {before} was applied"
        ' (function "enqueue" already exists with same argument types); fix the cause, and run it'
        " again"
    )
    assert database.execute(AT) == [(REVISIONS[failing - 1],)]
    assert database.execute(ADDED) == []
    database.execute(f"drop function viralfx_ops.{TAKEN}")
    assert migrate(quick(database.url)) == (
        DONE,
        [*APPLIED[failing:], f"{place(database)} is current at {REVISIONS[-1]}"],
        [],
    )


async def test_a_table_in_use_is_waited_for_in_short_tries(database: Database) -> None:
    """Others use it meanwhile, although an open transaction keeps the migration waiting."""
    config = config_of(database)
    await apply_migrations(config, target="0002")
    holder = await asyncpg.connect(database.url, ssl=False)
    other = await asyncpg.connect(database.url, ssl=False)
    tries = set[datetime]()
    async with asyncio.timeout(60):
        async with holder.transaction():
            await holder.execute("select from viralfx_ops.viralfx_jobs")
            migrating = asyncio.create_task(apply_migrations(config))
            while len(tries) < 2:
                tries.update(row["xact_start"] for row in await other.fetch(WAITING))
                await asyncio.sleep(0.01)
            await other.execute("select from viralfx_ops.viralfx_jobs")
            assert not migrating.done()
        applied = await migrating
    for connection in (holder, other):
        await connection.close()

    assert [revision for revision, _ in applied] == list(REVISIONS[2:])


async def test_a_table_that_stays_in_use_ends_the_run(database: Database) -> None:
    """The error says so; the earlier migrations stay."""
    await apply_migrations(config_of(database), target="0002")
    async with asyncio.timeout(60):
        holder = await asyncpg.connect(database.url, ssl=False)
        async with holder.transaction():
            await holder.execute("select from viralfx_ops.viralfx_jobs")
            with pytest.raises(StartupError, match="lock held too long, so nothing was migrated"):
                await migrate_schema(read_settings(quick(database.url)), lock_timeout=0.5)
        await holder.close()
    assert database.execute(AT) == [("0002",)]


def test_a_later_version_that_migrates_meanwhile_is_accepted(database: Database) -> None:
    """A run that waits for it finds a revision that it does not know, and changes nothing."""
    asyncio.run(apply_migrations(config_of(database), target=REVISIONS[-2]))
    with ExitStack() as stack:
        with locked(database):
            run = stack.enter_context(started(quick(database.url)))
            wait_until(lambda: waiting(database.server), seconds=60.0, what="it waits for the lock")
            database.execute("update viralfx_migrations set version_num = '9999'")
        out, err = run.communicate(timeout=30)

    line = f"{place(database)} is at 9999, which a later version created; it is usable"
    assert (run.returncode, out.splitlines(), err) == (DONE, [line], "")
    assert database.execute(AT) == [("9999",)]


# -- what the server refuses -----------------------------------------------------------------


def test_wrong_credentials(database: Database) -> None:
    """One line with the remedy, in both modes."""
    text = " refuses the user or password, after 1 attempt; check the user and password"
    server, name = database.server, database.name
    for environ in (
        quick(server.url(name, password=SECRET)),
        quick(server.url(name, user="nobody", password=SECRET)),
        quick(f"postgresql://{server.user}@{server.host}:{server.port}/{name}", DB_PASSWORD=SECRET),
    ):
        assert refused(environ) == refused(environ, "--check") == place(database) + text


def test_unknown_database(database: Database) -> None:
    """It is not created: a typing error is likely, and permissions may be missing."""
    server = database.server
    assert refused(quick(server.url("nowhere"))) == (
        f"{server.host}:{server.port}/nowhere has no database of that name, after 1 attempt;"
        " check the name, or create it"
    )


@pytest.fixture
def limited_user(database: Database) -> Iterator[str]:
    """Return the address for a user with no permission but CONNECT."""
    role = f"{database.name}_poor"
    database.execute(f"create role {role} login password '{SECRET}'")
    yield database.server.url(database.name, user=role, password=SECRET)
    database.execute(f"drop owned by {role}")
    database.execute(f"drop role {role}")


def advice(database: Database, problem: str, statement: str) -> str:
    """Return the error line for a right that the user lacks."""
    return (
        f"viralfx: DATABASE_URL: the user of the database at {place(database)} may not {problem};"
        f" let the database's owner run `{statement}`, and try again"
    )


def test_no_permission_to_create(database: Database, limited_user: str) -> None:
    """The error has the statement that permits it; after that it succeeds."""
    role = f"{database.name}_poor"
    create = f'CREATE SCHEMA "viralfx_ops" AUTHORIZATION {role}'
    grant = f'GRANT USAGE, CREATE ON SCHEMA "viralfx_ops" TO {role}'
    for problem, statement, other in (
        ("create the schema viralfx_ops", create, "create schema viralfx_ops"),
        ("use the schema viralfx_ops", grant, f"grant usage on schema viralfx_ops to {role}"),
        ("create tables in the schema viralfx_ops", grant, grant),
    ):
        assert refused(quick(limited_user)) == advice(database, problem, statement)
        database.execute(other)
    assert migrate(quick(limited_user))[0] == DONE


def test_schema_made_for_the_user(database: Database, limited_user: str) -> None:
    """The user needs no right on the database."""
    database.execute(f"create schema viralfx_ops authorization {database.name}_poor")
    assert migrate(quick(limited_user))[0] == DONE


def test_no_permission_to_read(database: Database, limited_user: str) -> None:
    """The schema was migrated by another user."""
    migrate(quick(database.url))
    role = f"{database.name}_poor"
    grant = f'GRANT USAGE ON SCHEMA "viralfx_ops" TO {role}'
    assert refused(quick(limited_user), "--check") == advice(
        database, "use the schema viralfx_ops", grant
    )
    database.execute(f"grant usage on schema viralfx_ops to {role}")
    for arguments in ((), ("--check",)):
        assert refused(quick(limited_user), *arguments) == (
            f"{place(database)} denies this user a permission when queried for its migrations"
            " (permission denied for table viralfx_migrations); grant it"
        )


def test_read_only_database(database: Database) -> None:
    """The address of a replica is a frequent mistake."""
    database.execute(f"alter database {database.name} set default_transaction_read_only = on")
    assert refused(quick(database.url)) == (
        f"{place(database)} accepts no writes, so nothing was migrated; name the primary"
    )


def test_unreachable_server(database: Database, fault_proxy: FaultProxies) -> None:
    """Refused, silent, unknown or without TLS: one line after all attempts."""
    proxy = fault_proxy(database.server.port)
    url = database.server.url(database.name, host=proxy.host, port=proxy.port)
    patient = {"DB_MAX_RECONNECT_ATTEMPTS": "3", "DB_RECONNECT_DELAY": "10"}
    proxy.mode = REFUSE
    assert refused(quick(url, **patient)).endswith(
        " refuses connections, after 3 attempts; check host and port, and that it is running"
    )
    proxy.mode = BLACKHOLE
    assert refused(quick(url, DB_CONNECTION_TIMEOUT="100")).endswith(
        " does not answer, after 1 attempt; check the server and the network"
    )
    assert refused(quick(database.server.url(host="nowhere.invalid"))).endswith(
        " has an unknown host name, after 1 attempt; check the host"
    )
    assert refused(quick(database.url, DB_TLS_MODE="require")).endswith(
        " does not support TLS, after 1 attempt; enable TLS on the server, or see DB_TLS_MODE"
    )


def test_tls(tls_postgres: PostgresServer, certificates: Certificates) -> None:
    """It uses TLS and refuses an untrusted certificate."""
    verified = {"DB_TLS_MODE": "verify-full", "DB_TLS_CA_FILE": str(certificates.ca)}
    other = {**verified, "DB_TLS_CA_FILE": str(certificates.other_ca)}

    assert refused(quick(tls_postgres.url(), **other)).endswith(
        " cannot be trusted over TLS, after 1 attempt; check DB_TLS_MODE and DB_TLS_CA_FILE"
    )
    assert migrate(quick(tls_postgres.url(), **verified))[0] == DONE


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_invalid_settings_are_reported_before_connecting(
    database: Database, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Exit code 2, one line per problem, and no secret."""
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
        code, out, errors = migrate(environ, *arguments)
        assert (code, out, len(errors)) == (WRONG, [], 1)
        assert errors[0].startswith(f"viralfx: {variable}")
    assert database.execute(TABLES) == []


# -- how it is interrupted -------------------------------------------------------------------


@contextmanager
def started(environ: Mapping[str, str]) -> Iterator[ForkedProcess]:
    """Start it; kill it at the end."""
    variables = {"PATH": os.environ["PATH"], **environ}
    # A shell that runs the tests in the background makes them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = ForkedProcess(["migrate"], environ=variables, cwd=Path.cwd())
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield run
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
        run.stderr.close()


@contextmanager
def locked(
    database: Database, statement: str = f"select pg_advisory_lock({LOCK})"
) -> Iterator[None]:
    """Hold the lock of migrations, as a concurrent run does, or that of another statement."""
    with asyncio.Runner() as runner:
        holder = runner.run(asyncpg.connect(database.url, ssl=False))
        try:
            runner.run(holder.execute(statement))
            yield
        finally:
            runner.run(holder.close())


def waiting(server: PostgresServer) -> list[int]:
    """Return the server's processes that wait for the lock of migrations."""
    rows = server.execute("select pid from pg_locks where locktype = 'advisory' and not granted")
    return [pid for (pid,) in rows]


def interrupted(run: ForkedProcess) -> tuple[int, str, str]:
    """Press Ctrl-C once; return exit code and output."""
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=5)
    return run.wait(), out, err


SAID = (INTERRUPTED, "", "viralfx: interrupted\n")


def test_ctrl_c_while_connecting(database: Database, fault_proxy: FaultProxies) -> None:
    """In a hanging attempt, and between two attempts."""
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
def test_ctrl_c_while_migrating(own_postgres: PostgresServer, *, frozen: bool) -> None:
    """It ends at once, also on a frozen server, and nothing is changed."""
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
    # A waiting session gets the lock later, and then finds its client gone.
    wait_until(lambda: not waiting(own_postgres), what="the server noticed")
    assert migrate(quick(database.url))[0] == DONE


def test_killed_while_migrating(database: Database) -> None:
    """The server takes back the statements of the migration that it was in; a later run goes on."""
    asyncio.run(apply_migrations(config_of(database), target="0002"))
    in_use = "begin; select from viralfx_ops.viralfx_jobs"
    with locked(database, in_use), started(quick(database.url)) as run:
        # Its first statement, which drops the view, is done.
        wait_until(lambda: database.execute(WAITING), what="it waits for the table")
        run.kill()
        run.wait()
        wait_until(lambda: not sessions(database), what="the server noticed")

    assert database.execute(AT) == [("0002",)]
    assert database.execute("select from viralfx_ops.viralfx_all_jobs") == []
    assert migrate(quick(database.url))[:2] == (
        DONE,
        [*APPLIED[2:], f"{place(database)} is current at {REVISIONS[-1]}"],
    )


def test_connection_lost_while_migrating(database: Database) -> None:
    """The error has the cause, and the next run succeeds."""
    with locked(database), started(quick(database.url)) as run:
        wait_until(lambda: waiting(database.server), seconds=60.0, what="it waits for the lock")
        (pid,) = waiting(database.server)
        database.execute(f"select pg_terminate_backend({pid})")
        out, err = run.communicate(timeout=30)

    assert (run.returncode, out) == (UNREACHABLE, "")
    assert err == (
        f"viralfx: DATABASE_URL: the database at {place(database)} closed the connection while it"
        " was migrated; check its log\n"
    )
    assert migrate(quick(database.url))[0] == DONE
