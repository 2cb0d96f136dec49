"""Environments of other programs, typing errors, and the addresses that providers hand out."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import TestClient

from viralfx import OperationsConfig, OperationsPlugin, Settings, read_settings, task
from viralfx.core.errors import ConfigurationError, edits
from viralfx.domain.doctor import Finding
from viralfx.settings import show, sources
from viralfx.settings.doctor import review
from viralfx.settings.dsn import IMPLIED
from viralfx.settings.loader import fields
from viralfx.testing import wait_until_ready

FOREIGN = {
    # Django, Laravel, Rails, WordPress
    "DB_HOST": "db",
    "DB_NAME": "shop",
    "DB_USER": "shop",
    "DB_USERNAME": "shop",
    "DB_PORT": "5432",
    "DB_URL": "mysql://db/shop",
    "DB_CONNECTION": "pgsql",
    "DB_ENGINE": "django.db.backends.postgresql",
    "DB_POOL": "5",
    "DB_PASS": "hunter2",
    "DATABASE_URI": "postgresql://db/shop",
    "DATABASE_HOST": "db",
    "DATABASE_NAME": "shop",
    "DATABASE_USER": "shop",
    "DJANGO_SETTINGS_MODULE": "shop.settings",
    "RAILS_MAX_THREADS": "5",
    # Redis and queues: Celery, RQ, Sidekiq, Resque
    "REDIS_URL": "redis://127.0.0.1:1/0?decode_responses=True&max_connections=10&protocol=3",
    "REDIS_URI": "redis://cache",
    "REDIS_PASS": "hunter2",
    "REDIS_PREFIX": "shop:",
    "REDIS_CLIENT": "phpredis",
    "REDIS_TLS_URL": "rediss://cache",
    "CELERY_BROKER_URL": "amqp://broker",
    "QUEUE": "*",
    "QUEUE_URL": "https://sqs.eu-west-1.example/1/jobs",
    "QUEUE_CONNECTION": "redis",
    # Jenkins, Kubernetes, Nomad, Cloud Run
    "JOB_NAME": "build",
    "JOB_BASE_NAME": "build",
    "JOB_URL": "https://ci.example/job/build",
    "JOB_DISPLAY_URL": "https://ci.example/job/build/display",
    "JOB_COMPLETION_INDEX": "0",
    "REDIS_SERVICE_HOST": "10.0.0.11",
    "REDIS_PORT": "tcp://10.0.0.11:6379",
    "DB_PORT_5432_TCP_ADDR": "10.0.0.12",
    "HEALTH_PORT": "8081",
    "HEALTH_CHECK_PATH": "/healthz",
    "HEALTHCHECK_URL": "https://hc.example/1",
    "SHUTDOWN_TIMEOUT": "10",
    "POOL_SIZE": "5",
    "PORT": "tcp://10.0.0.1:3000",
    # Servers and shells
    "HTTP_PROXY": "http://proxy:3128",
    "HTTP_TIMEOUT": "30",
    "LOG_LEVEL": "INFO",
    "LOG_FORMAT": "%(asctime)s %(message)s",
    "HOSTNAME": "pod-1",
    "ENVIRONMENT": "production",
    # An init of System V, Resque, servers, wikis, Cloud Run
    "CONSOLE": "/dev/console",
    "QUEUES": "*",
    "ACCESS_LOG": "/var/log/access.log",
    "RUNBOOK_URL": "wiki/Runbook",
    "K_REVISION": "shop-00001-abc",
    "WEBHOOK_SECRET": "hunter2",
}


def test_the_plugin_starts_with_all_foreign_variables(plain_environ: pytest.MonkeyPatch) -> None:
    """There are 40 or more."""
    for name, value in FOREIGN.items():
        plain_environ.setenv(name, value)

    assert len(FOREIGN) >= 40
    with TestClient(Litestar(plugins=[OperationsPlugin()])) as client:
        wait_until_ready(client)


OF_OTHER_CLIENTS = {
    "redis://u:p@cache?decode_responses=True&client_name=shop": [
        "REDIS_URL: ignored unknown parameter 'decode_responses'",
        "REDIS_URL: ignored unknown parameter 'client_name'",
    ],
    "redis://cache?max_connections=10": ["REDIS_URL: ignored unknown parameter"],
    "redis://u:p@cache?ssl_ca_path=/etc/ssl": [
        "REDIS_URL: ignored unknown parameter 'ssl_ca_path'; did you mean ssl_ca_certs?"
    ],
    "postgis://u:p@db/shop?conn_max_age=600": [
        "DATABASE_URL: ignored unknown parameter 'conn_max_age'"
    ],
    "postgresql+pg8000://u:p@db/shop?pool=5&max=5": [
        "DATABASE_URL: ignored unknown parameter 'pool'",
        "DATABASE_URL: ignored unknown parameter 'max'",
    ],
    "pgsql://u:p@db/shop": [],
}


@pytest.mark.parametrize("url", OF_OTHER_CLIENTS)
def test_the_plugin_ignores_parameters_of_other_clients(url: str) -> None:
    """The rest of the address is in use; a program of this package refuses each parameter."""
    variable = "REDIS_URL" if url.startswith("redis") else "DATABASE_URL"
    lines = OF_OTHER_CLIENTS[url]
    settings = read_settings({variable: url})

    assert list(settings.warnings) == lines
    assert settings.redis.host == "cache" or str(settings.database_address) == "db:5432/shop"
    if lines:
        with pytest.raises(ConfigurationError) as refused:
            read_settings({variable: url}, strict=True)
        names = [line.replace("ignored ", "") for line in lines]
        assert [line.removesuffix("; remove it") for line in refused.value.problems] == names


@pytest.mark.parametrize("url", ["redis://cache?pasword=p", "postgresql://db/a?ssl-mode=require"])
def test_the_plugin_refuses_a_misspelt_parameter(url: str) -> None:
    """Without the error, a password or TLS would silently be missing."""
    variable = "REDIS_URL" if url.startswith("redis") else "DATABASE_URL"

    with pytest.raises(ConfigurationError, match=r"unknown parameter.*; did you mean "):
        read_settings({variable: url})


@pytest.mark.parametrize(
    "name", ["WEBHOOK_SECRET", "WEBHOOK_SHARED_SECRET", "WEBHOOK_KEYS", "ALERT_WEBHOOK_SECRET"]
)
def test_a_foreign_webhook_secret_is_ignored_while_no_webhooks_are_sent(name: str) -> None:
    """Its name is a common one."""
    foreign = {name: "hunter2"}
    settings = read_settings(foreign)

    assert settings.webhook.secret is None
    assert settings.warnings == (
        f"{name}: ignored, because it is not a signing key, and no webhooks are configured",
    )
    for one in ({"WEBHOOK_ALLOWED_HOSTS": "a.example"}, {"ALERT_WEBHOOK_URL": "https://a.example"}):
        with pytest.raises(ConfigurationError, match=name):
            read_settings({**foreign, **one})
    with pytest.raises(ConfigurationError, match=name):
        read_settings(foreign, strict=True)


TYPING_ERRORS = {
    "DATABASE_URLS": "DATABASE_URL",
    "DATABSE_URL": "DATABASE_URL",
    "DATABASE_MIGRATIONS_URL": "DATABASE_MIGRATION_URL",
    "DB_PASSWROD": "DB_PASSWORD",
    "DB_PASSWORD_FIEL": "DB_PASSWORD_FILE",
    "DB_POL_MAX": "DB_POOL_MAX",
    "DB_POOL_MN": "DB_POOL_MIN",
    "DB_TLS_MOD": "DB_TLS_MODE",
    "DB_HEALTHCHECK_INTERVAL": "DB_HEALTH_CHECK_INTERVAL",
    "REDIS_HOTS": "REDIS_HOST",
    "REDIS_PASWORD": "REDIS_PASSWORD",
    "REDIS_SENTINEL": "REDIS_SENTINELS",
    "REDIS_TSL_ENABLED": "REDIS_TLS_ENABLED",
    "HEALTH_CHECK_INTERVALL": "HEALTH_CHECK_INTERVAL",
    "HEALTH_CRITICALS": "HEALTH_CRITICAL",
    "SHUTDOWN_DRAIN_TIMOUT": "SHUTDOWN_DRAIN_TIMEOUT",
    "SHUTDOWN_DRAIN-TIMEOUT": "SHUTDOWN_DRAIN_TIMEOUT",
    "READINESS_REQUIRED": "READINESS_REQUIRES",
    "MANAGMENT_TOKEN": "MANAGEMENT_TOKEN",
    "ENVIROMENT": "ENVIRONMENT",
    "LOG_LEVL": "LOG_LEVEL",
    "JOB_CONCURENCY": "JOB_CONCURRENCY",
    "ALLOW_MEMORY_ADAPTER": "ALLOW_MEMORY_ADAPTERS",
}


@pytest.mark.parametrize("name", TYPING_ERRORS)
def test_a_program_refuses_a_typing_error(name: str) -> None:
    """Within two edits of a known name; its value is not shown. The plugin ignores it."""
    with pytest.raises(ConfigurationError) as refused:
        read_settings({name: "hunter2"}, strict=True)

    line = f"{name}: unknown variable; did you mean {TYPING_ERRORS[name]}?"
    assert refused.value.problems == (line,)
    assert read_settings({name: "hunter2"}) == Settings()


@given(st.text("AB_", max_size=9), st.text("AB_", max_size=9))
@example("BBB", "ABAAA")
def test_edits_are_counted_up_to_the_limit(one: str, other: str) -> None:
    """As by the definition: insertions, deletions and replacements."""

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    assert edits(one, other, limit=2) == min(3, distance(len(one), len(other)))


@pytest.mark.parametrize(
    "name",
    [
        "DB_HOST",
        "DB_POOL",
        "JOB_NAME",
        "QUEUE",
        "LOG_FILE",
        "POOL_XYZZY",
        "HTTP_TIMEOUT",
        "K_REVISION",
    ],
)
def test_a_program_ignores_other_names(name: str) -> None:
    """Of fewer than eight characters, with more than two edits, or set by a platform."""
    assert read_settings({name: "1"}, strict=True) == Settings()


def reviewed(environ: dict[str, str]) -> list[Finding]:
    """Return the findings of doctor that need an action."""
    return [f for f in review(read_settings(environ, strict=True), environ) if f.remedy]


def test_doctor_lists_names_that_nothing_reads() -> None:
    """Those that begin as a setting does, in one finding; service links are left out."""
    environ = {"DB_HOST": "db", "JOB_NAME": "build", "DB_SERVICE_HOST": "10.0.0.1", "EDITOR": "vi"}

    assert [f.found for f in reviewed(environ) if f.area == "environment"] == [
        "no setting reads DB_HOST, JOB_NAME"
    ]


@pytest.mark.parametrize(
    "url", ["mysql://db/app", "sqlite:///app.db", "sqlite+aiosqlite:///app.db", "file:./dev.db"]
)
def test_another_database_is_a_warning_in_an_application(
    url: str, plain_environ: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The data of this package is then in memory. A program refuses to start."""
    plain_environ.setenv("DATABASE_URL", url)

    plugin = OperationsPlugin()

    assert plugin.assembly.database is None
    (line,) = [r.getMessage() for r in caplog.records if r.name == "viralfx.settings"]
    assert line.startswith("Setting without effect: DATABASE_URL: ignored, because it is the")
    with pytest.raises(ConfigurationError, match="is not a Postgres address"):
        read_settings({"DATABASE_URL": url}, strict=True)


@pytest.mark.parametrize("url", ["redis+sentinel://a:1", "memory://", "amqp://broker"])
def test_a_strange_redis_address_is_a_warning_in_an_application(url: str) -> None:
    """The cache is then in memory. A program refuses to start."""
    settings = read_settings({"REDIS_URL": url})

    assert not settings.redis.in_use
    assert [line.partition(",")[0] for line in settings.warnings] == ["REDIS_URL: ignored"]
    with pytest.raises(ConfigurationError, match="REDIS_URL: "):
        read_settings({"REDIS_URL": url}, strict=True)


def test_a_wrong_value_of_our_own_is_an_error_in_an_application() -> None:
    """Only those that a server reads may have another meaning."""
    with pytest.raises(ConfigurationError) as refused:
        read_settings({"DB_POOL_MAX": "many", "PORT": "http", "LOG_LEVEL": "loud"})

    assert [line.partition(":")[0] for line in refused.value.problems] == ["DB_POOL_MAX"]
    assert read_settings({"PORT": "http"}).port == 3000


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CONSOLE", "/dev/console", "'/dev/console' is not one of false, management, true"),
        ("ACCESS_LOG", "/var/log/a.log", "'/var/log/a.log' is not true or false"),
        ("RUNBOOK_URL", "wiki", "it is not the address of a page"),
        ("QUEUES", "*", "'*' is not a list like default:20,notifications:5"),
    ],
)
def test_a_name_with_another_meaning_is_a_warning_in_an_application(
    name: str, value: str, reason: str
) -> None:
    """The default applies. A program refuses to start."""
    settings = read_settings({name: value})

    assert settings.warnings == (f"{name}: ignored, because {reason}",)
    assert msgspec.structs.replace(settings, warnings=()) == Settings()
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        read_settings({name: value}, strict=True)


def test_an_ignored_access_log_does_not_turn_the_lines_on(
    plain_environ: pytest.MonkeyPatch,
) -> None:
    """The server of the application logs its requests."""
    plain_environ.setenv("ACCESS_LOG", "/var/log/access.log")
    recorder = OperationsPlugin().request_recorder(own_server=False)
    plain_environ.setenv("ACCESS_LOG", "true")
    set_recorder = OperationsPlugin().request_recorder(own_server=False)

    assert (recorder._access_log, set_recorder._access_log is None) == (None, False)


def test_queues_of_an_application_with_tasks_are_its_own(plain_environ: pytest.MonkeyPatch) -> None:
    """Its jobs would run in other queues; without tasks the name is that of another program."""

    @task("orders.pick")
    async def pick(payload: int) -> None:
        pass

    plain_environ.setenv("QUEUES", "Default")

    assert OperationsPlugin().settings.queues == Settings().queues
    with pytest.raises(ConfigurationError, match=r"^QUEUES: 'Default' is not a list"):
        OperationsPlugin(OperationsConfig(tasks=[pick]))
    with pytest.raises(ConfigurationError, match=r"^QUEUES: 'Default' is not a list"):
        read_settings({"QUEUES": "Default", "TASK_MODULES": "shop.tasks"})


def test_a_prefix_separates_the_settings_from_others(plain_environ: pytest.MonkeyPatch) -> None:
    """Names without the prefix are not read, and errors have the whole names."""
    plain_environ.setenv("OPS_DB_POOL_MAX", "7")
    plain_environ.setenv("DB_POOL_MIN", "many")

    plugin = OperationsPlugin(OperationsConfig(env_prefix="OPS_"))

    assert plugin.settings.db.pool_max == 7
    plain_environ.setenv("OPS_DB_POOL_MIN", "9")
    with pytest.raises(ConfigurationError, match=r"^OPS_DB_POOL_MIN: 9 is more than OPS_DB_POOL_M"):
        OperationsPlugin(OperationsConfig(env_prefix="OPS_"))
    misspelt = {"OPS_SHUTDOWN_DRAIN_TIMOUT": "5", "SHUTDOWN_STATE_TIMOUT": "5"}
    with pytest.raises(ConfigurationError) as refused:
        read_settings(misspelt, env_prefix="OPS_", strict=True)
    line = "OPS_SHUTDOWN_DRAIN_TIMOUT: unknown variable; did you mean OPS_SHUTDOWN_DRAIN_TIMEOUT?"
    assert refused.value.problems == (line,)
    with pytest.raises(ValueError, match="env_prefix has no effect with settings"):
        OperationsConfig(env_prefix="OPS_", settings=Settings())
    with pytest.raises(ValueError, match="env_prefix must be"):
        OperationsConfig(env_prefix="OPS-")


def test_production_refuses_tasks_of_an_application_in_memory() -> None:
    """Without tasks there are no jobs to lose, and the plugin starts."""

    @task("orders.ship")
    async def ship(payload: int) -> None:
        pass

    settings = Settings(environment="production")

    assert OperationsPlugin(OperationsConfig(settings=settings)).assembly.database is None
    with pytest.raises(ConfigurationError, match="DATABASE_URL: ENVIRONMENT=production refuses"):
        OperationsPlugin(OperationsConfig(settings=settings, tasks=[ship]))


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("INFO", "log"),
        ("info", "log"),
        ("Warning", "warn"),
        ("WARN", "warn"),
        ("CRITICAL", "error"),
        ("ERROR", "error"),
        ("Debug", "debug"),
        ("LOG", "log"),
        ("verbose", "verbose"),
    ],
)
def test_log_level_takes_the_words_of_python(text: str, level: str) -> None:
    """In any case."""
    assert read_settings({"LOG_LEVEL": text}, strict=True).log_level == level


@dataclass(frozen=True)
class Meant:
    """The demands of an address, where they are not the default."""

    hosts: tuple[tuple[str, int], ...]
    database: str
    tls: str = "prefer"
    pooler: str = "none"
    pool_max: int = 10
    target: str = "any"
    warned: tuple[str, ...] = ()
    """Parameters without an effect that a warning names."""
    limits: tuple[float, float] = (30.0, 30.0)
    """Seconds to wait for a connection of the pool, and to open one."""
    options: str | None = None


NEON_HOST = "ep-a-1.eu-central-1.aws.neon.tech"
NEON = f"postgresql://me:hunter2@{NEON_HOST}/neondb"
SUPABASE = "aws-0-eu-central-1.pooler.supabase.com"
CLOUD_SQL = "/cloudsql/project:europe-west1:main"
AURORA = tuple(f"{kind}.rds.amazonaws.com" for kind in ("w.cluster-b", "r.cluster-ro-b"))
ACCEPTED = {
    "Neon": (
        f"{NEON}?sslmode=require&channel_binding=require",
        Meant(((NEON_HOST, 5432),), "neondb", "require", warned=("channel_binding",)),
    ),
    "Neon pooler": (
        f"{NEON.replace('ep-a-1', 'ep-a-1-pooler')}?sslmode=require&pgbouncer=true",
        Meant(
            ((NEON_HOST.replace("ep-a-1", "ep-a-1-pooler"), 5432),),
            "neondb",
            "require",
            "transaction",
        ),
    ),
    "Neon endpoint": (
        f"{NEON}?sslmode=require&options=endpoint%3Dep-a-1",
        Meant(((NEON_HOST, 5432),), "neondb", "require", options="endpoint=ep-a-1"),
    ),
    "Vercel": (
        f"{NEON}?sslmode=require&pgbouncer=true&connect_timeout=15",
        Meant(((NEON_HOST, 5432),), "neondb", "require", "transaction", limits=(30.0, 15.0)),
    ),
    "Supabase direct": (
        "postgresql://postgres:hunter2@db.abc.supabase.co:5432/postgres",
        Meant((("db.abc.supabase.co", 5432),), "postgres"),
    ),
    "Supabase pooler": (
        (
            f"postgres://postgres.abc:hunter2@{SUPABASE}:6543/postgres"
            "?sslmode=require&supa=base-pooler.x"
        ),
        Meant(((SUPABASE, 6543),), "postgres", "require"),
    ),
    "Supabase for Prisma": (
        (
            f"postgresql://postgres.abc:hunter2@{SUPABASE}:6543/postgres"
            "?pgbouncer=true&connection_limit=1"
        ),
        Meant(((SUPABASE, 6543),), "postgres", pooler="transaction", pool_max=1),
    ),
    "RDS": (
        (
            "postgresql://admin:hunter2@a.b.eu-west-1.rds.amazonaws.com:5432/app?sslmode=verify-full"
            "&sslrootcert=system"
        ),
        Meant((("a.b.eu-west-1.rds.amazonaws.com", 5432),), "app", "verify-full"),
    ),
    "Aurora": (
        f"postgresql://a:hunter2@{','.join(AURORA)}/app?target_session_attrs=primary",
        Meant(tuple((host, 5432) for host in AURORA), "app", target="primary"),
    ),
    "Azure": (
        "postgres://me%40srv:hunter2@srv.postgres.database.azure.com:5432/app?sslmode=require",
        Meant((("srv.postgres.database.azure.com", 5432),), "app", "require"),
    ),
    "Cloud SQL": (
        f"postgresql://me:hunter2@/app?host={CLOUD_SQL}",
        Meant(((CLOUD_SQL, 5432),), "app"),
    ),
    "Cloud SQL for SQLAlchemy": (
        f"postgresql+psycopg2://me:hunter2@/app?host={CLOUD_SQL}",
        Meant(((CLOUD_SQL, 5432),), "app"),
    ),
    "Heroku": (
        "postgres://u:hunter2@ec2-1-2-3-4.compute-1.amazonaws.com:5432/d8f?sslmode=no-verify",
        Meant((("ec2-1-2-3-4.compute-1.amazonaws.com", 5432),), "d8f", "require"),
    ),
    "Prisma": (
        "postgresql://u:hunter2@db:5432/app?schema=public",
        Meant((("db", 5432),), "app", warned=("schema",)),
    ),
    "Prisma with all": (
        (
            "postgresql://u:hunter2@db:5432/app?schema=myApp&connection_limit=5&pool_timeout=10"
            "&socket_timeout=5&connect_timeout=10&sslaccept=strict&statement_cache_size=0"
        ),
        Meant(
            (("db", 5432),),
            "app",
            "verify-full",
            pool_max=5,
            limits=(10.0, 10.0),
            warned=("schema", "socket_timeout", "statement_cache_size"),
        ),
    ),
    "Aiven": (
        "postgres://avnadmin:hunter2@pg-1.aivencloud.com:12345/defaultdb?sslmode=require",
        Meant((("pg-1.aivencloud.com", 12345),), "defaultdb", "require"),
    ),
    "Railway": (
        "postgresql://postgres:hunter2@postgres.railway.internal:5432/railway",
        Meant((("postgres.railway.internal", 5432),), "railway"),
    ),
    "Render": (
        "postgresql://me:hunter2@dpg-abc-a.frankfurt-postgres.render.com/app",
        Meant((("dpg-abc-a.frankfurt-postgres.render.com", 5432),), "app"),
    ),
    "DigitalOcean": (
        "postgresql://doadmin:hunter2@db-1.b.db.ondigitalocean.com:25060/defaultdb?sslmode=require",
        Meant((("db-1.b.db.ondigitalocean.com", 25060),), "defaultdb", "require"),
    ),
    "Fly": (
        "postgres://app:hunter2@app-db.flycast:5432/app?sslmode=disable",
        Meant((("app-db.flycast", 5432),), "app", "disable"),
    ),
    "Timescale": (
        "postgres://tsdbadmin:hunter2@a.b.tsdb.cloud.timescale.com:30000/tsdb?sslmode=require",
        Meant((("a.b.tsdb.cloud.timescale.com", 30000),), "tsdb", "require"),
    ),
    "Crunchy": (
        "postgres://app:hunter2@p.abc.db.postgresbridge.com:5432/postgres",
        Meant((("p.abc.db.postgresbridge.com", 5432),), "postgres"),
    ),
    "SQLAlchemy": (
        "postgresql+asyncpg://app:hunter2@db/app?ssl=require",
        Meant((("db", 5432),), "app", "require"),
    ),
    "SQLAlchemy hosts": (
        "postgresql+psycopg://app:hunter2@/app?host=a:5432&host=b:5433",
        Meant((("a", 5432), ("b", 5433)), "app", target="read-write"),
    ),
    "Patroni": (
        (
            "postgresql://app:hunter2@a:5432,b:5432,c:5432/app?target_session_attrs=read-write"
            "&keepalives=1&keepalives_idle=30&tcp_user_timeout=10000&load_balance_hosts=random"
        ),
        Meant((("a", 5432), ("b", 5432), ("c", 5432)), "app", target="read-write"),
    ),
    "node-postgres": (
        "postgres://app:hunter2@db/app?sslmode=require&uselibpqcompat=true",
        Meant((("db", 5432),), "app", "require"),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_address_of_a_provider_is_taken_as_it_is_meant(name: str) -> None:
    """As it is handed out, by every program; our tables stay out of the application's schema."""
    url, meant = ACCEPTED[name]
    settings = read_settings({"DATABASE_URL": url}, strict=True)
    address, db = settings.database_address, settings.db

    assert address is not None
    assert meant == Meant(
        hosts=address.hosts,
        database=address.database or "",
        tls=db.tls_mode,
        pooler=db.pooler,
        pool_max=db.pool_max,
        target=address.target_session_attrs,
        warned=tuple(re.split(r"[ =]", line)[1] for line in settings.warnings),
        limits=(db.pool_timeout, db.connection_timeout),
        options=address.options,
    )
    assert (address.password, db.schema) == ("hunter2", "viralfx_ops")
    assert "hunter2" not in f"{address} {address!r} {settings.warnings}"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (
            "postgresql://u:hunter2@a.b.cockroachlabs.cloud:26257/d?sslmode=verify-full",
            "is an address of CockroachDB, which is not supported; use Postgres",
        ),
        (
            "postgresql://u:hunter2@h:26257/d?options=--cluster%3Da-1",
            "options name a cluster of CockroachDB, which is not supported",
        ),
        (
            "postgresql://u:hunter2@h/d?sslidentity=me.p12",
            (
                "sslidentity is not supported; convert the file to PEM, and set DB_TLS_CERT_FILE"
                " and DB_TLS_KEY_FILE"
            ),
        ),
        (
            "jdbc:postgresql://h/d?password=hunter2",
            (
                "is not a Postgres address: expected"
                " postgresql://user:password@host:5432/database; did you mean postgresql://?"
            ),
        ),
        (
            "prisma+postgres://accelerate.prisma-data.net/?api_key=hunter2",
            "is not a Postgres address: expected postgresql://user:password@host:5432/database",
        ),
    ],
)
def test_an_address_of_a_provider_is_refused_by_name(url: str, problem: str) -> None:
    """The reason is named, and no secret."""
    with pytest.raises(ConfigurationError) as refused:
        read_settings({"DATABASE_URL": url}, strict=True)

    assert refused.value.problems == (f"DATABASE_URL: {problem}",)


def test_parameters_of_other_clients_set_variables() -> None:
    """Those of Prisma, and files of TLS."""
    tls = f"sslcert={__file__}&sslkey={__file__}&sslrootcert={__file__}"
    settings = read_settings(
        {"DATABASE_URL": f"postgresql://db/app?pgbouncer=true&connection_limit=1&{tls}"}
    )

    assert settings.db.pooler == "transaction"
    assert (settings.db.pool_min, settings.db.pool_max) == (1, 1)
    assert settings.db.tls_mode == "verify-full"
    assert {settings.db.tls_cert_file, settings.db.tls_key_file} == {__file__}


WARNED = {
    "sslnegotiation=direct": "sslnegotiation has no effect: TLS begins after a request to the"
    " server",
    "krbsrvname=pg": "krbsrvname has no effect: there is no login by Kerberos",
    "schema=public": "schema has no effect: DB_SCHEMA names the schema of the program's tables",
    "connect_timeout=0": "connect_timeout has no effect: there is a limit always,"
    " DB_CONNECTION_TIMEOUT",
    "socket_timeout=5": "socket_timeout has no effect: DB_STATEMENT_TIMEOUT limits statements",
    "statement_cache_size=0": "statement_cache_size has no effect: behind a pooler, set"
    " DB_POOLER=transaction",
    "channel_binding=require": "channel_binding=require has no effect, because the driver cannot"
    " bind the channel; set DB_TLS_MODE=verify-full, which verifies the server instead",
}


@pytest.mark.parametrize("parameter", WARNED)
def test_a_parameter_without_effect_is_named(parameter: str) -> None:
    """In the log at the start, and by doctor."""
    environ = {"DATABASE_URL": f"postgresql://db/app?{parameter}"}

    assert read_settings(environ, strict=True).warnings == (f"DATABASE_URL: {WARNED[parameter]}",)
    assert any(f"DATABASE_URL: {WARNED[parameter]}".startswith(f.found) for f in reviewed(environ))


def test_a_schema_for_prisma_is_no_contradiction() -> None:
    """DB_SCHEMA has the tables of this program, also in the addresses past a pooler."""
    url = "postgresql://db/app?schema=public"
    settings = read_settings(
        {"DATABASE_URL": url, "DATABASE_MIGRATION_URL": url, "DB_SCHEMA": "ops"}, strict=True
    )

    assert settings.db.schema == "ops"
    assert [line.partition(" has no effect")[0] for line in settings.warnings] == [
        "DATABASE_URL: schema",
        "DATABASE_MIGRATION_URL: schema",
    ]


def problems_of(url: str) -> tuple[str, ...]:
    """Return the problems of an address."""
    try:
        read_settings({"DATABASE_URL": url}, strict=True)
    except ConfigurationError as error:
        return error.problems
    return ()


LIBPQ = (
    "service user password passfile channel_binding connect_timeout dbname host hostaddr port"
    " client_encoding options application_name fallback_application_name keepalives keepalives_idle"
    " keepalives_interval keepalives_count tcp_user_timeout sslmode sslnegotiation sslcompression"
    " sslcert sslkey sslcertmode sslpassword sslrootcert sslcrl sslcrldir sslsni requirepeer"
    " require_auth ssl_min_protocol_version ssl_max_protocol_version gssencmode krbsrvname gsslib"
    " gssdelegation replication target_session_attrs load_balance_hosts"
)


@pytest.mark.parametrize("parameter", LIBPQ.split())
def test_every_parameter_of_libpq_is_known(parameter: str) -> None:
    """It is honoured, harmless, warned of, or refused by its name."""
    found = problems_of(f"postgresql://db/app?{parameter}=hunter2")

    named = {parameter, IMPLIED.get(parameter, parameter), "host"}
    assert all(any(name in line for name in named) for line in found)
    assert "unknown" not in str(found)


@pytest.mark.parametrize(
    ("parameters", "versions"),
    [
        ("", None),
        ("ssl_min_protocol_version=TLSv1", ("TLSv1.2", "TLSv1.3")),
        ("ssl_min_protocol_version=tlsv1.3", ("TLSv1.3", "TLSv1.3")),
        ("ssl_max_protocol_version=TLSv1.2", ("TLSv1.2", "TLSv1.2")),
        ("ssl_min_protocol_version=&ssl_max_protocol_version=", None),
    ],
)
def test_versions_of_tls_are_those_of_the_address(
    parameters: str, versions: tuple[str, str] | None
) -> None:
    """TLS 1.2 is the lowest in any case."""
    settings = read_settings({"DATABASE_URL": f"postgresql://db/app?{parameters}"}, strict=True)

    assert settings.database_address is not None
    assert settings.database_address.tls_versions == versions
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        (
            "ssl_max_protocol_version=TLSv1.1",
            "ssl_max_protocol_version is below TLSv1.2, the minimum; raise it",
        ),
        (
            "ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2",
            "ssl_max_protocol_version is below TLSv1.3, the minimum; raise it",
        ),
        (
            "ssl_min_protocol_version=SSLv3",
            "ssl_min_protocol_version is not one of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3",
        ),
        (
            "passfile=/nowhere/hunter2",
            "passfile cannot be read: No such file or directory; correct the path",
        ),
        (
            "service=hunter2&servicefile=/nowhere/hunter2",
            "service: its file cannot be read: No such file or directory; name it by servicefile",
        ),
    ],
)
def test_an_unusable_parameter_of_libpq_is_one_line(parameters: str, problem: str) -> None:
    """With the remedy."""
    assert problems_of(f"postgresql://db/app?{parameters}") == (f"DATABASE_URL: {problem}",)


def test_a_passfile_is_for_its_owner_alone(tmp_path: Path) -> None:
    """As in libpq, which ignores any other."""
    path = tmp_path / "pgpass"
    path.write_text("*:*:*:*:hunter2\n")
    url = f"postgresql://db/app?passfile={path}"
    path.chmod(0o640)
    assert problems_of(url) == (
        (
            "DATABASE_URL: passfile is not a file for its owner alone; run chmod 600, or use"
            " DB_PASSWORD_FILE"
        ),
    )

    path.chmod(0o600)
    address = read_settings({"DATABASE_URL": url}, strict=True).database_address
    assert address is not None
    assert (address.passfile, address.password) == (str(path), None)


SERVICES = """
# of the shop
[shop]
host=db-1,db-2
port=5433
dbname=shop
user=app
  password = hunter2
sslmode=require
connect_timeout=7

[strange]
hunter2
[nested]
service=shop
[refused]
host=db
require_auth=hunter2
[shop]
host=another
"""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return libpq's file of services, where ``PGSERVICEFILE`` names it."""
    path = tmp_path / "services"
    path.write_text(SERVICES)
    monkeypatch.setenv("PGSERVICEFILE", str(path))
    return path


def test_a_service_fills_the_address(services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file that the address, a variable of libpq or the home folder names."""
    settings = read_settings({"DATABASE_URL": "postgresql:///?service=shop"}, strict=True)
    address = settings.database_address

    assert address is not None
    assert (str(address), address.user) == ("db-1:5433,db-2:5433/shop", "app")
    assert (address.password, settings.db.tls_mode) == ("hunter2", "require")
    assert settings.db.connection_timeout == 7.0
    assert "hunter2" not in repr(settings.database_address)
    monkeypatch.delenv("PGSERVICEFILE")
    named = f"postgresql:///?service=shop&servicefile={services}"
    assert read_settings({"DATABASE_URL": named}).database_address == address
    services.rename(services.parent / ".pg_service.conf")
    monkeypatch.setenv("HOME", str(services.parent))
    at_home = read_settings({"DATABASE_URL": "postgresql:///?service=shop"})
    assert at_home.database_address == address


@pytest.mark.usefixtures("services")
def test_an_address_wins_over_its_service() -> None:
    """Each part and each parameter for itself."""
    url = "postgresql://me:own@db:6000/other?service=shop&sslmode=disable"
    settings = read_settings({"DATABASE_URL": url}, strict=True)
    address = settings.database_address

    assert address is not None
    assert (str(address), address.user, address.password) == ("db:6000/other", "me", "own")
    assert (settings.db.tls_mode, settings.db.connection_timeout) == ("disable", 7.0)
    without_port = read_settings({"DATABASE_URL": "postgresql://db?service=shop"}).database_address
    assert str(without_port) == "db:5433/shop"


@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(
    ("service", "problem"),
    [
        ("hunter2", "service: its file has no service of that name; correct the name"),
        ("strange", "service: its file has a line without a known parameter; correct it"),
        ("nested", "service: its file has a line without a known parameter; correct it"),
        (
            "refused",
            (
                "require_auth is not supported; remove it, and verify the server by sslmode="
                "verify-full"
            ),
        ),
    ],
)
def test_a_strange_service_is_one_line(service: str, problem: str) -> None:
    """Without a part of the file, which may hold a password."""
    assert problems_of(f"postgresql:///?service={service}") == (f"DATABASE_URL: {problem}",)


@pytest.mark.parametrize("variable", ["DATABASE_MIGRATION_URL", "DATABASE_LISTEN_URL"])
def test_addresses_past_a_pooler_have_the_same_rules(variable: str) -> None:
    """Their errors name them; TLS settings may be repeated, and others belong into DATABASE_URL."""
    base = {"DATABASE_URL": "postgresql://pooler/app?sslmode=require"}
    with pytest.raises(ConfigurationError, match=f"^{variable}: require_auth is not supported"):
        read_settings({**base, variable: "postgresql://db/app?require_auth=md5"})
    with pytest.raises(ConfigurationError, match=f"contradicts sslmode in {variable}, disable"):
        read_settings({**base, variable: "postgresql://db/app?sslmode=disable"})

    settings = read_settings(
        {**base, variable: "postgresql://db/app?sslmode=require&connection_limit=1"}
    )

    assert settings.warnings == (f"{variable}: connection_limit has no effect; set DB_POOL_MAX",)
    own = settings.database_migration_address or settings.database_listen_address
    assert own is not None
    assert own.host == "db"


@pytest.mark.parametrize(
    ("url", "variables"),
    [
        ("redis://cache", {"HOST": "cache"}),
        ("redis://cache:6380/2", {"HOST": "cache", "PORT": "6380", "DB": "2"}),
        ("redis://:p%40s@cache/", {"HOST": "cache", "PASSWORD": "***"}),
        (
            "rediss://app:hush@[::1]:6380/1?ssl_cert_reqs=none",
            {
                "HOST": "[::1]",
                "PORT": "6380",
                "DB": "1",
                "USERNAME": "app",
                "PASSWORD": "***",
                "TLS_ENABLED": "true",
                "TLS_REJECT_UNAUTHORIZED": "false",
            },
        ),
        ("unix:///run/r.sock?db=1", {"SOCKET": "/run/r.sock", "DB": "1"}),
        (
            "unix://app:hush@/run/r.sock",
            {"SOCKET": "/run/r.sock", "USERNAME": "app", "PASSWORD": "***"},
        ),
        ("redis://cache?password=p&username=u", {"USERNAME": "u", "PASSWORD": "***"}),
        ("redis:///3", {"HOST": "localhost", "DB": "3"}),
    ],
)
def test_a_redis_address_fills_the_variables(url: str, variables: dict[str, str]) -> None:
    """Each part sets its variable."""
    settings = read_settings({"REDIS_URL": url}, strict=True)
    shown = {f.variable: show(f.of(settings)) for f in fields()}

    assert settings.redis.in_use
    for name, text in variables.items():
        assert shown[f"REDIS_{name}"] == text
        assert sources({"REDIS_URL": url})[f"REDIS_{name}"] == "REDIS_URL"


def test_redis_variables_win_over_the_address() -> None:
    """Each for itself; a host or socket of its own excludes the place in the address."""
    environ = {"REDIS_URL": "rediss://u:p@cache:6380/1", "REDIS_DB": "2", "REDIS_USERNAME": "me"}
    redis = read_settings(environ, strict=True).redis
    assert (redis.host, redis.port, redis.db, redis.username) == ("cache", 6380, 2, "me")

    redis = read_settings({"REDIS_URL": "unix:///r.sock", "REDIS_HOST": "b"}, strict=True).redis
    assert (redis.host, redis.socket) == ("b", None)

    settings = read_settings({**environ, "REDIS_TLS_ENABLED": "false"}, strict=True)
    assert not settings.redis.tls_enabled
    assert settings.warnings == (
        (
            "REDIS_TLS_ENABLED=false overrides rediss:// in REDIS_URL: there is no TLS; remove"
            " REDIS_TLS_ENABLED"
        ),
    )


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis+sentinel://a:1,b:2/mymaster", "an address of Sentinels is not supported; set RED"),
        ("redis+cluster://a:1", "Redis Cluster is not supported; name a single server"),
        ("redis://a:1,b:2", "names several hosts; name one, or set REDIS_SENTINELS"),
        ("redis://u:hunter2", "the host or port cannot be parsed; percent-encode"),
        ("redis://u:hunter2/x@cache", "the host cannot be found; percent-encode"),
        ("redis://u:hunter2#@cache", "the host cannot be found; percent-encode"),
        ("redis://u@server:12?hunter2=x@cache", "the host cannot be found; percent-encode"),
        ("redis://cache/hunter2", "the database is not a number; expected redis://"),
        ("redis://cache/99999", "REDIS_DB would not be a whole number from 0 to 10000"),
        ("redis://cache:99999", "REDIS_PORT would not be a whole number from 1 to 65535"),
        ("redis://u:p@cache?protocol=hunter2", "unknown parameter 'protocol'; remove it"),
        ("redis://cache?hunter2=1", "unknown parameter; remove it"),
        ("redis://cache?pasword=hunter2", "unknown parameter 'pasword'; did you mean password?"),
        ("redis://cache?ssl_cert_reqs=hunter2", "ssl_cert_reqs is not none or required"),
        ("unix://hunter2", "names no socket; expected redis://"),
        ("cache:6379", "is not a Redis address; expected redis://"),
    ],
)
def test_an_invalid_redis_address_is_one_line(url: str, problem: str) -> None:
    """Problem and remedy, and nothing that may be a password."""
    with pytest.raises(ConfigurationError) as refused:
        read_settings({"REDIS_URL": url}, strict=True)

    (line,) = refused.value.problems
    assert line.startswith(f"REDIS_URL: {problem}")
    assert "hunter2" not in line
