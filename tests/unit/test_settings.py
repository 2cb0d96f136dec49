"""Settings from the environment: every variable, and every kind of invalid value."""

import random
import re
import string
import time
from pathlib import Path

import pytest
from msgspec.inspect import FloatType

from viralfx.core.errors import ConfigurationError
from viralfx.settings import (
    DatabaseAddress,
    DatabaseSettings,
    Exposure,
    Field,
    Secret,
    Settings,
    fields,
    read_settings,
    show,
    sources,
)
from viralfx.settings.strength import weakness

WEBHOOK_SECRET = "whsec_" + "c2Vj" * 8
FORMER_SECRET = "whsec_" + "Zm9y" * 8
GIVEN: dict[str, tuple[str, object]] = {
    "HOST": ("127.0.0.1", "127.0.0.1"),
    "PORT": ("8080", 8080),
    "MANAGEMENT_PORT": ("3001", 3001),
    "MANAGEMENT_TOKEN": ("hush", Secret("hush")),
    "CONSOLE": ("management", "management"),
    "CONSOLE_MAX_STREAMS": ("7", 7),
    "RUNBOOK_URL": ("https://docs.example/runbook", "https://docs.example/runbook"),
    "API_TOKEN": ("hush", Secret("hush")),
    "TRUSTED_PROXIES": ("10.0.0.0/24, ::1", ("10.0.0.0/24", "::1")),
    "HTTP_MAX_HEAD_BYTES": ("8192", 8192),
    "HTTP_MAX_HEADERS": ("50", 50),
    "HTTP_HEAD_TIMEOUT": ("5000", 5.0),
    "HTTP_KEEP_ALIVE_TIMEOUT": ("60000", 60.0),
    "HTTP_BODY_TIMEOUT": ("20000", 20.0),
    "HTTP_MAX_WEBSOCKET_BYTES": ("65536", 65536),
    "HTTP_MAX_CONNECTIONS": ("1000", 1000),
    "ENVIRONMENT": ("test", "test"),
    "REVISION": ("9f2c1aa", "9f2c1aa"),
    "TOKENS": ("ann read hush", Secret("ann read hush")),
    "ALLOW_OPEN_API": ("true", True),
    "ALLOW_MEMORY_ADAPTERS": ("true", True),
    "LOG_LEVEL": ("verbose", "verbose"),
    "LOG_FORMAT": ("console", "console"),
    "ACCESS_LOG": ("false", False),
    "AUDIT_RETENTION": ("86400000", 86_400.0),
    "HEAP_SNAPSHOT_DIR": ("/var/tmp", "/var/tmp"),  # noqa: S108 - it is only read
    "LOOP_STALL_THRESHOLD": ("250", 0.25),
    "STATE_DIR": ("/var/lib/viralfx", "/var/lib/viralfx"),
    "QUEUES": ("default, slow", ("default", "slow")),
    "TASK_MODULES": ("orders.tasks, billing", ("orders.tasks", "billing")),
    "ALERT_WEBHOOK_URL": ("https://hooks.example/a", Secret("https://hooks.example/a")),
    "ALERT_WEBHOOK_SECRET": (WEBHOOK_SECRET, Secret(WEBHOOK_SECRET)),
    "DATABASE_URL": ("postgresql://db/app", Secret("postgresql://db/app")),
    "DATABASE_MIGRATION_URL": ("postgresql://db/app", Secret("postgresql://db/app")),
    "DATABASE_LISTEN_URL": ("postgresql://db/app", Secret("postgresql://db/app")),
    "POOL_PROFILE": ("medium", "medium"),
    "DB_PASSWORD": ("hush", Secret("hush")),
    "DB_TLS_MODE": ("verify-full", "verify-full"),
    "DB_TLS_CA_FILE": (__file__, __file__),
    "DB_TLS_CERT_FILE": (__file__, __file__),
    "DB_TLS_KEY_FILE": (__file__, __file__),
    "DB_POOLER": ("transaction", "transaction"),
    "DB_SCHEMA": ("ops", "ops"),
    "DB_MAX_LIFETIME": ("60000", 60.0),
    "DB_POOL_MIN": ("3", 3),
    "DB_POOL_MAX": ("30", 30),
    "DB_POOL_TIMEOUT": ("1500", 1.5),
    "DB_CONNECTION_TIMEOUT": ("2500", 2.5),
    "DB_STATEMENT_TIMEOUT": ("0", 0.0),
    "DB_SLOW_QUERY_THRESHOLD": ("250", 0.25),
    "DB_MAX_RECONNECT_ATTEMPTS": ("7", 7),
    "DB_RECONNECT_DELAY": ("100", 0.1),
    "REDIS_URL": ("redis://cache", Secret("redis://cache")),
    "REDIS_HOST": ("redis.production.internal", "redis.production.internal"),
    "REDIS_PORT": ("6380", 6380),
    "REDIS_SOCKET": ("/run/redis.sock", "/run/redis.sock"),
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
    "JOB_TIMEOUT": ("60000", 60.0),
    "JOB_MAX_ATTEMPTS": ("7", 7),
    "JOB_MAX_CRASHES": ("2", 2),
    "JOB_LEASE": ("20000", 20.0),
    "JOB_SWEEP_INTERVAL": ("2000", 2.0),
    "JOB_POLL_INTERVAL": ("500", 0.5),
    "JOB_UNKNOWN_PATIENCE": ("7200000", 7200.0),
    "JOB_RETENTION": ("7776000000", 7_776_000.0),
    "JOB_RETENTION_FAILED": ("15552000000", 15_552_000.0),
    "JOB_BACKLOG_WARN": ("0", 0.0),
    "JOB_MAX_RESULT_BYTES": ("4096", 4096),
    "JOB_MEMORY_MAX_JOBS": ("5000", 5000),
    "WEBHOOK_ALLOWED_HOSTS": ("hooks.example,10.0.0.7", ("hooks.example", "10.0.0.7")),
    "WEBHOOK_SECRET": (WEBHOOK_SECRET, Secret(WEBHOOK_SECRET)),
    "WEBHOOK_KEYS": (f"a.example={WEBHOOK_SECRET}", Secret(f"a.example={WEBHOOK_SECRET}")),
    "WEBHOOK_SHARED_SECRET": (FORMER_SECRET, Secret(FORMER_SECRET)),
    "WEBHOOK_TIMEOUT": ("3000", 3.0),
    "HEALTH_CHECK_INTERVAL": ("100", 0.1),
    "HEALTH_CHECK_TIMEOUT": ("50", 0.05),
    "DB_HEALTH_CHECK_INTERVAL": ("200", 0.2),
    "HEALTH_FAILURE_THRESHOLD": ("3", 3),
    "HEALTH_RECOVERY_THRESHOLD": ("2", 2),
    "HEALTH_CRITICAL": ("database", ("database",)),
    "HEALTH_DETAILS": ("authorized", "authorized"),
    "READINESS_REQUIRES": ("none", ()),
    "READINESS_FAIL_OPEN_AFTER": ("60000", 60.0),
    "SHUTDOWN_READINESS_DELAY": ("5000", 5.0),
    "SHUTDOWN_DRAIN_TIMEOUT": ("1000", 1.0),
    "SHUTDOWN_STATE_TIMEOUT": ("2000", 2.0),
    "SHUTDOWN_CONNECTION_TIMEOUT": ("3000", 3.0),
    "SHUTDOWN_FORCE_TIMEOUT": ("120000", 120.0),
    "SHUTDOWN_GRACE_PERIOD": ("150000", 150.0),
    "SHUTDOWN_ON_UNCAUGHT": ("false", False),
}


def problems(**environ: str) -> list[str]:
    """Return the problems of an environment; empty if it is valid."""
    try:
        read_settings(environ, strict=True)
    except ConfigurationError as error:
        return list(error.problems)
    return []


def api_problems(**environ: str) -> list[str]:
    """Return the problems of an environment in which the jobs API is served."""
    try:
        read_settings(environ, strict=True, with_api=True)
    except ConfigurationError as error:
        return list(error.problems)
    return []


# -- what is right ---------------------------------------------------------------------------


def test_defaults_are_those_of_the_contract() -> None:
    """An empty environment is a complete configuration."""
    settings = read_settings({})

    assert Settings() == settings
    assert (settings.listen_host, settings.port, settings.management_port) == (
        "127.0.0.1",
        3000,
        None,
    )
    assert (
        settings.health_check_interval,
        settings.health_check_timeout,
        settings.db.health_check_interval,
    ) == (5.0, 2.0, 30.0)
    assert settings.health_critical == ("database", "memory")
    assert settings.readiness_requires == ("database",)
    assert settings.queues == ("default", "notifications", "analytics")
    assert (
        settings.readiness_fail_open_after,
        settings.shutdown_on_uncaught,
        settings.environment,
    ) == (0, True, "development")


def test_every_variable_is_tested_here() -> None:
    """A new setting must be added to the table of this file."""
    assert set(GIVEN) == {field.variable for field in fields()}


def test_every_variable_is_read() -> None:
    """Each variable sets its field to the parsed value."""
    settings = read_settings({name: text for name, (text, _) in GIVEN.items()})

    assert {name: value for name, (_, value) in GIVEN.items()} == {
        field.variable: field.of(settings) for field in fields()
    }


DURATIONS = [field for field in fields() if isinstance(field.type, FloatType)]


@pytest.mark.parametrize("field", DURATIONS, ids=lambda field: field.variable)
def test_a_duration_is_milliseconds_outside_and_seconds_inside(field: Field) -> None:
    """Every millisecond of the range is kept, and its limits are in the variable's unit."""
    low, high = map(int, re.findall("[0-9]+", field.allowed))

    for number in (low, low + 1, 12_345, high - 1, high):
        assert field.parse(str(number)) == number / 1000
        assert show(field.parse(str(number))) == str(number)
    for number in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"from {low} to {high}"):
            field.parse(str(number))


def test_every_time_is_a_duration() -> None:
    """A setting that a name calls a time has the type that the loader converts."""
    ends = ("_TIMEOUT", "_INTERVAL", "_DELAY", "_LEASE", "_PERIOD", "_PATIENCE", "_AFTER", "_WARN")
    times = {
        field.variable
        for field in fields()
        if field.variable.endswith(ends) or "RETENTION" in field.variable
    }

    assert (
        times - {field.variable for field in fields() if isinstance(field.type, FloatType)} == set()
    )


@pytest.mark.parametrize("name", GIVEN)
def test_every_variable_can_come_from_a_file(name: str, tmp_path: Path) -> None:
    """``NAME_FILE`` reads the value from a file, without the line end that editors add."""
    text, value = GIVEN[name]
    (tmp_path / "value").write_text(f"{text}\n")
    environ = {f"{name}_FILE": str(tmp_path / "value")}
    needs = {
        "MANAGEMENT_TOKEN",
        "REDIS_SENTINELS",
        "REDIS_SENTINEL_ENABLED",
        "REDIS_TLS_ENABLED",
        "DB_TLS_CERT_FILE",
        "DB_TLS_KEY_FILE",
    }
    for needed in needs - {name}:
        environ[needed] = GIVEN[needed][0]
    (field,) = (field for field in fields() if field.variable == name)

    assert value == field.of(read_settings(environ))
    assert sources(environ)[name] == f"file {tmp_path}/value"


def test_shown_value_can_be_read_back() -> None:
    """The output of ``viralfx env`` can be set again, except secrets."""
    settings = read_settings({name: text for name, (text, _) in GIVEN.items()})
    shown = {field.variable: show(field.of(settings)) for field in fields()}
    shown |= {name: text for name, (text, value) in GIVEN.items() if isinstance(value, Secret)}

    assert settings == read_settings(shown)


def test_every_field_has_a_meaning() -> None:
    """Each variable has a description."""
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
    """Only line ends are removed from a secret's file."""
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


def test_a_queue_can_have_a_concurrency_of_its_own() -> None:
    """The others have that of all; ``viralfx env`` shows what was set."""
    settings = read_settings({"QUEUES": "default:20, slow", "JOB_CONCURRENCY": "3"})

    assert settings.queues == ("default", "slow")
    assert settings.concurrency_of(settings.queues) == {"default": 20, "slow": 3}
    assert settings.queue_entries == ("default:20", "slow")
    assert Settings(queues=("a:2", "b")).concurrency_of(["a", "b"]) == {"a": 2, "b": 10}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("default:0", "QUEUES: 'default:0' is not a list like default:20,notifications:5"),
        ("default:1001", "QUEUES: 'default:1001' is not a list like default:20,notifications:5"),
        ("default:", "QUEUES: 'default:' is not a list like default:20,notifications:5"),
        ("default:5,default:6", "QUEUES: default is there twice; keep one, such as default:5"),
        ("default,default:6", "QUEUES: default is there twice; keep one, such as default:5"),
    ],
)
def test_an_invalid_concurrency_of_a_queue_is_reported(text: str, problem: str) -> None:
    """With the variable and what to do."""
    assert problems(QUEUES=text) == [problem]


def test_foreign_variables_are_ignored() -> None:
    """Only variables with a known prefix are checked."""
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
        ("LOG_LEVEL", "loud", "one of debug, error, log, verbose, warn"),
        ("LOG_FORMAT", "xml", "one of console, json"),
        ("HEALTH_DETAILS", "never", "one of always, authorized"),
        ("SHUTDOWN_ON_UNCAUGHT", "yes", "true or false"),
        ("QUEUES", ",", "a list like default:20,notifications:5"),
        ("QUEUES", "Default", "a list like default:20,notifications:5"),
        ("READINESS_REQUIRES", "data base", "a list of names like one,two, or none"),
        ("ENVIRONMENT", "   ", "a text that is not empty"),
        ("HTTP_MAX_HEAD_BYTES", "100", "a whole number from 1024 to 16777216"),
        ("HTTP_MAX_CONNECTIONS", "-1", "a whole number from 0 to 1048576"),
        ("HTTP_HEAD_TIMEOUT", "0", "a whole number from 1 to 2147483647"),
    ],
)
def test_invalid_value_is_reported_with_the_allowed_ones(
    name: str, text: str, allowed: str
) -> None:
    """One line: variable, value and allowed values."""
    (line,) = problems(**{name: text})

    assert line.startswith(f"{name}: {text!r} is not {allowed}")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SHUTDOWN_DRAIN_TIMOUT", "SHUTDOWN_DRAIN_TIMEOUT"),
        ("HEALTH_CHECK_INTERVALL", "HEALTH_CHECK_INTERVAL"),
        ("DB_HEALTHCHECK_INTERVAL", "DB_HEALTH_CHECK_INTERVAL"),
        ("HEALTH_CRITICL_FILE", "HEALTH_CRITICAL_FILE"),
        ("DB_PASSWORD_FLE", "DB_PASSWORD_FILE"),
    ],
)
def test_unknown_variable_with_a_known_prefix_gets_a_suggestion(name: str, suggestion: str) -> None:
    """A typing error does not silently leave the default in force."""
    assert [f"{name}: unknown variable; did you mean {suggestion}?"] == problems(**{name: "1"})


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
    """A Service whose name equals a known prefix breaks nothing."""
    assert problems(**{name: value}) == []
    assert Settings() == read_settings({name: value})


def test_value_that_only_resembles_a_service_link_is_read() -> None:
    """A port that is not an injected address is read as usual."""
    assert problems(REDIS_PORT="tcp:6379") == [
        "REDIS_PORT: 'tcp:6379' is not a whole number from 1 to 65535"
    ]
    assert read_settings({"REDIS_PORT": "6380"}).redis.port == 6380


# -- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PORT", "MANAGEMENT_TOKEN"])
def test_variable_and_file_together_are_an_error(name: str, tmp_path: Path) -> None:
    """There is no implicit precedence."""
    (tmp_path / "value").write_text("1234")

    assert [f"{name}: set either {name} or {name}_FILE, not both"] == problems(
        **{name: "1234", f"{name}_FILE": str(tmp_path / "value")}
    )


def test_missing_file_is_named(tmp_path: Path) -> None:
    """The error has its path and the system's reason."""
    path = tmp_path / "missing"

    assert [
        f"MANAGEMENT_TOKEN: cannot read MANAGEMENT_TOKEN_FILE={path}: No such file or directory"
    ] == problems(MANAGEMENT_TOKEN_FILE=str(path))


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    """The error says so."""
    (line,) = problems(PORT_FILE=str(tmp_path))

    assert line == f"PORT: cannot read PORT_FILE={tmp_path}: Is a directory"


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """The error quotes nothing of its content."""
    path = tmp_path / "token"
    path.write_bytes(b"hush\xff\xfe")

    assert [f"MANAGEMENT_TOKEN: cannot read MANAGEMENT_TOKEN_FILE={path}: not UTF-8 text"] == (
        problems(MANAGEMENT_TOKEN_FILE=str(path))
    )


# -- contradictions and many problems --------------------------------------------------------


def test_budgets_that_do_not_fit_are_refused() -> None:
    """The sum of the budgets may equal the force timeout, but not exceed it."""
    (line,) = problems(SHUTDOWN_FORCE_TIMEOUT="49999")

    assert problems(SHUTDOWN_FORCE_TIMEOUT="50000") == []
    assert line.startswith("SHUTDOWN_FORCE_TIMEOUT: the phases need 50 s together (")
    assert line.endswith("; raise it, or lower a budget")


POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}


@pytest.mark.parametrize(
    ("more", "delay"),
    [
        ({}, 3.0),
        ({"SHUTDOWN_READINESS_DELAY": "0"}, 0.0),
        ({"SHUTDOWN_READINESS_DELAY": "5000"}, 5.0),
        ({"SHUTDOWN_FORCE_TIMEOUT": "50300"}, 0.3),
        ({"SHUTDOWN_FORCE_TIMEOUT": "50000"}, 0.0),
        ({"SHUTDOWN_FORCE_TIMEOUT": "20000", "SHUTDOWN_DRAIN_TIMEOUT": "0"}, 0.0),
        ({"SHUTDOWN_FORCE_TIMEOUT": "20001", "SHUTDOWN_DRAIN_TIMEOUT": "0"}, 0.001),
    ],
)
def test_a_pod_has_a_readiness_delay_that_fits(more: dict[str, str], delay: float) -> None:
    """It makes no valid budgets invalid; an explicit delay wins."""
    assert read_settings({**POD, **more}).shutdown_readiness_delay == delay


def test_the_source_of_the_readiness_delay_is_the_variable_of_the_platform() -> None:
    """`viralfx env` shows it; elsewhere there is no delay."""
    assert sources(POD)["SHUTDOWN_READINESS_DELAY"] == "KUBERNETES_SERVICE_HOST"
    assert sources({**POD, "SHUTDOWN_READINESS_DELAY": "7"})["SHUTDOWN_READINESS_DELAY"] == (
        "environment"
    )
    assert read_settings({}).shutdown_readiness_delay == 0.0


def test_a_pod_is_recognised_behind_a_prefix() -> None:
    """The platform's variable has no prefix; problems name the budgets alone."""
    assert read_settings(POD, env_prefix="OPS_").shutdown_readiness_delay == 3.0
    (line,) = problems(**POD, SHUTDOWN_FORCE_TIMEOUT="49999")
    assert "the phases need 50 s together (readiness delay 0," in line


def test_grace_period_before_the_forced_exit_is_refused() -> None:
    """An unknown grace period is not compared."""
    (line,) = problems(SHUTDOWN_GRACE_PERIOD="60000")

    assert problems(SHUTDOWN_GRACE_PERIOD="60001") == []
    assert line == (
        "SHUTDOWN_GRACE_PERIOD: the process is killed after 60 s, before it is forced to end after"
        " 60 s; raise it where it is granted, or lower SHUTDOWN_FORCE_TIMEOUT and its budgets"
    )


def test_same_port_for_both_servers_is_refused() -> None:
    """Except port 0, which means any free one."""
    assert problems(MANAGEMENT_PORT="3000") == [
        "MANAGEMENT_PORT: 3000 is PORT already; choose another"
    ]
    assert problems(PORT="0", MANAGEMENT_PORT="0") == []


def test_the_runbook_has_the_address_of_a_page() -> None:
    """A link must not run a script."""
    assert problems(RUNBOOK_URL="javascript:alert(1)") == [
        "RUNBOOK_URL: 'javascript:alert(1)' is no address of a page; begin with https://"
    ]


def test_authorized_details_need_a_token() -> None:
    """Otherwise no client could read the details."""
    assert problems(HEALTH_DETAILS="authorized") == [
        "HEALTH_DETAILS: authorized needs MANAGEMENT_TOKEN to be set"
    ]


def test_production_refuses_memory_unless_allowed() -> None:
    """Where jobs would be lost; a cache in memory is not refused. The problem names the remedy."""
    url = "postgresql://db/app"
    production = {"ENVIRONMENT": "production", "API_TOKEN": "c0a8e1f59d3b7264"}
    refusal = (
        "DATABASE_URL: ENVIRONMENT=production refuses to keep jobs in memory; set it, or"
        " ALLOW_MEMORY_ADAPTERS=true to accept the loss of all data at every stop"
    )

    assert api_problems(**production) == [refusal]
    assert api_problems(**production, REDIS_HOST="redis") == [refusal]
    assert problems(ENVIRONMENT="production", TASK_MODULES="orders") == [refusal]
    assert problems(ENVIRONMENT="production") == []
    assert api_problems(**production, DATABASE_URL=url) == []
    assert api_problems(**production, ALLOW_MEMORY_ADAPTERS="true") == []


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """One start shows all of them."""
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
        "SHUTDOWN_DRAIN_TIMOUT",
    } == {line.partition(":")[0] for line in lines}
    assert len(lines) == 5
    assert not any("\n" in line for line in lines)
    assert "hunter2" not in str(lines)


def test_error_text_contains_all_problems() -> None:
    """Also the text of the exception."""
    with pytest.raises(ConfigurationError, match=r"PORT: .*; .*LOG_LEVEL: |LOG_LEVEL: .*; PORT"):
        read_settings({"PORT": "x", "LOG_LEVEL": "x"}, strict=True)


# -- jobs and webhooks --------------------------------------------------------------------------


def test_production_needs_a_token_for_the_jobs_api() -> None:
    """A worker, or an application of a user, serves no jobs API."""
    environ = {"ENVIRONMENT": "production", "ALLOW_MEMORY_ADAPTERS": "true"}

    assert problems(**environ) == []
    assert api_problems() == []
    assert api_problems(**environ) == [
        "API_TOKEN: ENVIRONMENT=production refuses a jobs API without a token; set it"
    ]
    assert api_problems(API_TOKEN="c0a8e1f59d3b7264", **environ) == []
    assert api_problems(API_TOKEN=" ", **environ) == [
        "API_TOKEN: consists of spaces only; set a secret, or unset it"
    ]


def test_wrong_tokens_are_problems_of_the_start() -> None:
    """Each line has a problem without the secret; production refuses weak secrets."""
    assert problems(TOKENS="ann raed planted-secret; bob read") == [
        "TOKENS: line 1: the second field is no list of rights; did you mean read?",
        (
            "TOKENS: line 1: has 2 fields; write NAME RIGHTS SECRET, with a second SECRET during a"
            " rotation"
        ),
    ]
    production = {"ENVIRONMENT": "production", "ALLOW_MEMORY_ADAPTERS": "true"}
    assert api_problems(**production, TOKENS="ann read c0a8e1f59d3b7264 hush") == [
        (
            "TOKENS: ENVIRONMENT=production refuses the token of ann, which has fewer than 16"
            " characters; set it to the output of `openssl rand -hex 32`"
        )
    ]
    assert api_problems(**production, TOKENS="ann read c0a8e1f59d3b7264") == []


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("prod", "production"),
        ("Production", "production"),
        ("producton", "production"),
        ("dev", "development"),
        ("DEVELOPMENT", "development"),
        ("developement", "development"),
        ("Test", "test"),
        ("testing", "test"),
    ],
)
def test_a_near_miss_of_a_known_environment_is_an_error(given: str, meant: str) -> None:
    """The line suggests the word. An application only gets a warning, and production."""
    line = (
        f"ENVIRONMENT: {given!r} is not {meant}; did you mean {meant}? Any other word has the rules"
        " of production"
    )

    assert line in problems(ENVIRONMENT=given)
    shared = read_settings({"ENVIRONMENT": given})
    assert shared.warnings == (line,)
    assert shared.in_production


@pytest.mark.parametrize("name", ["staging", "live", "qa", "preview", "local", "text", "rest"])
def test_each_other_environment_is_production(name: str) -> None:
    """Only `development` and `test` open anything by themselves."""
    refused = "API_TOKEN: ENVIRONMENT={} refuses a jobs API without a token; set it"

    assert api_problems(ENVIRONMENT=name, ALLOW_MEMORY_ADAPTERS="true") == [refused.format(name)]
    assert read_settings({"ENVIRONMENT": name}, strict=True).in_production


CLOSED, MACHINE, OPEN = Exposure


@pytest.mark.parametrize(
    ("environ", "host", "details", "management"),
    [
        ({}, "127.0.0.1", MACHINE, OPEN),
        ({"ENVIRONMENT": ""}, "127.0.0.1", MACHINE, OPEN),
        ({"ENVIRONMENT": "test"}, "127.0.0.1", MACHINE, OPEN),
        ({"HOST": "0.0.0.0", "API_TOKEN": "x"}, "0.0.0.0", MACHINE, OPEN),  # noqa: S104
        ({"ENVIRONMENT": "staging"}, "0.0.0.0", CLOSED, OPEN),  # noqa: S104
        ({"ENVIRONMENT": "production", "HOST": "::1"}, "::1", CLOSED, OPEN),
        ({"ENVIRONMENT": "production", "HEALTH_DETAILS": "always"}, "0.0.0.0", OPEN, OPEN),  # noqa: S104
        ({"HEALTH_DETAILS": "always"}, "127.0.0.1", OPEN, OPEN),
        ({"HEALTH_DETAILS": "authorized", "MANAGEMENT_TOKEN": "x"}, "127.0.0.1", CLOSED, CLOSED),
        ({"ENVIRONMENT": "production", "ALLOW_OPEN_API": "true"}, "0.0.0.0", OPEN, OPEN),  # noqa: S104
        ({"ALLOW_OPEN_API": "true"}, "0.0.0.0", OPEN, OPEN),  # noqa: S104
    ],
)
def test_defaults_of_exposure(
    environ: dict[str, str], host: str, details: Exposure, management: Exposure
) -> None:
    """Host and details follow the environment, and ALLOW_OPEN_API opens all at once."""
    settings = read_settings(environ, strict=True)

    assert settings.listen_host == host
    assert settings.details_exposure() is details
    assert settings.details_exposure(on_management_port=True) is management


def test_an_api_without_a_token_stays_on_this_machine() -> None:
    """Beyond loopback it needs a token or ALLOW_OPEN_API, in development too."""

    def found(**fields: object) -> list[str]:
        given = Settings(**fields)  # type: ignore[arg-type]  # a test of several fields
        return [*given.contradictions(with_api=True, listens=True)]

    for host in (None, "127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost"):
        assert found(host=host) == []
    for host in ("0.0.0.0", "::", "10.0.0.7", "example.com", "127.0.0.1.nip.io"):  # noqa: S104
        assert found(host=host) == [
            (
                f"API_TOKEN: HOST={host} serves a jobs API without a token to other machines; set"
                " API_TOKEN, or HOST=127.0.0.1, or ALLOW_OPEN_API=true to accept jobs from all of"
                " them"
            )
        ]
        assert found(host=host, api_token=Secret("x")) == []
        assert found(host=host, allow_open_api=True) == []
    production = {"environment": "production", "allow_memory_adapters": True}
    assert found(**production, allow_open_api=True) == []
    assert len(found(**production)) == 1


_MADE = "consists of words, sequences or repetitions and can be guessed"


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        ("c0a8e1f59d3b7264", None),
        ("c0a8e1f59d3b726", "has fewer than 16 characters"),
        (" c0a8e1f59d3b726 ", "has fewer than 16 characters"),
        ("abcde" * 8, "repeats a few characters and can be guessed"),
        ("kQ4Tz0pLk9vRw2Ym Ab1", "has fewer than 16 characters"),
        ("<management token>", "has fewer than 16 characters"),
        ("<management-token>", "is a placeholder"),
        ("${MANAGEMENT_TOKEN}", "is a placeholder"),
        ("changeme-changeme-changeme", _MADE),
        ("change-this-to-a-long-random-value", _MADE),
        ("correct-horse-battery-staple", _MADE),
        ("CorrectHorseBatteryStaple", _MADE),
        ("p4ssw0rd-p4ssw0rd!", _MADE),
        ("0123456789abcdef", _MADE),
        ("qwertyuiopasdfgh", _MADE),
        ("aaaabbbbccccddddeeeeffff", _MADE),
        ("deadbeefdeadbeefcafe", _MADE),
        ("viralfx-management-token-prod", _MADE),
    ],
)
def test_production_refuses_a_weak_token(token: str, problem: str | None) -> None:
    """For the jobs API if it is served, and for the management endpoints always."""
    environ = {"ENVIRONMENT": "production", "ALLOW_MEMORY_ADAPTERS": "true"}
    remedy = "set it to the output of `openssl rand -hex 32`"
    for name in ("MANAGEMENT_TOKEN", "API_TOKEN"):
        other = {"MANAGEMENT_TOKEN": "", "API_TOKEN": "xq4Tz0pLk9vRw2Ym"} | {name: token}
        refused = [f"{name}: ENVIRONMENT=production refuses a token that {problem}; {remedy}"]
        assert api_problems(**environ, **other) == (refused if problem else [])
        management = problem and name == "MANAGEMENT_TOKEN"
        assert problems(**environ, **other) == (refused if management else [])
        assert api_problems(**other) == []


def test_random_tokens_are_strong() -> None:
    """In each usual form; the seed makes them the same in every run."""
    drawn = random.Random(1)  # noqa: S311 - not for a secret
    forms = {
        "0123456789abcdef": 32,
        string.ascii_letters + string.digits + "-_": 22,
        string.ascii_lowercase + string.digits: 24,
        string.ascii_lowercase: 32,
        string.digits: 32,
    }
    for alphabet, length in forms.items():
        for _ in range(200):
            token = "".join(drawn.choices(alphabet, k=length))
            assert weakness(token) is None, token


def test_the_strength_of_a_huge_token_takes_no_time() -> None:
    """A wrong file may hold anything; the event loop judges it when it is read again."""
    token = random.Random(1).randbytes(1_000_000).hex()  # noqa: S311 - not for a secret
    begun = time.process_time()
    assert weakness(token) is None
    assert weakness("ab" * len(token)) is not None
    assert time.process_time() - begun < 5  # 0.002 s; without the limit over a minute


def test_two_names_have_different_tokens_in_production() -> None:
    """The holder of one would have the rights of the other; one of two values counts, too."""
    environ = {"ENVIRONMENT": "production", "ALLOW_MEMORY_ADAPTERS": "true"}
    tokens = {
        "MANAGEMENT_TOKEN": "c0a8e1f59d3b7264 xq4Tz0pLk9vRw2Ym",
        "API_TOKEN": "xq4Tz0pLk9vRw2Ym",
    }
    remedy = "set it to the output of `openssl rand -hex 32`"
    assert api_problems(**environ, **tokens) == [
        (
            "API_TOKEN: ENVIRONMENT=production refuses a token that is that of MANAGEMENT_TOKEN,"
            f" too; {remedy}"
        )
    ]
    assert api_problems(**tokens) == []
    assert api_problems(
        **environ, TOKENS="ann read xq4Tz0pLk9vRw2Ym; bob read xq4Tz0pLk9vRw2Ym"
    ) == [
        (
            "TOKENS: ENVIRONMENT=production refuses the token of bob, which is that of ann in"
            f" TOKENS, too; {remedy}"
        )
    ]


def test_a_token_has_at_most_two_values() -> None:
    """The new one and the old one, during a rotation."""
    assert problems(MANAGEMENT_TOKEN="one two") == []
    (problem,) = problems(MANAGEMENT_TOKEN="a phrase of words")
    assert problem.startswith("MANAGEMENT_TOKEN: holds 4 tokens, which white space separates; keep")


def test_sweep_interval_must_not_exceed_the_lease() -> None:
    """Otherwise jobs of dead workers would wait for the sweep."""
    assert problems(JOB_SWEEP_INTERVAL="2001", JOB_LEASE="2000") == [
        (
            "JOB_SWEEP_INTERVAL: 2001 is more than JOB_LEASE=2000, so jobs of dead workers would be"
            " found late; lower it, or raise JOB_LEASE"
        )
    ]
    assert problems(JOB_SWEEP_INTERVAL="2000", JOB_LEASE="2000") == []


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("JOB_CONCURRENCY", "0", "a whole number from 1 to 1000"),
        ("JOB_MAX_ATTEMPTS", "0", "a whole number from 1 to 10000"),
        ("JOB_LEASE", "999", "a whole number from 1000 "),
        ("JOB_POLL_INTERVAL", "60001", "a whole number from 1 to 60000"),
        ("JOB_RETENTION", "-1", "a whole number from 0 "),
        ("TASK_MODULES", "orders/tasks.py", "a list like orders.tasks,billing.tasks, or none"),
        ("TASK_MODULES", "orders.", "a list like orders.tasks,billing.tasks, or none"),
        ("TASK_MODULES", "orders.tasks:ship", "a list like orders.tasks,billing.tasks, or none"),
    ],
)
def test_invalid_job_setting_is_reported(name: str, text: str, allowed: str) -> None:
    """One line: variable, value and allowed values."""
    (line,) = problems(**{name: text})

    assert line.startswith(f"{name}: {text!r} is not {allowed}")


def test_alerts_need_a_valid_url() -> None:
    """It may contain a secret, so the error does not quote it."""
    assert problems(ALERT_WEBHOOK_URL="https://hooks.example/hunter2") == []
    for address in ("hooks.example/hunter2", "ftp://a/hunter2", "https://", "https://a:x/hunter2"):
        (line,) = problems(ALERT_WEBHOOK_URL=address)

        assert line.startswith("ALERT_WEBHOOK_URL: the URL")
        assert "hunter2" not in line


def test_invalid_webhook_host_is_refused() -> None:
    """At start-up, before the first webhook."""
    first, second = problems(WEBHOOK_ALLOWED_HOSTS="a..b,hooks.example,169.254.0.0/16")

    assert first.startswith("WEBHOOK_ALLOWED_HOSTS: 'a..b' is not a host, host:port,")
    assert second.startswith("WEBHOOK_ALLOWED_HOSTS: '169.254.0.0/16': ")


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("WEBHOOK_SECRET", "hunter2", "secret 1 is not whsec_ followed by "),
        ("WEBHOOK_SHARED_SECRET", "hunter2", "secret 1 is not whsec_ followed by "),
        ("ALERT_WEBHOOK_SECRET", "hunter2", "secret 1 is not whsec_ followed by "),
        ("WEBHOOK_KEYS", "hunter2", "entry 1 is not RECEIVER=whsec_..., where "),
        ("WEBHOOK_KEYS", "a.example=hunter2", "entry 1 has a key that is not whsec_ followed by "),
    ],
)
def test_signing_keys_have_the_specified_form(variable: str, value: str, problem: str) -> None:
    """The error does not quote them."""
    (line,) = problems(**{variable: value})

    assert line.startswith(f"{variable}: {problem}")
    assert "hunter2" not in line


def test_the_shared_key_of_receivers_derives_no_other_key() -> None:
    """A receiver that knows the secret would know the keys of all receivers."""
    both = f"{WEBHOOK_SECRET},{FORMER_SECRET}"

    assert problems(WEBHOOK_SECRET=both, WEBHOOK_SHARED_SECRET=FORMER_SECRET) == [
        "WEBHOOK_SHARED_SECRET: it is also a part of WEBHOOK_SECRET; make a new secret for that"
    ]
    assert problems(WEBHOOK_SECRET=WEBHOOK_SECRET, WEBHOOK_SHARED_SECRET=FORMER_SECRET) == []
    assert problems(WEBHOOK_SHARED_SECRET=FORMER_SECRET) == []


# -- the database and Redis --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "sizes"), [("small", (2, 10)), ("medium", (5, 20)), ("large", (10, 50))]
)
def test_pool_profile_sets_the_documented_sizes(profile: str, sizes: tuple[int, int]) -> None:
    """Each row of the table in docs/operations.md, unless the sizes are set."""
    environ = {"POOL_PROFILE": profile}
    settings = read_settings(environ)

    assert (settings.db.pool_min, settings.db.pool_max) == sizes
    assert sources(environ)["DB_POOL_MAX"] == "POOL_PROFILE"


def test_explicit_pool_size_wins_over_the_profile() -> None:
    """The profile applies only to sizes that are not set."""
    settings = read_settings({"POOL_PROFILE": "large", "DB_POOL_MAX": "12"})

    assert (settings.db.pool_min, settings.db.pool_max) == (10, 12)


def test_pool_minimum_above_the_maximum_is_refused() -> None:
    """The error names both variables."""
    assert problems(DB_POOL_MIN="9", DB_POOL_MAX="5") == [
        "DB_POOL_MIN: 9 is more than DB_POOL_MAX=5; lower it, or raise DB_POOL_MAX"
    ]


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("postgressql://db/app", "did you mean postgresql://?"),
        ("postgres//db/app", "is not a Postgres address"),
        ("host=db password=hunter2", "is not a Postgres address"),
        ("mysql://db/app", "is not a Postgres address"),
        ("postgresql://user:hunter2/x@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user:hunter2?x@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user:hunter2#x@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user:12/hunter2@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user@server:12/hunter2@db", "put the password into DB_PASSWORD"),
        ("postgresql://user@server:12?a=hunter2@db/app", "put the password into DB_PASSWORD"),
        ("postgresql://user@server:hunter2/app", "the host or port cannot be parsed"),
        ("postgresql://user@server:12?hunter2=x", "unknown parameter; remove it"),
        ("postgresql://host=db password=hunter2", "names no valid host"),
        ("postgresql://db;password=hunter2/app", "names no valid host"),
        ("postgresql://db:hunter2/app", "the host or port cannot be parsed"),
        ("postgresql://db:99999/app", "the host or port cannot be parsed"),
        ("postgresql://db:0/app", "port 0"),
        ("postgresql:///app", "names no host"),
        ("postgresql://a,b:x/app", "the host or port cannot be parsed"),
        ("postgresql://a,/app", "names no host"),
        ("postgresql://[::1]hunter2/app", "the host or port cannot be parsed"),
        ("postgresql://db/app/more", "holds a slash"),
        ("postgresql://db/app%00user%00postgres", "holds the character %00"),
        ("postgresql://app@db/app?application_name=a%00b", "holds the character %00"),
        ("postgresql://db/app?sslmod=require", "'sslmod'; did you mean sslmode?"),
        ("postgresql://db/app?hunter2=x", "unknown parameter; remove it"),
        ("postgresql://u:hunter2@db/app?tenant=x", "unknown parameter 'tenant'; remove it"),
        ("postgresql://u:p@db/app?sslcrl=hunter2", "sslcrl is not supported; remove it"),
        ("postgresql://db/app?require_auth=scram-sha-256", "require_auth is not supported;"),
        ("postgresql://a,b/app?port=1,2,3", "port lists 3 ports for 2 hosts"),
        ("postgresql://a,b/app?hostaddr=::1", "hostaddr lists 1 addresses for 2 hosts"),
        ("postgresql://a/app?hostaddr=hunter2", "hostaddr is not an IP address"),
        ("postgresql://a/app?target_session_attrs=master", "not one of any, read-write,"),
        ("postgresql://a/app?options=hunter2%20-c", "options are not of the form"),
        ("postgresql://a/app?keepalives_idle=hunter2", "keepalives_idle is not a whole number"),
        ("postgresql://a/app?load_balance_hosts=on", "load_balance_hosts is not disable or random"),
        ("postgresql+odbc://u:hunter2@db/app", "names an unknown driver"),
        ("postgresql://db/app?sslmode", "not name=value pairs"),
        ("postgresql://db/app?sslmode=require&sslmode=disable", "sets sslmode twice"),
        ("postgresql://a..b/app", "names no valid host"),
        (f"postgresql://{'a' * 64}/app", "names no valid host"),
        ("postgresql://db/app?sslmode=on", "sslmode: 'on' is not one of disable, prefer,"),
        ("postgresql://db/app?connection_limit=0", "connection_limit: '0' is not a whole number"),
    ],
)
def test_invalid_database_url_is_one_line_without_the_secret(url: str, part: str) -> None:
    """Problem and remedy, and nothing that may be a password."""
    (line,) = problems(DATABASE_URL=url)

    assert line.startswith("DATABASE_URL: ")
    assert part in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("url", "password"),
    [
        ("postgresql://u:p%40s%3As%2Fw@db/app", "p@s:s/w"),
        ("postgresql://u:p@s:s@db/app", "p@s:s"),
        ("postgresql://u:[p@s]@db/app", "[p@s]"),
        ("postgresql://db/app?user=u&password=p@s+%2F", "p@s+/"),
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


def test_parameters_of_a_url_set_variables() -> None:
    """Names and units of other tools are converted."""
    environ = {
        "DATABASE_URL": "postgresql://db:5433/app?sslmode=require&connection_limit=7&pool_timeout=3"
        "&connect_timeout=4&statement_timeout=1500&application_name=me"
    }
    settings = read_settings(environ)
    address = settings.database_address

    assert settings.db == DatabaseSettings(
        tls_mode="require",
        pool_max=7,
        pool_timeout=3.0,
        connection_timeout=4.0,
        statement_timeout=1.5,
    )
    assert address is not None
    assert (address.port, address.application_name) == (5433, "me")
    assert sources(environ)["DB_POOL_MAX"] == "DATABASE_URL"


@pytest.mark.parametrize(
    ("place", "hosts"),
    [
        ("h1:5432,h2:5433/d", (("h1", 5432), ("h2", 5433))),
        ("h1,h2:5433/d", (("h1", 5432), ("h2", 5433))),
        ("u:p@[::1]:5433,[fe80::2]/d", (("::1", 5433), ("fe80::2", 5432))),
        ("/d?host=h1,h2&port=5433", (("h1", 5433), ("h2", 5433))),
        ("/d?host=h1,h2&port=5433,", (("h1", 5433), ("h2", 5432))),
        ("/d?host=h1:5433&host=h2", (("h1", 5433), ("h2", 5432))),
        ("h1/d?hostaddr=::1&port=5433", (("h1", 5433),)),
        ("/d?hostaddr=::1,10.0.0.1&port=5433", (("::1", 5433), ("10.0.0.1", 5433))),
        ("/d?host=/run/a:b,h2", (("/run/a:b", 5432), ("h2", 5432))),
        ("%2Frun%2Fa:5433,h2/d", (("/run/a", 5433), ("h2", 5432))),
    ],
)
def test_an_address_takes_several_hosts(place: str, hosts: tuple[tuple[str, int], ...]) -> None:
    """In every form of libpq and SQLAlchemy."""
    address = read_settings({"DATABASE_URL": f"postgresql://{place}"}).database_address

    assert address is not None
    assert (address.hosts, address.database) == (hosts, "d")


@pytest.mark.parametrize(
    ("place", "addresses"),
    [
        ("db:5433/d?hostaddr=10.0.0.1", {("db", 5433): ("10.0.0.1",)}),
        ("/d?host=a,b&hostaddr=,::1", {("b", 5432): ("::1",)}),
        ("/d?host=a,a&hostaddr=::1,::2", {("a", 5432): ("::1", "::2")}),
        ("db/d", {}),
    ],
)
def test_a_host_may_have_an_address(
    place: str, addresses: dict[tuple[str, int], tuple[str, ...]]
) -> None:
    """The name needs no look-up then, and TLS verifies it; an empty address is looked up."""
    address = read_settings({"DATABASE_URL": f"postgresql://{place}"}).database_address

    assert address is not None
    assert address.host_addresses == addresses


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("postgresql://a/d", "any"),
        ("postgresql://a,b/d", "read-write"),
        ("postgresql://a,b/d?target_session_attrs=any", "any"),
    ],
)
def test_one_of_several_hosts_has_to_accept_writes(url: str, target: str) -> None:
    """Unless the address says otherwise: a standby in front would be of no use."""
    address = read_settings({"DATABASE_URL": url}).database_address

    assert address is not None
    assert address.target_session_attrs == target


def test_parameters_of_the_connection_are_read() -> None:
    """Those that have no variable are fields of the address, in seconds."""
    address = read_settings(
        {
            "DATABASE_URL": "postgresql+psycopg://a,b/d?target_session_attrs=primary"
            "&load_balance_hosts=random&keepalives=0&keepalives_idle=10&keepalives_interval=5"
            "&keepalives_count=3&tcp_user_timeout=1500&user=u&dbname=e"
            "&options=-c%20search_path%3Dapp,public%20--jit%3Doff%20endpoint%3Dep-1"
        }
    ).database_address

    assert address == DatabaseAddress(
        hosts=(("a", 5432), ("b", 5432)),
        target_session_attrs="primary",
        load_balance_hosts=True,
        keepalives=False,
        keepalives_idle=10,
        keepalives_interval=5,
        keepalives_count=3,
        tcp_user_timeout=1.5,
        user="u",
        database="e",
        server_settings={"search_path": "app,public", "jit": "off"},
        options="endpoint=ep-1",
    )


def test_socket_folder_can_be_the_host() -> None:
    """As in libpq."""
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
def test_contradiction_of_url_and_variable_is_refused(
    url: str, variable: str, value: str, line: str
) -> None:
    """Equal values are no contradiction."""
    assert problems(**{"DATABASE_URL": url, variable: value}) == [line]
    values = {"DB_TLS_MODE": "disable", "DB_POOL_MAX": "5"}
    same = (values | {"DB_PASSWORD": "hunter2"})[variable]
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
                "REDIS_HOST: that is not the name or address of a host alone; set the"
                " rest separately: REDIS_PORT, REDIS_USERNAME, REDIS_PASSWORD, REDIS_DB,"
                " REDIS_TLS_ENABLED"
            ),
        ),
        (
            {"REDIS_HOST": "cache:6380"},
            (
                "REDIS_HOST: 'cache:6380' is not the name or address of a host alone; set the"
                " rest separately: REDIS_PORT, REDIS_USERNAME, REDIS_PASSWORD, REDIS_DB,"
                " REDIS_TLS_ENABLED"
            ),
        ),
    ],
)
def test_invalid_redis_address_is_one_line(environ: dict[str, str], line: str) -> None:
    """Problem and remedy, and nothing that may be a password."""
    assert problems(**environ) == [line]


def test_a_redis_socket_is_an_address_of_its_own() -> None:
    """It excludes a host and TLS."""
    assert read_settings({"REDIS_SOCKET": "/run/redis.sock"}).redis.in_use
    assert problems(REDIS_SOCKET="run/redis.sock") == [
        "REDIS_SOCKET: 'run/redis.sock' is not an absolute path"
    ]
    assert problems(REDIS_SOCKET="/a", REDIS_HOST="b", REDIS_TLS_ENABLED="true") == [
        "REDIS_SOCKET: REDIS_HOST is set too; keep one of them",
        "REDIS_SOCKET: a Unix socket has no TLS; unset REDIS_TLS_ENABLED",
    ]
    assert problems(REDIS_SOCKET="/" + "é" * 53) == []
    assert problems(REDIS_SOCKET="/" + "é" * 53 + "a") == [
        "REDIS_SOCKET: the path of a socket has at most 107 bytes"
    ]
    assert problems(DB_SCHEMA="My-Schema") == [
        "DB_SCHEMA: 'My-Schema' is not a name of lower-case letters, digits and underscores"
    ]


def test_ca_file_turns_verification_on() -> None:
    """A connection with a CA file is never unverified or in plain text."""
    environ = {"DB_TLS_CA_FILE": __file__}

    assert read_settings(environ).db.tls_mode == "verify-full"
    assert sources(environ)["DB_TLS_MODE"] == "DB_TLS_CA_FILE"
    assert read_settings({**environ, "DB_TLS_MODE": "verify-ca"}).db.tls_mode == "verify-ca"
    for mode in ("disable", "prefer"):
        assert problems(DB_TLS_CA_FILE=__file__, DB_TLS_MODE=mode) == [
            f"DB_TLS_CA_FILE: has no effect with DB_TLS_MODE={mode}; set it to verify-full"
        ]
    assert problems(REDIS_TLS_CA_FILE=__file__) == [
        "REDIS_TLS_CA_FILE: has no effect without REDIS_TLS_ENABLED=true"
    ]


def test_blank_secret_is_refused() -> None:
    """A token of spaces would protect nothing."""
    assert problems(MANAGEMENT_TOKEN="  ") == [
        "MANAGEMENT_TOKEN: consists of spaces only; set a secret, or unset it"
    ]


def test_missing_ca_file_is_reported(tmp_path: Path) -> None:
    """Before anything connects."""
    path = tmp_path / "ca.pem"

    files = {"DB_TLS_CA_FILE": str(path), "REDIS_TLS_CA_FILE": str(path)}
    assert problems(**files, REDIS_TLS_ENABLED="true") == [
        f"DB_TLS_CA_FILE: cannot read {path}: No such file or directory",
        f"REDIS_TLS_CA_FILE: cannot read {path}: No such file or directory",
    ]


def test_redis_is_used_with_a_host_or_sentinel() -> None:
    """Otherwise the cache is in memory."""
    assert not read_settings({"REDIS_SENTINELS": "a:1", "REDIS_PORT": "1"}).redis.in_use
    assert read_settings({"REDIS_HOST": "cache"}).redis.in_use
    assert read_settings({"REDIS_HOST": "[::1]"}).redis.address == "::1"
    environ = {"REDIS_SENTINEL_ENABLED": "true", "REDIS_SENTINELS": "[::1]:26379, b:1"}
    assert read_settings(environ).redis.sentinel_addresses == (("::1", 26379), ("b", 1))


# -- secrets ---------------------------------------------------------------------------------


def test_secret_is_never_shown(tmp_path: Path) -> None:
    """Not in repr, str, format or ``show`` of settings."""
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
    """The value of a misspelled secret is not quoted."""
    assert "hunter2" not in str(problems(DB_PASSWORT="hunter2", DATABASE_URL="hunter2"))


@pytest.mark.parametrize("name", ["SHUTDOWN_FORCE_TIMEOUT", "HEALTH_FAILURE_THRESHOLD", "PORT"])
@pytest.mark.parametrize("text", ["9" * 18, "9" * 400, "1e3", "+5", "\u0663"])
def test_excessive_number_is_refused(name: str, text: str) -> None:
    """No timer, date or buffer overflows with accepted values."""
    assert [f"{name}: {text!r} is not a whole number"] == [
        line[: len(f"{name}: {text!r} is not a whole number")] for line in problems(**{name: text})
    ]


def test_contradiction_with_an_invalid_value_is_not_reported() -> None:
    """Only valid values are compared."""
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


def test_source_of_a_value_is_reported(tmp_path: Path) -> None:
    """Environment, file or default; a service link is none of them."""
    file = tmp_path / "token"
    file.write_text("hush")
    environ = {
        "PORT": "1",
        "MANAGEMENT_PORT": "tcp://10.0.0.1:80",
        "MANAGEMENT_TOKEN_FILE": str(file),
    }

    assert sources(environ)["PORT"] == "environment"
    assert "MANAGEMENT_PORT" not in sources(environ)
    assert sources(environ)["MANAGEMENT_TOKEN"] == f"file {file}"
