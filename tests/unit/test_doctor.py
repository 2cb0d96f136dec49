"""``viralfx doctor``: verdicts, failing checks, settings, and server information."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tests.manual_clock import ManualClock
from tests.unit.conftest import Releasable
from tests.unit.doubles import BrokenError, swallow_cancellation

from viralfx.adapters.memory.state import StateFolderDoctor
from viralfx.adapters.postgres.doctor import ServerInfo, judge
from viralfx.adapters.redis import doctor as redis_doctor
from viralfx.cli import main
from viralfx.cli.doctor import judge_memory
from viralfx.domain.doctor import (
    Area,
    Finding,
    Verdict,
    diagnose,
    failed,
    in_order,
    passed,
    skipped,
    warned,
    worst,
)
from viralfx.domain.health.model import ProcessUsage
from viralfx.postgres.connections import PostgresConfig
from viralfx.settings import DatabaseAddress, RedisSettings, fields, read_settings
from viralfx.settings.doctor import review

PASS, WARN, FAIL, SKIP = Verdict
LONG_TOKEN = "c0a8e1f59d3b7264-planted"
GOOD = {
    "ENVIRONMENT": "production",
    "MANAGEMENT_TOKEN": LONG_TOKEN,
    "API_TOKEN": f"{LONG_TOKEN}-api",
    "DATABASE_URL": "postgresql://app:hunter22@db.internal/app",
    "DB_TLS_MODE": "verify-full",
    "REDIS_HOST": "redis.internal",
    "REDIS_TLS_ENABLED": "true",
    "REDIS_PASSWORD": "hunter33",
    "SHUTDOWN_READINESS_DELAY": "5000",
}


# -- the run ---------------------------------------------------------------------------------


class Examined:
    """A check that returns or raises as the test asks, and records its cancellation."""

    def __init__(self, *findings: Finding, error: BaseException | None = None) -> None:
        self._findings = findings
        self._error = error

    async def check(self) -> Sequence[Finding]:
        """Return or raise."""
        await asyncio.sleep(0)
        if self._error is not None:
            raise self._error
        return self._findings


@dataclass
class Hanging:
    """A check that never returns and suppresses its cancellation."""

    released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Let the check end."""
        self.released.set()

    async def check(self) -> Sequence[Finding]:
        """Wait, and swallow being cancelled."""
        await swallow_cancellation(self.released)
        return []


async def test_findings_are_sorted_by_area_and_severity(clock: ManualClock) -> None:
    """The worst finding of an area comes first."""
    one = passed(Area.DATABASE, "it answers")
    two = failed(Area.DATABASE, "but not well", "mend it")
    three = warned(Area.ENVIRONMENT, "odd", "look")
    found = await diagnose(
        [(Area.DATABASE, Examined(one, two)), (Area.ENVIRONMENT, Examined(three))],
        clock=clock,
        limit=8.0,
    )

    assert found == (three, two, one)


@pytest.mark.parametrize(
    ("error", "said"),
    [(BrokenError("hunter2"), "BrokenError"), (asyncio.CancelledError(), "cancel")],
)
async def test_a_check_that_raises_is_a_failure(
    clock: ManualClock, error: BaseException, said: str
) -> None:
    """The other findings are shown; the text of the error is not."""
    good = passed(Area.REDIS, "it answers")
    found = await diagnose(
        [(Area.DATABASE, Examined(error=error)), (Area.REDIS, Examined(good))],
        clock=clock,
        limit=8.0,
    )

    assert [(f.area, f.verdict) for f in found] == [(Area.DATABASE, FAIL), (Area.REDIS, PASS)]
    assert said in found[0].found
    assert "hunter2" not in found[0].found + found[0].remedy


async def test_a_check_that_hangs_is_a_failure(clock: ManualClock, held: list[Releasable]) -> None:
    """It is abandoned after the limit, even if it suppresses its cancellation."""
    hanging = Hanging()
    held.append(hanging)
    good = passed(Area.REDIS, "it answers")
    run = asyncio.ensure_future(
        diagnose([(Area.DATABASE, hanging), (Area.REDIS, Examined(good))], clock=clock, limit=8.0)
    )
    await clock.advance(7.9)
    assert not run.done()
    await clock.advance(0.2)

    assert [(f.area, f.verdict) for f in await run] == [(Area.DATABASE, FAIL), (Area.REDIS, PASS)]
    assert "8 s" in (await run)[0].found


def test_the_worst_verdict_counts() -> None:
    """Skipped findings do not count; no findings at all is a pass."""
    skip, good = skipped(Area.REDIS, "none"), passed(Area.REDIS, "good")
    warn, bad = warned(Area.REDIS, "odd", "look"), failed(Area.REDIS, "bad", "mend")

    assert [worst(f) for f in ([], [skip], [skip, good], [warn, good], [warn, bad])] == [
        PASS,
        PASS,
        PASS,
        WARN,
        FAIL,
    ]
    assert in_order([good, skip, bad, warn]) == (bad, warn, good, skip)


def test_a_finding_is_one_line_with_a_remedy() -> None:
    """A warning or failure has a remedy, and a table row is one line."""
    with pytest.raises(ValueError, match="a warning or failure needs a remedy"):
        Finding(area=Area.REDIS, verdict=WARN, found="odd")
    with pytest.raises(ValueError, match="one line"):
        passed(Area.REDIS, "two\nlines")


# -- settings --------------------------------------------------------------------------------


def reviewed(environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings about an environment, without those that pass."""
    found = review(read_settings(environ), environ)
    return [f for f in found if f.verdict in {WARN, FAIL}]


def test_good_production_settings_pass() -> None:
    """There are no warnings; each area of the settings passes."""
    found = review(read_settings(GOOD), GOOD)

    assert reviewed(GOOD) == []
    assert {f.area for f in found if f.verdict is PASS} == {
        Area.ENVIRONMENT,
        Area.SECRETS,
        Area.BUDGETS,
        Area.LOGGING,
    }


Planted = tuple[dict[str, str | None], Area, Verdict, str]
PLANTED: dict[str, Planted] = {
    "typo": ({"LOG_LEVL": "warn"}, Area.ENVIRONMENT, WARN, "LOG_LEVL is not a known variable"),
    "typo of a file": (
        {"DATABSE_URL_FILE": "/x"},
        Area.ENVIRONMENT,
        WARN,
        "DATABSE_URL_FILE is not a known variable",
    ),
    "not quite production": (
        {"ENVIRONMENT": "Prod"},
        Area.ENVIRONMENT,
        WARN,
        "ENVIRONMENT: 'Prod' is not production",
    ),
    "memory in production": (
        {"ALLOW_MEMORY_ADAPTERS": "true", "DATABASE_URL": None, "DB_TLS_MODE": None},
        Area.ENVIRONMENT,
        WARN,
        "the database of production in memory",
    ),
    "memory allowed for nothing": (
        {"ALLOW_MEMORY_ADAPTERS": "true"},
        Area.ENVIRONMENT,
        WARN,
        "ALLOW_MEMORY_ADAPTERS=true has no effect",
    ),
    "a webhook secret for nothing": (
        {"WEBHOOK_SECRET": "whsec_" + "c2Vj" * 8},
        Area.ENVIRONMENT,
        WARN,
        "WEBHOOK_SECRET without effect",
    ),
    "a limit of jobs in memory that are in Postgres": (
        {"JOB_MEMORY_MAX_JOBS": "5000"},
        Area.ENVIRONMENT,
        WARN,
        "JOB_MEMORY_MAX_JOBS without effect: DATABASE_URL is set",
    ),
    "webhook hosts without a secret": (
        {"WEBHOOK_ALLOWED_HOSTS": "hooks.example"},
        Area.ENVIRONMENT,
        WARN,
        "WEBHOOK_ALLOWED_HOSTS without effect",
    ),
    "an open jobs API": (
        {"ALLOW_OPEN_API": "true", "API_TOKEN": None},
        Area.SECRETS,
        WARN,
        "ALLOW_OPEN_API=true: each client of the port",
    ),
    "no token": ({"MANAGEMENT_TOKEN": None}, Area.SECRETS, WARN, "MANAGEMENT_TOKEN is not set"),
    "short token of a developer": (
        {"MANAGEMENT_TOKEN": "hush", "ENVIRONMENT": "development"},
        Area.SECRETS,
        WARN,
        "fewer than 16 characters",
    ),
    "short token of the API": (
        {"API_TOKEN": "hush"},
        Area.SECRETS,
        FAIL,
        "API_TOKEN has fewer than 16 characters",
    ),
    "token of one letter": (
        {"API_TOKEN": "x" * 40},
        Area.SECRETS,
        FAIL,
        "can be guessed",
    ),
    "one token for two names": (
        {"API_TOKEN": LONG_TOKEN},
        Area.SECRETS,
        FAIL,
        "API_TOKEN is that of MANAGEMENT_TOKEN, too",
    ),
    "one token for two names of a developer": (
        {"API_TOKEN": LONG_TOKEN, "ENVIRONMENT": "development"},
        Area.SECRETS,
        WARN,
        "is that of MANAGEMENT_TOKEN, too",
    ),
    "no readiness delay": (
        {"SHUTDOWN_READINESS_DELAY": "0"},
        Area.BUDGETS,
        WARN,
        "SHUTDOWN_READINESS_DELAY=0",
    ),
    "no time to drain": (
        {"SHUTDOWN_DRAIN_TIMEOUT": "0"},
        Area.BUDGETS,
        WARN,
        "SHUTDOWN_DRAIN_TIMEOUT=0: requests and jobs in flight are cut",
    ),
    "no time to save": (
        {"SHUTDOWN_STATE_TIMEOUT": "0"},
        Area.BUDGETS,
        WARN,
        "SHUTDOWN_STATE_TIMEOUT=0",
    ),
    "no time to close": (
        {"SHUTDOWN_CONNECTION_TIMEOUT": "0"},
        Area.BUDGETS,
        WARN,
        "SHUTDOWN_CONNECTION_TIMEOUT=0",
    ),
    "notifications behind a pooler": (
        {"DB_POOLER": "transaction", **{name: None for name in GOOD if name.startswith("REDIS_")}},
        Area.DATABASE,
        WARN,
        "DB_POOLER=transaction: such a pooler delivers no notification",
    ),
    "listening for nothing": (
        {"DATABASE_LISTEN_URL": "postgresql://db/app"},
        Area.DATABASE,
        WARN,
        "DATABASE_LISTEN_URL without effect: Redis carries the notifications",
    ),
    "plain text to the database": (
        {"DB_TLS_MODE": "disable"},
        Area.DATABASE,
        WARN,
        "DB_TLS_MODE=disable: password and data may cross the network",
    ),
    "plain text by default": (
        {"DB_TLS_MODE": None},
        Area.DATABASE,
        WARN,
        "DB_TLS_MODE=prefer: password and data may cross the network",
    ),
    "unverified database": (
        {"DB_TLS_MODE": "require"},
        Area.DATABASE,
        WARN,
        "the server's certificate is not verified",
    ),
    "endless statements": (
        {"DB_STATEMENT_TIMEOUT": "0"},
        Area.DATABASE,
        WARN,
        "DB_STATEMENT_TIMEOUT=0",
    ),
    "hardly any margin": (
        {"SHUTDOWN_GRACE_PERIOD": "64999"},
        Area.BUDGETS,
        WARN,
        "4.999 s before the process is killed",
    ),
    "nothing is slow": (
        {"DB_SLOW_QUERY_THRESHOLD": "2000", "DB_STATEMENT_TIMEOUT": "2000"},
        Area.DATABASE,
        WARN,
        "DB_SLOW_QUERY_THRESHOLD=2000: no query lasts so long",
    ),
    "database variables without a database": (
        {
            "DATABASE_URL": None,
            "DB_POOL_MAX": "9",
            "ALLOW_MEMORY_ADAPTERS": "true",
        },
        Area.DATABASE,
        WARN,
        "DB_POOL_MAX, DB_TLS_MODE without effect: DATABASE_URL is not set",
    ),
    "profile for nothing": (
        {"POOL_PROFILE": "large", "DB_POOL_MIN": "1", "DB_POOL_MAX": "2"},
        Area.POOL,
        WARN,
        "POOL_PROFILE without effect",
    ),
    "unverified Redis": (
        {"REDIS_TLS_REJECT_UNAUTHORIZED": "false"},
        Area.REDIS,
        WARN,
        "REDIS_TLS_REJECT_UNAUTHORIZED=false: encrypted, but the server's certificate",
    ),
    "Redis authority for nothing": (
        {"REDIS_TLS_REJECT_UNAUTHORIZED": "false", "REDIS_TLS_CA_FILE": __file__},
        Area.REDIS,
        WARN,
        "REDIS_TLS_CA_FILE without effect",
    ),
    "a parameter without effect": (
        {"DATABASE_URL": "postgresql://app@db/app?sslmode=verify-full&sslnegotiation=direct"},
        Area.ENVIRONMENT,
        WARN,
        "DATABASE_URL: sslnegotiation has no effect",
    ),
    "a target without writes": (
        {
            "DATABASE_URL": "postgresql://app@db/app?sslmode=verify-full&target_session_attrs=standby"
        },
        Area.DATABASE,
        WARN,
        "target_session_attrs=standby chooses a server that refuses writes",
    ),
    "any of several hosts": (
        {"DATABASE_URL": "postgresql://app@a,b/app?sslmode=verify-full&target_session_attrs=any"},
        Area.DATABASE,
        WARN,
        "target_session_attrs=any with several hosts",
    ),
    "polling behind a pooler": (
        {"DB_POOLER": "transaction", "REDIS_HOST": None},
        Area.DATABASE,
        WARN,
        "DB_POOLER=transaction without DATABASE_LISTEN_URL",
    ),
    "plain text to Redis": (
        {"REDIS_TLS_ENABLED": None},
        Area.REDIS,
        WARN,
        "REDIS_TLS_ENABLED=false",
    ),
    "TLS settings without TLS": (
        {"REDIS_TLS_ENABLED": None, "REDIS_TLS_REJECT_UNAUTHORIZED": "true"},
        Area.REDIS,
        WARN,
        "REDIS_TLS_REJECT_UNAUTHORIZED without effect: REDIS_TLS_ENABLED=false",
    ),
    "short password of the database": (
        {"DATABASE_URL": "postgresql://app:hunter2@db.internal/app"},
        Area.SECRETS,
        WARN,
        "DATABASE_URL has a password of fewer than 8 characters",
    ),
    "short password of Redis": (
        {"REDIS_PASSWORD": "hunter3"},
        Area.SECRETS,
        WARN,
        "REDIS_PASSWORD has a password of fewer than 8 characters",
    ),
    "open Redis": ({"REDIS_PASSWORD": None}, Area.REDIS, WARN, "REDIS_PASSWORD is not set"),
    "Redis variables without Redis": (
        {"REDIS_HOST": None, "ALLOW_MEMORY_ADAPTERS": "true"},
        Area.REDIS,
        WARN,
        "REDIS_PASSWORD, REDIS_TLS_ENABLED without effect: neither REDIS_HOST",
    ),
    "Sentinels for nothing": (
        {"REDIS_SENTINELS": "a:26379,b:26379"},
        Area.REDIS,
        WARN,
        "REDIS_SENTINELS without effect: REDIS_SENTINEL_ENABLED=false",
    ),
    "host beside Sentinels": (
        {"REDIS_SENTINELS": "a:26379", "REDIS_SENTINEL_ENABLED": "true"},
        Area.REDIS,
        WARN,
        "REDIS_HOST without effect: the Sentinels provide the address of Redis",
    ),
    "two places for state": (
        {"STATE_DIR": "/var/lib/viralfx"},
        Area.STATE,
        WARN,
        "STATE_DIR and DATABASE_URL are both set",
    ),
    "timeout as long as the interval": (
        {"HEALTH_CHECK_TIMEOUT": "5000"},
        Area.ENDPOINTS,
        WARN,
        "HEALTH_CHECK_TIMEOUT=5000 is not below HEALTH_CHECK_INTERVAL=5000",
    ),
    "ready only with Redis": (
        {"READINESS_REQUIRES": "database,redis"},
        Area.ENDPOINTS,
        WARN,
        "READINESS_REQUIRES names redis",
    ),
    "ready without the database": (
        {"READINESS_REQUIRES": "none"},
        Area.ENDPOINTS,
        WARN,
        "READINESS_REQUIRES does not name database",
    ),
    "talkative": ({"LOG_LEVEL": "debug"}, Area.LOGGING, WARN, "LOG_LEVEL=debug"),
    "very talkative": ({"LOG_LEVEL": "verbose"}, Area.LOGGING, WARN, "LOG_LEVEL=verbose"),
    "taciturn": ({"LOG_LEVEL": "error"}, Area.LOGGING, WARN, "LOG_LEVEL=error"),
    "for people": ({"LOG_FORMAT": "console"}, Area.LOGGING, WARN, "LOG_FORMAT=console"),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_unwise_settings_are_found(planted: Planted) -> None:
    """Each has one finding, in its area, with its verdict."""
    changes, area, verdict, text = planted
    merged = {**GOOD, **changes}
    environ = {name: value for name, value in merged.items() if value is not None}
    found = reviewed(environ)

    assert [(f.area, f.verdict) for f in found if text in f.found] == [(area, verdict)], found
    assert all(value not in repr(found) for value in ("hunter2", "hunter3", LONG_TOKEN))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_local_connections_need_no_tls(host: str) -> None:
    """A loopback address or a Unix socket does not cross a network."""
    environ = {
        **GOOD,
        "DATABASE_URL": f"postgresql://app@{host}/app",
        "DB_TLS_MODE": "prefer",
        "REDIS_HOST": host,
        "REDIS_TLS_ENABLED": "false",
    }
    environ.pop("REDIS_PASSWORD")

    assert reviewed(environ) == []


def test_production_rules_apply_to_production_only() -> None:
    """Elsewhere only settings that are dangerous or useless anywhere are found."""
    environ = {"LOG_LEVEL": "debug", "LOG_FORMAT": "console", "DATABASE_URL": "postgresql://db/app"}

    assert [f.found.split()[0] for f in reviewed(environ)] == ["MANAGEMENT_TOKEN"]


# -- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "verdict", "remedy"),
    [
        (161, PASS, ""),
        (160, WARN, "raise the memory limit to 256 MiB or more"),
        (107, WARN, "raise the memory limit to 256 MiB or more"),
        (106, FAIL, "raise the memory limit to 256 MiB or more"),
    ],
)
def test_an_idle_process_leaves_memory_for_work(limit: int, verdict: Verdict, remedy: str) -> None:
    """Half of the limit is a warning; from three quarters the memory check would warn always."""
    usage = ProcessUsage(
        rss=80 * 2**20, heap_used=60 * 2**20, heap_total=limit * 2**20, cpu_percent=0.0
    )

    assert judge_memory(usage) == Finding(
        area=Area.MEMORY,
        verdict=verdict,
        found=f"with the application loaded, 80 MiB of {limit} MiB are in use before any request"
        " or job",
        remedy=remedy,
    )


# -- Postgres --------------------------------------------------------------------------------

CONFIG = PostgresConfig(address=DatabaseAddress(hosts=(("db", 5432),), database="app"))
RIGHT = ServerInfo(version="18.1", major=18, tls="TLSv1.3", statement_timeout=60000)


def judged(info: ServerInfo, config: PostgresConfig | None = None) -> list[Finding]:
    """Return the findings about a production server, without those that pass."""
    config = config or CONFIG
    found = judge(info, config, production=True)
    return [f for f in found if f.verdict is not PASS]


def test_a_well_configured_server_passes() -> None:
    """The finding names the server."""
    found = list(
        judge(
            RIGHT,
            CONFIG,
            production=True,
        )
    )

    assert [(f.area, f.verdict) for f in found] == [(Area.DATABASE, PASS), (Area.POOL, PASS)]
    assert found[0].found == "PostgreSQL 18.1 at db:5432/app answers over TLSv1.3"


@pytest.mark.parametrize(
    ("info", "area", "verdict", "text"),
    [
        (replace(RIGHT, version="13.9", major=13), Area.DATABASE, FAIL, "13.9 is too old"),
        (replace(RIGHT, replica=True), Area.DATABASE, FAIL, "is a replica"),
        (replace(RIGHT, read_only=True), Area.DATABASE, FAIL, "nothing can be written"),
        (replace(RIGHT, encoding="SQL_ASCII"), Area.DATABASE, WARN, "encoded in SQL_ASCII"),
        (replace(RIGHT, superuser=True), Area.DATABASE, WARN, "superuser"),
        (
            replace(RIGHT, lacking=(("viralfx_state", ("INSERT", "DELETE")),)),
            Area.DATABASE,
            FAIL,
            "INSERT, DELETE on the table viralfx_state",
        ),
        (replace(RIGHT, statement_timeout=10), Area.DATABASE, WARN, "after 10 ms"),
        (replace(RIGHT, transaction_timeout=10), Area.DATABASE, WARN, "transaction_timeout"),
        (replace(RIGHT, idle_session_timeout=10), Area.DATABASE, WARN, "idle_session_timeout"),
        (replace(RIGHT, max_connections=14), Area.POOL, FAIL, "more than the 11 that"),
        (replace(RIGHT, max_connections=15), Area.POOL, WARN, "half of the 12"),
        (replace(RIGHT, max_connections=26), Area.POOL, WARN, "half of the 23"),
        (replace(RIGHT, user_limit=0), Area.POOL, FAIL, "more than the 0 that"),
        (replace(RIGHT, database_limit=12), Area.POOL, WARN, "half of the 12"),
        (replace(RIGHT, in_use=90), Area.POOL, WARN, "90 of 97 are in use"),
    ],
)
def test_each_problem_of_a_server_is_found(
    info: ServerInfo, area: Area, verdict: Verdict, text: str
) -> None:
    """Each has one finding."""
    found = judged(info)

    assert [(f.area, f.verdict, text in f.found) for f in found] == [(area, verdict, True)], found


@pytest.mark.parametrize(
    "info",
    [
        replace(RIGHT, major=14),
        replace(RIGHT, max_connections=27),
        replace(RIGHT, in_use=85),
        replace(RIGHT, transaction_timeout=60000),
        replace(RIGHT, user_limit=24, database_limit=24),
    ],
)
def test_values_at_the_limits_pass(info: ServerInfo) -> None:
    """The limits themselves are allowed."""
    assert judged(info) == []


# -- Redis -----------------------------------------------------------------------------------

FINE = redis_doctor.ServerInfo(product="Redis 8.0.1", version=(8, 0, 1))
SENTINEL = RedisSettings(sentinel_enabled=True, sentinels=("s:26379",))


def judged_redis(info: redis_doctor.ServerInfo, config: RedisSettings) -> list[Finding]:
    """Return the findings about a Redis server, without those that pass."""
    return [f for f in redis_doctor.judge(info, config, "r:6379") if f.verdict is not PASS]


def test_a_well_configured_redis_passes() -> None:
    """The finding names the server."""
    (found,) = redis_doctor.judge(FINE, RedisSettings(tls_enabled=True), "r:6379")

    assert (found.area, found.verdict) == (Area.REDIS, PASS)
    assert found.found == "Redis 8.0.1 at r:6379 answers over TLS"


@pytest.mark.parametrize(
    ("info", "config", "verdict", "text"),
    [
        (replace(FINE, version=(6, 0, 16)), RedisSettings(), FAIL, "is too old"),
        (replace(FINE, version=()), RedisSettings(), FAIL, "is too old"),
        (replace(FINE, mode="cluster"), RedisSettings(), FAIL, "a node of a cluster"),
        (replace(FINE, mode="sentinel", version=()), RedisSettings(), FAIL, "is a Sentinel"),
        (replace(FINE, replica=True, replicas=0), SENTINEL, FAIL, "is a replica"),
        (replace(FINE, replicas=0), SENTINEL, WARN, "nothing to fail over to"),
        (replace(FINE, policy="allkeys-lfu"), RedisSettings(), WARN, "allkeys-lfu"),
        (replace(FINE, memory=9, memory_limit=10), RedisSettings(), WARN, "90 % of maxmemory"),
        (replace(FINE, persistent=False), RedisSettings(), WARN, "nothing is kept on disk"),
        (replace(FINE, saved=False), RedisSettings(), WARN, "could not save its data"),
        (replace(FINE, clients_limit=101), RedisSettings(), WARN, "more than half of the 101"),
        (replace(FINE, clients=9950), RedisSettings(), WARN, "9950 of 10000 are in use"),
    ],
)
def test_each_problem_of_a_redis_is_found(
    info: redis_doctor.ServerInfo, config: RedisSettings, verdict: Verdict, text: str
) -> None:
    """Each has one finding."""
    found = judged_redis(info, config)

    assert [(f.verdict, text in f.found) for f in found] == [(verdict, True)], found


@pytest.mark.parametrize(
    "info",
    [
        replace(FINE, version=(6, 2)),
        replace(FINE, replicas=0),
        replace(FINE, policy="volatile-lru"),
        replace(FINE, memory=8, memory_limit=10),
        replace(FINE, persistent=None),
        replace(FINE, clients_limit=102),
        replace(FINE, clients=9949),
    ],
)
def test_redis_values_at_the_limits_pass(info: redis_doctor.ServerInfo) -> None:
    """So do facts that the server does not reveal."""
    assert judged_redis(info, RedisSettings()) == []


# -- saved state -----------------------------------------------------------------------------


def test_checking_a_writable_folder_leaves_no_file(tmp_path: Path) -> None:
    """The trial file is removed."""
    (found,) = asyncio.run(StateFolderDoctor(tmp_path).check())

    assert (found.area, found.verdict, list(tmp_path.iterdir())) == (Area.STATE, PASS, [])


@pytest.mark.parametrize(
    ("folder", "text"),
    [("/dev/null", "is not a folder"), ("/nowhere", "is not a folder"), ("/proc", "cannot be")],
)
def test_a_folder_that_is_not_writable_is_found(folder: str, text: str) -> None:
    """Also a path that is not a folder."""
    (found,) = asyncio.run(StateFolderDoctor(Path(folder)).check())

    assert (found.area, found.verdict, text in found.found) == (Area.STATE, FAIL, True)


# -- the command -----------------------------------------------------------------------------

Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(plain_environ: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Return a function that runs the command; it returns the exit code and the output."""
    plain_environ.setenv("PORT", "0")

    def run(*arguments: str, **environ: str) -> tuple[int, str]:
        for name, value in environ.items():
            plain_environ.setenv(name, value)
        code = main(["doctor", *arguments])
        out, err = capsys.readouterr()
        assert err == ""
        return code, out

    return run


def test_the_defaults_do_not_fail(doctor: Doctor) -> None:
    """All adapters are in memory, and warnings are not failures."""
    code, out = doctor()

    assert code == 0
    assert out.splitlines()[-1].startswith("0 failed, 1 warned")


def test_the_table_fits_100_columns(doctor: Doctor) -> None:
    """Wrapped text stays in its column."""
    _, out = doctor()
    header, *lines = out.splitlines()[:-2]
    second, third = header.index("area"), header.index("found")
    areas = [line[second:third].strip() for line in lines if line[0] != " "]

    assert max(map(len, lines)) <= 100
    assert areas == [str(area) for area in Area]
    assert all(line[:third].isspace() or line[third - 1] == " " for line in lines)
    assert not re.search(r"\x1b", out)


def test_json_has_every_finding(doctor: Doctor) -> None:
    """One object with the overall status and all findings."""
    code, out = doctor("--json", READINESS_REQUIRES="databse")
    said = json.loads(out)

    assert (code, said["status"], list(said)) == (1, "fail", ["status", "findings"])
    assert {tuple(finding) for finding in said["findings"]} == {
        ("area", "status", "found", "remedy")
    }
    assert {
        "area": "health endpoints",
        "status": "fail",
        "found": "READINESS_REQUIRES: there is no check named 'databse'",
        "remedy": "did you mean database?",
    } in said["findings"]


def test_invalid_settings_are_findings(doctor: Doctor, tmp_path: Path) -> None:
    """One for each problem; the rest is skipped; the exit code is 2."""
    code, out = doctor(
        "--json",
        DB_POL_MAX="5",
        DB_USER="app",
        DB_POOL_MIN="20",
        DATABASE_URL="postgresql://app:hunter2/@db/app",
        SHUTDOWN_DRAIN_TIMEOUT="90000",
        REDIS_SENTINEL_ENABLED="true",
        MANAGEMENT_TOKEN_FILE=str(tmp_path / "token"),
        LOG_LEVEL="loud",
        PORT="http",
        HEALTH_DETAILS="some",
        LOG_FORMATT="json",
        READINESS_REQUIRED="database",
    )
    findings = json.loads(out)["findings"]
    problems = [(f["area"], f["found"].partition(":")[0]) for f in findings if f["remedy"]]

    assert code == 2
    assert problems == [
        ("environment", "DB_POL_MAX"),
        ("environment", "LOG_FORMATT"),
        ("environment", "READINESS_REQUIRED"),
        ("environment", "no setting reads DB_USER"),
        ("secrets", "MANAGEMENT_TOKEN"),
        ("shutdown budgets", "SHUTDOWN_FORCE_TIMEOUT"),
        ("database", "DATABASE_URL"),
        ("pool", "DB_POOL_MIN"),
        ("redis", "REDIS_SENTINELS"),
        ("ports", "PORT"),
        ("health endpoints", "HEALTH_DETAILS"),
        ("logging", "LOG_LEVEL"),
    ]
    assert {(f["status"], f["found"]) for f in findings if not f["remedy"]} == {
        ("skip", "the settings could not be read")
    }
    assert "hunter2" not in out


def test_problems_of_addresses_belong_to_their_servers(doctor: Doctor) -> None:
    """Not to the secrets, though an address may hold one."""
    code, out = doctor(
        "--json",
        DATABASE_URL="postgresql://db/app?require_auth=md5",
        DATABASE_LISTEN_URL="mysql://db/app",
        REDIS_URL="redis+sentinel://a:1/mymaster",
    )
    findings = json.loads(out)["findings"]

    assert code == 2
    assert [(f["area"], f["found"].partition(":")[0]) for f in findings if f["remedy"]] == [
        ("database", "DATABASE_URL"),
        ("database", "DATABASE_LISTEN_URL"),
        ("redis", "REDIS_URL"),
    ]


def test_every_variable_has_an_area(doctor: Doctor) -> None:
    """An invalid value of any variable becomes a finding in an area."""
    numbers = [f.variable for f in fields() if "whole number" in f.allowed]
    code, out = doctor("--json", **dict.fromkeys(numbers, "x"))
    found = {f["found"].partition(":")[0] for f in json.loads(out)["findings"]}

    assert code == 2
    assert set(numbers) <= found
