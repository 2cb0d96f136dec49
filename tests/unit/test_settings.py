"""Settings from the environment: every variable, and everything that can be wrong with one."""

from pathlib import Path

import msgspec
import pytest

from viralfx.domain.errors import ConfigurationError
from viralfx.domain.shutdown import Phase
from viralfx.settings import DatabaseSettings, Secret, Settings, fields, read_settings, show, source

WEBHOOK_SECRET = "whsec_" + "c2Vj" * 8
GIVEN: dict[str, tuple[str, object]] = {
    "HOST": ("127.0.0.1", "127.0.0.1"),
    "PORT": ("8080", 8080),
    "MANAGEMENT_PORT": ("3001", 3001),
    "MANAGEMENT_TOKEN": ("hush", Secret("hush")),
    "API_TOKEN": ("hush", Secret("hush")),
    "ENVIRONMENT": ("staging", "staging"),
    "ALLOW_MEMORY_ADAPTERS": ("true", True),
    "LOG_LEVEL": ("verbose", "verbose"),
    "LOG_FORMAT": ("console", "console"),
    "ACCESS_LOG": ("false", False),
    "HEAP_SNAPSHOT_DIR": ("/var/tmp", "/var/tmp"),  # noqa: S108 - it is only read
    "LOOP_STALL_THRESHOLD": ("250", 250),
    "STATE_DIR": ("/var/lib/viralfx", "/var/lib/viralfx"),
    "QUEUES": ("default, slow", ("default", "slow")),
    "TASK_MODULES": ("orders.tasks, billing", ("orders.tasks", "billing")),
    "ALERT_WEBHOOK_URL": ("https://hooks.example/a", Secret("https://hooks.example/a")),
    "DATABASE_URL": ("postgresql://db/app", Secret("postgresql://db/app")),
    "POOL_PROFILE": ("medium", "medium"),
    "DB_PASSWORD": ("hush", Secret("hush")),
    "DB_TLS_MODE": ("verify-full", "verify-full"),
    "DB_TLS_CA_FILE": (__file__, __file__),
    "DB_POOL_MIN": ("3", 3),
    "DB_POOL_MAX": ("30", 30),
    "DB_POOL_TIMEOUT": ("1500", 1500),
    "DB_CONNECTION_TIMEOUT": ("2500", 2500),
    "DB_STATEMENT_TIMEOUT": ("0", 0),
    "DB_SLOW_QUERY_THRESHOLD": ("250", 250),
    "DB_MAX_RECONNECT_ATTEMPTS": ("7", 7),
    "DB_RECONNECT_DELAY": ("100", 100),
    "REDIS_HOST": ("redis.production.internal", "redis.production.internal"),
    "REDIS_PORT": ("6380", 6380),
    "REDIS_USERNAME": ("app", "app"),
    "REDIS_PASSWORD": ("hush", Secret("hush")),
    "REDIS_DB": ("2", 2),
    "REDIS_SENTINEL_ENABLED": ("true", True),
    "REDIS_SENTINELS": ("10.0.0.1:26379,[::1]:26380", ("10.0.0.1:26379", "[::1]:26380")),
    "REDIS_SENTINEL_NAME": ("viralfx-master", "viralfx-master"),
    "REDIS_SENTINEL_USERNAME": ("watcher", "watcher"),
    "REDIS_SENTINEL_PASSWORD": ("hush", Secret("hush")),
    "REDIS_TLS_ENABLED": ("true", True),
    "REDIS_TLS_REJECT_UNAUTHORIZED": ("false", False),
    "REDIS_TLS_CA_FILE": (__file__, __file__),
    "JOB_CONCURRENCY": ("4", 4),
    "JOB_TIMEOUT": ("60000", 60000),
    "JOB_MAX_ATTEMPTS": ("7", 7),
    "JOB_MAX_CRASHES": ("2", 2),
    "JOB_LEASE": ("20000", 20000),
    "JOB_SWEEP_INTERVAL": ("2000", 2000),
    "JOB_LOOK_INTERVAL": ("500", 500),
    "JOB_RETENTION": ("7776000000", 7_776_000_000),
    "JOB_BACKLOG_WARN": ("0", 0),
    "WEBHOOK_ALLOWED_HOSTS": ("hooks.example,10.0.0.7", ("hooks.example", "10.0.0.7")),
    "WEBHOOK_SECRET": (WEBHOOK_SECRET, Secret(WEBHOOK_SECRET)),
    "WEBHOOK_TIMEOUT": ("3000", 3000),
    "HEALTH_CHECK_INTERVAL": ("100", 100),
    "HEALTH_CHECK_TIMEOUT": ("50", 50),
    "DB_HEALTH_CHECK_INTERVAL": ("200", 200),
    "HEALTH_FAILURE_THRESHOLD": ("3", 3),
    "HEALTH_RECOVERY_THRESHOLD": ("2", 2),
    "HEALTH_CRITICAL": ("database", ("database",)),
    "HEALTH_DETAILS": ("authorized", "authorized"),
    "READINESS_REQUIRES": ("none", ()),
    "READINESS_FAIL_OPEN_AFTER": ("60000", 60000),
    "SHUTDOWN_READINESS_DELAY": ("5000", 5000),
    "SHUTDOWN_DRAIN_TIMEOUT": ("1000", 1000),
    "SHUTDOWN_STATE_TIMEOUT": ("2000", 2000),
    "SHUTDOWN_CONNECTION_TIMEOUT": ("3000", 3000),
    "SHUTDOWN_FORCE_TIMEOUT": ("120000", 120000),
    "SHUTDOWN_GRACE_PERIOD": ("150000", 150000),
    "SHUTDOWN_ON_UNCAUGHT": ("false", False),
}


def problems(**environ: str) -> list[str]:
    """Return what is said about an environment; nothing when it is fine."""
    try:
        read_settings(environ)
    except ConfigurationError as error:
        return list(error.problems)
    return []


def api_problems(**environ: str) -> list[str]:
    """Return what is said about an environment in which the jobs API is served."""
    try:
        read_settings(environ, with_api=True)
    except ConfigurationError as error:
        return list(error.problems)
    return []


# -- what is right ---------------------------------------------------------------------------


def test_defaults_are_the_contracts() -> None:
    """An empty environment is a complete configuration."""
    settings = read_settings({})

    assert Settings() == settings
    assert (settings.host, settings.port, settings.management_port) == ("0.0.0.0", 3000, None)  # noqa: S104
    assert (
        settings.health_check_interval,
        settings.health_check_timeout,
        settings.db.health_check_interval,
    ) == (5000, 2000, 30000)
    assert settings.health_critical == ("database", "memory")
    assert settings.readiness_requires == ("database",)
    assert settings.queues == ("default", "notifications", "analytics")
    assert (
        settings.readiness_fail_open_after,
        settings.shutdown_on_uncaught,
        settings.environment,
    ) == (0, True, "development")


def test_default_budgets_are_the_guides() -> None:
    """Milliseconds of the environment become the domain's seconds."""
    budgets = Settings().shutdown_budgets

    assert [budgets.of(phase) for phase in Phase] == [0.0, 30.0, 5.0, 15.0]
    assert budgets.force == 60.0


def test_every_variable_is_tried_here() -> None:
    """A new setting must be added to this file's table."""
    assert set(GIVEN) == {field.variable for field in fields()}


def test_every_variable_is_read() -> None:
    """Each variable sets its field to the parsed value."""
    settings = read_settings({name: text for name, (text, _) in GIVEN.items()})

    assert {name: value for name, (_, value) in GIVEN.items()} == {
        field.variable: field.of(settings) for field in fields()
    }


@pytest.mark.parametrize("name", GIVEN)
def test_every_variable_can_come_from_a_file(name: str, tmp_path: Path) -> None:
    """``NAME_FILE`` reads the value from a file, without the line end that editors add."""
    text, value = GIVEN[name]
    (tmp_path / "value").write_text(f"{text}\n")
    environ = {f"{name}_FILE": str(tmp_path / "value")}
    for needed in {"MANAGEMENT_TOKEN", "REDIS_SENTINELS", "REDIS_TLS_ENABLED"} - {name}:
        environ[needed] = GIVEN[needed][0]
    (field,) = (field for field in fields() if field.variable == name)

    assert value == field.of(read_settings(environ))
    assert source(name, environ) == f"file {tmp_path}/value"


def test_shown_value_is_read_as_the_same() -> None:
    """What ``viralfx env`` prints can be set again, secrets apart."""
    settings = read_settings({name: text for name, (text, _) in GIVEN.items()})
    shown = {field.variable: show(field.of(settings)) for field in fields()}
    shown |= {name: text for name, (text, value) in GIVEN.items() if isinstance(value, Secret)}

    assert settings == read_settings(shown)


def test_every_field_has_a_meaning() -> None:
    """No variable is listed without a word about it."""
    assert [field.variable for field in fields() if not field.meaning] == []


@pytest.mark.parametrize("name", GIVEN)
def test_empty_variable_is_not_set(name: str) -> None:
    """An empty variable, as compose files leave them, means the default."""
    assert Settings() == read_settings({name: ""})


def test_empty_file_is_not_set(tmp_path: Path) -> None:
    """An empty secret file means the default."""
    (tmp_path / "token").write_text("\n")

    assert Settings() == read_settings({"MANAGEMENT_TOKEN_FILE": str(tmp_path / "token")})


def test_secret_keeps_its_blanks(tmp_path: Path) -> None:
    """Only line ends are taken off a secret's file; the rest is the secret."""
    (tmp_path / "token").write_text(" hush \r\n")
    settings = read_settings({"MANAGEMENT_TOKEN_FILE": str(tmp_path / "token")})

    assert Secret(" hush ") == settings.management_token


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1"])
def test_true_is_spelled_in_any_case(text: str) -> None:
    """Truth values are the usual words."""
    assert read_settings({"ALLOW_MEMORY_ADAPTERS": text}).allow_memory_adapters


def test_blanks_around_a_value_do_not_matter() -> None:
    """Blanks around numbers, words and names are ignored."""
    settings = read_settings({"PORT": " 80 ", "LOG_LEVEL": " warn", "QUEUES": " a ,b, "})

    assert (settings.port, settings.log_level, settings.queues) == (80, "warn", ("a", "b"))


def test_foreign_variables_are_nobodys_business() -> None:
    """Only variables with a prefix of ours are looked at."""
    assert problems(PATH="/bin", HOSTNAME="pod", PYTHONPATH=".", PORTAL="x", HEALTHY="1") == []


# -- what is wrong with one value ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("PORT", "http", "a whole number from 0 to 65535"),
        ("PORT", "65536", "a whole number from 0 to 65535"),
        ("PORT", "-1", "a whole number from 0 to 65535"),
        ("PORT", "80.5", "a whole number from 0 to 65535"),
        ("PORT", "8_0", "a whole number from 0 to 65535"),
        ("PORT", "٣٠٠٠", "a whole number from 0 to 65535"),
        ("PORT", "  ", "a whole number from 0 to 65535"),
        ("MANAGEMENT_PORT", "x", "a whole number from 0 to 65535"),
        ("HEALTH_CHECK_INTERVAL", "5s", "a whole number "),
        ("HEALTH_CHECK_INTERVAL", "0", "a whole number "),
        ("HEALTH_CHECK_TIMEOUT", "nan", "a whole number "),
        ("SHUTDOWN_DRAIN_TIMEOUT", "-1", "a whole number "),
        ("SHUTDOWN_FORCE_TIMEOUT", "inf", "a whole number "),
        ("HEALTH_FAILURE_THRESHOLD", "0", "a whole number "),
        ("LOG_LEVEL", "INFO", "one of debug, error, log, verbose, warn"),
        ("LOG_FORMAT", "xml", "one of console, json"),
        ("HEALTH_DETAILS", "never", "one of always, authorized"),
        ("SHUTDOWN_ON_UNCAUGHT", "yes", "true or false"),
        ("QUEUES", ",", "a list of names like one,two"),
        ("QUEUES", "Default", "a list of names like one,two"),
        ("READINESS_REQUIRES", "data base", "a list of names like one,two, or none"),
        ("ENVIRONMENT", "   ", "a text that is not empty"),
    ],
)
def test_malformed_value_is_named_with_what_is_allowed(name: str, text: str, allowed: str) -> None:
    """One line: the variable, the text and what it may be."""
    (line,) = problems(**{name: text})

    assert line.startswith(f"{name}: {text!r} is not {allowed}")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SHUTDOWN_DRAIN_TIMOUT", "SHUTDOWN_DRAIN_TIMEOUT"),
        ("HEALTH_CHECK_INTERVALL", "HEALTH_CHECK_INTERVAL"),
        ("DB_HEALTHCHECK_INTERVAL", "DB_HEALTH_CHECK_INTERVAL"),
        ("QUEUE", "QUEUES"),
        ("HEALTH_CRITICL_FILE", "HEALTH_CRITICAL"),
    ],
)
def test_unknown_variable_with_our_prefix_gets_a_suggestion(name: str, suggestion: str) -> None:
    """A typing error does not silently leave the default in force."""
    assert [f"{name}: unknown variable; did you mean {suggestion}?"] == problems(**{name: "1"})


@pytest.mark.parametrize("name", ["POOL_XYZZY", "JOB_XYZZY", "QUEUE_XYZZY"])
def test_unknown_variable_like_no_other_points_to_the_list(name: str) -> None:
    """Where nothing is close, the command that lists all variables is named."""
    assert [f"{name}: unknown variable; `viralfx env` lists what is known"] == problems(
        **{name: "1"}
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_SERVICE_HOST", "10.0.0.11"),
        ("REDIS_MASTER_SERVICE_HOST", "10.0.0.11"),
        ("REDIS_SERVICE_PORT", "6379"),
        ("DB_SERVICE_PORT_POSTGRES", "5432"),
        ("REDIS_PORT", "tcp://10.0.0.11:6379"),
        ("REDIS_PORT", "udp://10.0.0.11:6379"),
        ("QUEUE_PORT_6379_TCP", "tcp://10.0.0.11:6379"),
        ("QUEUE_PORT_6379_TCP_PROTO", "tcp"),
        ("QUEUE_PORT_6379_TCP_PORT", "6379"),
        ("QUEUE_PORT_6379_TCP_ADDR", "10.0.0.11"),
        ("HEALTH_PORT_53_UDP_ADDR", "10.0.0.11"),
        ("MANAGEMENT_PORT", "tcp://10.0.0.11:80"),
    ],
)
def test_kubernetes_service_links_are_ignored(name: str, value: str) -> None:
    """A Service that happens to be called like a prefix of ours breaks nothing."""
    assert problems(**{name: value}) == []
    assert Settings() == read_settings({name: value})


def test_value_that_only_resembles_a_service_link_is_read() -> None:
    """A port that is no injected address is read like any other."""
    assert problems(REDIS_PORT="tcp:6379") == [
        "REDIS_PORT: 'tcp:6379' is not a whole number from 1 to 65535"
    ]
    assert read_settings({"REDIS_PORT": "6380"}).redis.port == 6380


# -- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PORT", "MANAGEMENT_TOKEN"])
def test_variable_and_file_together_are_an_error(name: str, tmp_path: Path) -> None:
    """Which of the two would win is not left to guessing."""
    (tmp_path / "value").write_text("1234")

    assert [f"{name}: set either {name} or {name}_FILE, not both"] == problems(
        **{name: "1234", f"{name}_FILE": str(tmp_path / "value")}
    )


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is not there is said with its path and the system's reason."""
    path = tmp_path / "missing"

    assert [
        f"MANAGEMENT_TOKEN: cannot read MANAGEMENT_TOKEN_FILE={path}: No such file or directory"
    ] == problems(MANAGEMENT_TOKEN_FILE=str(path))


def test_folder_is_no_file(tmp_path: Path) -> None:
    """A folder in place of a file is said."""
    (line,) = problems(PORT_FILE=str(tmp_path))

    assert line == f"PORT: cannot read PORT_FILE={tmp_path}: Is a directory"


def test_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    """A file that is not UTF-8 is refused without a word of what it holds."""
    path = tmp_path / "token"
    path.write_bytes(b"hush\xff\xfe")

    assert [f"MANAGEMENT_TOKEN: cannot read MANAGEMENT_TOKEN_FILE={path}: not UTF-8 text"] == (
        problems(MANAGEMENT_TOKEN_FILE=str(path))
    )


# -- contradictions and many problems --------------------------------------------------------


def test_budgets_that_do_not_fit_are_refused() -> None:
    """All budgets together may equal the force timeout, not exceed it."""
    (line,) = problems(SHUTDOWN_FORCE_TIMEOUT="49999")

    assert problems(SHUTDOWN_FORCE_TIMEOUT="50000") == []
    assert line.startswith("SHUTDOWN_FORCE_TIMEOUT: the phases need 50 s together (")
    assert line.endswith("; raise it, or lower a budget")


def test_a_grace_period_that_ends_first_is_refused() -> None:
    """What kills must come after what forces the end; not known is not compared."""
    (line,) = problems(SHUTDOWN_GRACE_PERIOD="60000")

    assert problems(SHUTDOWN_GRACE_PERIOD="60001") == []
    assert line == (
        "SHUTDOWN_GRACE_PERIOD: the process is killed after 60 s, before it is forced to end after"
        " 60 s; raise it where it is granted, or lower SHUTDOWN_FORCE_TIMEOUT and its budgets"
    )


def test_one_port_for_both_servers_is_refused() -> None:
    """Two servers cannot listen on one port, but both may take any free one."""
    assert problems(MANAGEMENT_PORT="3000") == [
        "MANAGEMENT_PORT: 3000 is PORT already; choose another"
    ]
    assert problems(PORT="0", MANAGEMENT_PORT="0") == []


def test_authorized_details_need_a_token() -> None:
    """Details that nobody could read are a mistake."""
    assert problems(HEALTH_DETAILS="authorized") == [
        "HEALTH_DETAILS: authorized needs MANAGEMENT_TOKEN to be set"
    ]


def test_production_refuses_memory_unless_told() -> None:
    """In production memory adapters need an explicit word, and the lines say which."""
    url = "postgresql://db/app"
    database, redis = problems(ENVIRONMENT="production")

    assert database.startswith("DATABASE_URL: ENVIRONMENT=production refuses ")
    assert redis.startswith("REDIS_HOST: ENVIRONMENT=production refuses ")
    assert all("ALLOW_MEMORY_ADAPTERS=true" in line for line in (database, redis))
    assert problems(ENVIRONMENT="production", DATABASE_URL=url) == [redis]
    assert problems(ENVIRONMENT="production", REDIS_HOST="redis") == [database]
    assert problems(ENVIRONMENT="production", DATABASE_URL=url, REDIS_HOST="redis") == []
    assert problems(ENVIRONMENT="production", ALLOW_MEMORY_ADAPTERS="true") == []


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """Nobody has to start the service five times to find five mistakes."""
    lines = problems(
        SHUTDOWN_DRAIN_TIMOUT="1",
        PORT="http",
        LOG_LEVEL="loud",
        MANAGEMENT_TOKEN_FILE=str(tmp_path / "missing"),
        ENVIRONMENT="production",
        DATABASE_URL="postgres//user:hunter2@host/db",
    )

    assert {
        "DATABASE_URL",
        "LOG_LEVEL",
        "MANAGEMENT_TOKEN",
        "PORT",
        "REDIS_HOST",
        "SHUTDOWN_DRAIN_TIMOUT",
    } == {line.partition(":")[0] for line in lines}
    assert len(lines) == 6
    assert not any("\n" in line for line in lines)
    assert "hunter2" not in str(lines)


def test_error_says_all_problems_in_one_text() -> None:
    """The exception's own text has every problem too."""
    with pytest.raises(ConfigurationError, match=r"PORT: .*; .*LOG_LEVEL: |LOG_LEVEL: .*; PORT"):
        read_settings({"PORT": "x", "LOG_LEVEL": "x"})


# -- jobs and webhooks --------------------------------------------------------------------------


def test_production_asks_for_a_token_where_the_api_is_served() -> None:
    """A worker, or an application of somebody else, has no jobs API to guard."""
    environ = {"ENVIRONMENT": "production", "ALLOW_MEMORY_ADAPTERS": "true"}

    assert problems(**environ) == []
    assert api_problems() == []
    assert api_problems(**environ) == [
        "API_TOKEN: ENVIRONMENT=production refuses a jobs API that is open to everybody; set it"
    ]
    assert api_problems(API_TOKEN="hush", **environ) == []
    assert api_problems(API_TOKEN=" ", **environ) == [
        "API_TOKEN: a secret of nothing but spaces is none; set one, or unset it"
    ]


def test_sweeps_must_not_come_later_than_the_lease() -> None:
    """What a dead worker had would wait for the sweep alone."""
    assert problems(JOB_SWEEP_INTERVAL="2001", JOB_LEASE="2000") == [
        (
            "JOB_SWEEP_INTERVAL: 2001 is more than JOB_LEASE=2000, so jobs of dead workers would be"
            " found late; lower it, or raise JOB_LEASE"
        )
    ]
    assert problems(JOB_SWEEP_INTERVAL="2000", JOB_LEASE="2000") == []


def test_jobs_are_kept_for_longer_than_a_period() -> None:
    """Or for ever."""
    assert problems(JOB_RETENTION="7199999") == [
        (
            "JOB_RETENTION: 7199999 is less than 7200000, so hourly jobs would be forgotten and run"
            " again in the same hour; raise it"
        )
    ]
    assert problems(JOB_RETENTION="7200000") == problems(JOB_RETENTION="0") == []


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("JOB_CONCURRENCY", "0", "a whole number from 1 to 1000"),
        ("JOB_MAX_ATTEMPTS", "0", "a whole number from 1 to 10000"),
        ("JOB_LEASE", "999", "a whole number from 1000 "),
        ("JOB_LOOK_INTERVAL", "60001", "a whole number from 1 to 60000"),
        ("JOB_RETENTION", "-1", "a whole number from 0 "),
        ("TASK_MODULES", "orders/tasks.py", "a list like orders.tasks,billing.tasks, or none"),
        ("TASK_MODULES", "orders.", "a list like orders.tasks,billing.tasks, or none"),
        ("TASK_MODULES", "orders.tasks:ship", "a list like orders.tasks,billing.tasks, or none"),
    ],
)
def test_malformed_job_setting_is_named(name: str, text: str, allowed: str) -> None:
    """One line: the variable, the text and what it may be."""
    (line,) = problems(**{name: text})

    assert line.startswith(f"{name}: {text!r} is not {allowed}")


def test_alerts_need_an_address() -> None:
    """It may hold a secret, so nothing of it is shown."""
    assert problems(ALERT_WEBHOOK_URL="https://hooks.example/hunter2") == []
    for address in ("hooks.example/hunter2", "ftp://a/hunter2", "https://", "https://a:x/hunter2"):
        (line,) = problems(ALERT_WEBHOOK_URL=address)

        assert line.startswith("ALERT_WEBHOOK_URL: the URL")
        assert "hunter2" not in line


def test_a_webhook_host_that_cannot_be_is_refused() -> None:
    """Each is told before the first webhook."""
    first, second = problems(WEBHOOK_ALLOWED_HOSTS="a..b,hooks.example,169.254.0.0/16")

    assert first.startswith("WEBHOOK_ALLOWED_HOSTS: 'a..b' is none of host, host:port,")
    assert second.startswith("WEBHOOK_ALLOWED_HOSTS: '169.254.0.0/16': ")


def test_a_webhook_secret_has_a_form() -> None:
    """As the specification has it; the secret is not shown."""
    (line,) = problems(WEBHOOK_SECRET="hunter2")

    assert line.startswith("WEBHOOK_SECRET: secret 1 is not whsec_ followed by ")
    assert "hunter2" not in line


# -- the database and Redis --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "sizes"), [("small", (2, 10)), ("medium", (5, 20)), ("large", (10, 50))]
)
def test_pool_profile_gives_the_guides_sizes(profile: str, sizes: tuple[int, int]) -> None:
    """Each row of the guide's sizing table, where nothing else is said."""
    environ = {"POOL_PROFILE": profile}
    settings = read_settings(environ)

    assert (settings.db.pool_min, settings.db.pool_max) == sizes
    assert source("DB_POOL_MAX", environ) == "POOL_PROFILE"


def test_explicit_pool_size_wins_over_the_profile() -> None:
    """The profile only speaks for what is not said."""
    settings = read_settings({"POOL_PROFILE": "large", "DB_POOL_MAX": "12"})

    assert (settings.db.pool_min, settings.db.pool_max) == (10, 12)


def test_least_above_most_is_refused() -> None:
    """A pool cannot have a minimum above its maximum."""
    assert problems(DB_POOL_MIN="9", DB_POOL_MAX="5") == [
        "DB_POOL_MIN: 9 is more than DB_POOL_MAX=5; lower it, or raise DB_POOL_MAX"
    ]


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("postgressql://db/app", "did you mean postgresql://?"),
        ("postgres//db/app", "is no Postgres address"),
        ("host=db password=hunter2", "is no Postgres address"),
        ("mysql://db/app", "is no Postgres address"),
        ("postgresql://user:hunter2/x@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user:hunter2?x@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user:hunter2#x@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user:[hunter2@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user:12/hunter2@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://db:hunter2/app", "the host or port cannot be read"),
        ("postgresql://db:99999/app", "the host or port cannot be read"),
        ("postgresql://db:0/app", "port 0"),
        ("postgresql:///app", "names no host"),
        ("postgresql://a,b/app", "names several hosts"),
        ("postgresql://db/app/more", "holds a slash"),
        ("postgresql://db/app?sslmod=require", "'sslmod'; did you mean sslmode?"),
        ("postgresql://db/app?hunter2=x", "unknown parameter; there are sslmode,"),
        ("postgresql://db/app?sslmode", "not name=value pairs"),
        ("postgresql://db/app?sslmode=require&sslmode=disable", "says sslmode twice"),
        ("postgresql://db/app?host=a:1,b", "names several hosts"),
        ("postgresql://a..b/app", "names no possible host"),
        (f"postgresql://{'a' * 64}/app", "names no possible host"),
        ("postgresql://db/app?sslmode=on", "sslmode: 'on' is not one of disable, prefer,"),
        ("postgresql://db/app?connection_limit=0", "connection_limit: '0' is not a whole number"),
    ],
)
def test_wrong_database_url_is_one_line_without_the_secret(url: str, part: str) -> None:
    """What is wrong and what to do, and nothing that may be a password."""
    (line,) = problems(DATABASE_URL=url)

    assert line.startswith("DATABASE_URL: ")
    assert part in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("url", "password"),
    [
        ("postgresql://u:p%40s%3As%2Fw@db/app", "p@s:s/w"),
        ("postgresql://u:p@s:s@db/app", "p@s:s"),
        ("postgres://u:100%25@db/app", "100%"),
        ("postgresql://u@db/app", None),
        ("postgresql://u:@db/app", None),
        ("postgresql://db/app", None),
    ],
)
def test_password_of_a_url_is_decoded(url: str, password: str | None) -> None:
    """Encoded characters are decoded; an @ or : alone is no obstacle."""
    address = read_settings({"DATABASE_URL": url}).database_address

    assert address is not None
    assert (address.host, address.port, address.database) == ("db", 5432, "app")
    assert address.password == password
    assert "p@s" not in repr(address)


def test_parameters_of_a_url_speak_for_variables() -> None:
    """The same settings under the names that other tools use, in their units."""
    environ = {
        "DATABASE_URL": "postgresql://db:5433/app?sslmode=require&connection_limit=7&pool_timeout=3"
        "&connect_timeout=4&statement_timeout=1500&schema=fx&application_name=me"
    }
    settings = read_settings(environ)
    address = settings.database_address

    assert settings.db == DatabaseSettings(
        tls_mode="require",
        pool_max=7,
        pool_timeout=3000,
        connection_timeout=4000,
        statement_timeout=1500,
    )
    assert address is not None
    assert (address.port, address.schema, address.application_name) == (5433, "fx", "me")
    assert source("DB_POOL_MAX", environ) == "DATABASE_URL"


def test_folder_of_a_socket_can_be_the_host() -> None:
    """As libpq has it."""
    for url in ("postgresql:///app?host=/run/pg", "postgresql://u@%2Frun%2Fpg:5433/app"):
        address = read_settings({"DATABASE_URL": url}).database_address

        assert address is not None
        assert address.host == "/run/pg"


@pytest.mark.parametrize(
    ("url", "variable", "value", "line"),
    [
        (
            "postgresql://db/app?sslmode=disable",
            "DB_TLS_MODE",
            "require",
            "DB_TLS_MODE: require contradicts sslmode in DATABASE_URL, disable; keep one",
        ),
        (
            "postgresql://db/app?connection_limit=5",
            "DB_POOL_MAX",
            "10",
            "DB_POOL_MAX: 10 contradicts connection_limit in DATABASE_URL, 5; keep one",
        ),
        (
            "postgresql://u:hunter2@db/app",
            "DB_PASSWORD",
            "hunter3",
            "DB_PASSWORD: DATABASE_URL holds another password; keep one",
        ),
    ],
)
def test_url_and_variables_that_contradict_are_refused(
    url: str, variable: str, value: str, line: str
) -> None:
    """Which of the two would win is not left to guessing; the same twice is no contradiction."""
    assert problems(**{"DATABASE_URL": url, variable: value}) == [line]
    same = {"DB_TLS_MODE": "disable", "DB_POOL_MAX": "5", "DB_PASSWORD": "hunter2"}[variable]
    assert problems(**{"DATABASE_URL": url, variable: same}) == []


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"REDIS_SENTINEL_ENABLED": "true"},
            (
                "REDIS_SENTINELS: REDIS_SENTINEL_ENABLED=true needs addresses, such as"
                " host1:26379,host2:26379"
            ),
        ),
        (
            {"REDIS_SENTINEL_ENABLED": "true", "REDIS_SENTINELS": "one:26379;two:26379"},
            (
                "REDIS_SENTINELS: 'one:26379;two:26379' is not a list like host1:26379,host2:26379,"
                " or none"
            ),
        ),
        (
            {"REDIS_SENTINEL_ENABLED": "true", "REDIS_SENTINELS": "one"},
            "REDIS_SENTINELS: 'one' is not a list like host1:26379,host2:26379, or none",
        ),
        (
            {"REDIS_SENTINEL_ENABLED": "true", "REDIS_SENTINELS": "one:99999"},
            "REDIS_SENTINELS: one:99999 has no port from 1 to 65535",
        ),
        (
            {"REDIS_HOST": "rediss://app:hunter2@cache:6380/0"},
            (
                "REDIS_HOST: that is not the name or address of a host alone; the rest has"
                " variables of its own: REDIS_PORT, REDIS_USERNAME, REDIS_PASSWORD, REDIS_DB,"
                " REDIS_TLS_ENABLED"
            ),
        ),
        (
            {"REDIS_HOST": "cache:6380"},
            (
                "REDIS_HOST: 'cache:6380' is not the name or address of a host alone; the rest has"
                " variables of its own: REDIS_PORT, REDIS_USERNAME, REDIS_PASSWORD, REDIS_DB,"
                " REDIS_TLS_ENABLED"
            ),
        ),
    ],
)
def test_wrong_redis_address_is_one_line(environ: dict[str, str], line: str) -> None:
    """What is wrong and what to do, and nothing that may be a password."""
    assert problems(**environ) == [line]


def test_certificates_mean_verification() -> None:
    """Who names an authority is not connected to anybody else's server, or in plain text."""
    environ = {"DB_TLS_CA_FILE": __file__}

    assert read_settings(environ).db.tls_mode == "verify-full"
    assert source("DB_TLS_MODE", environ) == "DB_TLS_CA_FILE"
    assert read_settings({**environ, "DB_TLS_MODE": "verify-ca"}).db.tls_mode == "verify-ca"
    for mode in ("disable", "prefer"):
        assert problems(DB_TLS_CA_FILE=__file__, DB_TLS_MODE=mode) == [
            f"DB_TLS_CA_FILE: verifies nothing with DB_TLS_MODE={mode}; set it to verify-full"
        ]
    assert problems(REDIS_TLS_CA_FILE=__file__) == [
        "REDIS_TLS_CA_FILE: has no effect without REDIS_TLS_ENABLED=true"
    ]


def test_blank_secret_is_none() -> None:
    """Spaces would be a token that nobody needs to know."""
    assert problems(MANAGEMENT_TOKEN="  ") == [
        "MANAGEMENT_TOKEN: a secret of nothing but spaces is none; set one, or unset it"
    ]


def test_certificates_that_are_not_there_are_named(tmp_path: Path) -> None:
    """Before anything connects."""
    path = tmp_path / "ca.pem"

    files = {"DB_TLS_CA_FILE": str(path), "REDIS_TLS_CA_FILE": str(path)}
    assert problems(**files, REDIS_TLS_ENABLED="true") == [
        f"DB_TLS_CA_FILE: cannot read {path}: No such file or directory",
        f"REDIS_TLS_CA_FILE: cannot read {path}: No such file or directory",
    ]


def test_sentinel_or_a_host_means_redis() -> None:
    """Without either the cache is in memory."""
    assert not read_settings({"REDIS_SENTINELS": "a:1", "REDIS_PORT": "1"}).redis.in_use
    assert read_settings({"REDIS_HOST": "cache"}).redis.in_use
    assert read_settings({"REDIS_HOST": "[::1]"}).redis.address == "::1"
    environ = {"REDIS_SENTINEL_ENABLED": "true", "REDIS_SENTINELS": "[::1]:26379, b:1"}
    assert read_settings(environ).redis.sentinel_addresses == (("::1", 26379), ("b", 1))


# -- secrets ---------------------------------------------------------------------------------


def test_secret_never_shows(tmp_path: Path) -> None:
    """Neither repr, str, format nor ``show`` of settings hold a secret."""
    settings = read_settings({"MANAGEMENT_TOKEN": "hunter2"})
    token = settings.management_token

    assert show(token) == "***"
    for text in (repr(token), str(token), f"{token}", repr(settings), str(settings)):
        assert "hunter2" not in text
    (tmp_path / "token").write_text("hunter2")
    lines = problems(
        MANAGEMENT_TOKEN="hunter2", MANAGEMENT_TOKEN_FILE=str(tmp_path / "token"), PORT="x"
    )
    assert len(lines) == 2
    assert "hunter2" not in str(lines)


def test_unknown_variables_value_is_not_repeated() -> None:
    """A misspelled secret is named without its value."""
    assert "hunter2" not in str(problems(DB_PASSWORT="hunter2", DATABASE_URL="hunter2"))


def test_settings_are_immutable() -> None:
    """What was validated cannot be changed afterwards."""
    with pytest.raises(AttributeError):
        Settings().port = 1  # type: ignore[misc]
    assert msgspec.structs.replace(Settings(), port=1).port == 1


@pytest.mark.parametrize("name", ["SHUTDOWN_FORCE_TIMEOUT", "HEALTH_FAILURE_THRESHOLD", "PORT"])
@pytest.mark.parametrize("text", ["9" * 18, "9" * 400, "1e3", "+5", "\u0663"])
def test_number_beyond_all_use_is_refused(name: str, text: str) -> None:
    """No timer, date or buffer overflows with what is accepted."""
    assert [f"{name}: {text!r} is not a whole number"] == [
        line[: len(f"{name}: {text!r} is not a whole number")] for line in problems(**{name: text})
    ]


def test_contradiction_with_a_value_that_is_wrong_anyway_is_not_told() -> None:
    """Only what was really set can contradict."""
    lines = problems(
        PORT="abc",
        MANAGEMENT_PORT="3000",
        HEALTH_DETAILS="authorized",
        MANAGEMENT_TOKEN_FILE="/nothing/here",
        SHUTDOWN_DRAIN_TIMEOUT="x",
        SHUTDOWN_FORCE_TIMEOUT="1",
    )

    assert [line.partition(":")[0] for line in lines] == [
        "PORT",
        "MANAGEMENT_TOKEN",
        "SHUTDOWN_DRAIN_TIMEOUT",
    ]


def test_source_of_a_value_is_told(tmp_path: Path) -> None:
    """The environment, a file, or the default; a service link is none of them."""
    file = tmp_path / "token"
    file.write_text("hush")
    environ = {
        "PORT": "1",
        "MANAGEMENT_PORT": "tcp://10.0.0.1:80",
        "MANAGEMENT_TOKEN_FILE": str(file),
    }

    assert source("PORT", environ) == "environment"
    assert source("MANAGEMENT_PORT", environ) == "default"
    assert f"file {file}" == source("MANAGEMENT_TOKEN", environ)
