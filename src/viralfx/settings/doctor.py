"""Checks settings before a deployment: valid one by one, but risky or unused together."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from viralfx.core.errors import Problem, suggest
from viralfx.domain.doctor import Area, Finding, failed, finding_of, passed, skipped, warned
from viralfx.settings.dsn import DatabaseAddress
from viralfx.settings.groups import MIN_SECRET_CHARACTERS, milliseconds
from viralfx.settings.loader import fields, given, unknown_names
from viralfx.settings.model import Settings
from viralfx.settings.strength import REMEDY, weaknesses
from viralfx.settings.tokens import place_of

_SENTINEL = (
    "REDIS_SENTINELS",
    "REDIS_SENTINEL_NAME",
    "REDIS_SENTINEL_USERNAME",
    "REDIS_SENTINEL_PASSWORD",
)


def plain_environment(environ: Mapping[str, str], env_prefix: str) -> dict[str, str]:
    """Return an environment in which the prefixed variables have the names that commands read."""
    if not env_prefix:
        return dict(environ)
    names = {f"{each.variable}{end}" for each in fields() for end in ("", "_FILE")}
    kept = {name: value for name, value in environ.items() if name not in names}
    for name in names:
        if (value := environ.get(f"{env_prefix}{name}")) is not None:
            kept[name] = value
    return kept


def unused_settings(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    """Yield a warning for each setting without effect; ``given`` are the variables that are set."""
    yield from _unused_of_database(settings, given)
    yield from _unused_of_redis(settings, given)
    yield from _unused_of_webhooks(settings, given)
    if "STATE_DIR" in given and "DATABASE_URL" in given:
        yield warned(
            Area.STATE,
            "STATE_DIR and DATABASE_URL are both set: state is kept in STATE_DIR, on this machine"
            " only",
            "remove STATE_DIR to keep state in the database",
        )
    kept = settings.database_url is not None
    if settings.allow_memory_adapters and settings.in_production and kept:
        yield warned(
            Area.ENVIRONMENT,
            "ALLOW_MEMORY_ADAPTERS=true has no effect now, but would hide a missing DATABASE_URL",
            "remove ALLOW_MEMORY_ADAPTERS",
        )


def _unused_of_database(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    if settings.database_url is None:
        others = {"POOL_PROFILE", "DATABASE_MIGRATION_URL", "DATABASE_LISTEN_URL"}
        variables = [n for n in given if n.startswith("DB_") or n in others]
        yield from _without_effect(
            Area.DATABASE, variables, "DATABASE_URL is not set", "set DATABASE_URL"
        )
        return
    yield from _without_effect(
        Area.ENVIRONMENT,
        sorted({"JOB_MEMORY_MAX_JOBS"} & set(given)),
        "DATABASE_URL is set",
        "remove JOB_MEMORY_MAX_JOBS",
    )
    if settings.redis.in_use:
        yield from _without_effect(
            Area.DATABASE,
            {"DATABASE_LISTEN_URL"}.intersection(given),
            "Redis carries the notifications of jobs",
            "remove it",
        )
    if settings.db.tls_mode == "disable":
        yield from _without_effect(
            Area.DATABASE,
            {"DB_TLS_CERT_FILE", "DB_TLS_KEY_FILE"}.intersection(given),
            "DB_TLS_MODE=disable",
            "remove it, or set DB_TLS_MODE=verify-full",
        )
    if {"POOL_PROFILE", "DB_POOL_MIN", "DB_POOL_MAX"} <= set(given):
        yield from _without_effect(
            Area.POOL,
            ["POOL_PROFILE"],
            "DB_POOL_MIN and DB_POOL_MAX override it",
            "remove POOL_PROFILE",
        )


def _unused_of_redis(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    redis, area = settings.redis, Area.REDIS
    ours = {name for name in given if name.startswith("REDIS_")}
    if not redis.in_use:
        ours.discard("REDIS_SENTINEL_ENABLED")
        yield from _without_effect(
            area,
            ours,
            "neither REDIS_HOST nor REDIS_SOCKET nor REDIS_SENTINEL_ENABLED=true is set",
            "set REDIS_HOST, REDIS_SOCKET or REDIS_SENTINEL_ENABLED=true",
        )
        return
    if redis.sentinel_enabled:
        yield from _without_effect(
            area,
            ours & {"REDIS_HOST", "REDIS_PORT", "REDIS_SOCKET"},
            "the Sentinels provide the address of Redis",
            "remove it, or REDIS_SENTINEL_ENABLED",
        )
    else:
        yield from _without_effect(
            area,
            ours.intersection(_SENTINEL),
            "REDIS_SENTINEL_ENABLED=false",
            "set REDIS_SENTINEL_ENABLED=true",
        )
    if not redis.tls_enabled:
        yield from _without_effect(
            area,
            ours & {"REDIS_TLS_REJECT_UNAUTHORIZED"},
            "REDIS_TLS_ENABLED=false",
            "set REDIS_TLS_ENABLED=true",
        )
    elif redis.tls_ca_file is not None and not redis.tls_reject_unauthorized:
        yield from _without_effect(
            area,
            ["REDIS_TLS_CA_FILE"],
            "REDIS_TLS_REJECT_UNAUTHORIZED=false verifies nothing",
            "remove REDIS_TLS_REJECT_UNAUTHORIZED",
        )


def _unused_of_webhooks(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    area, alerts = Area.ENVIRONMENT, settings.alert_webhook_url is not None
    if not settings.webhook.allowed_hosts and not alerts:
        yield from _without_effect(
            area,
            {n for n in given if n.startswith("WEBHOOK_")} - {"WEBHOOK_ALLOWED_HOSTS"},
            "WEBHOOK_ALLOWED_HOSTS lists no host, so no webhook is sent",
            "set WEBHOOK_ALLOWED_HOSTS",
        )
    elif settings.webhook.allowed_hosts and not settings.webhook.signs:
        yield from _without_effect(
            area,
            ["WEBHOOK_ALLOWED_HOSTS"],
            "WEBHOOK_SECRET is not set, so no webhook but alerts is sent",
            "set WEBHOOK_SECRET to whsec_ and the output of `openssl rand -base64 32`",
        )


def _without_effect(
    area: Area, variables: Collection[str], reason: str, remedy: str
) -> Iterator[Finding]:
    if variables:
        names = ", ".join(sorted(variables))
        yield warned(area, f"{names} without effect: {reason}", remedy)


MIN_MARGIN_SECONDS = 5.0
"""Recommended time between the forced exit and SIGKILL."""
NAME_SIMILARITY = 0.85
"""Similarity (0 to 1) from which an unknown name counts as a typing error."""
PREFIXES = (
    "DB_",
    "DATABASE_",
    "REDIS_",
    "SHUTDOWN_",
    "HEALTH_",
    "POOL_",
    "JOB_",
    "QUEUE",
    "CONSOLE",
    "AUDIT_",
    "TRUSTED_",
)
"""Beginnings of names that set a group of settings."""


def review(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings on valid settings and on their environment variables."""
    return [
        *_environment(settings, environ),
        *_secrets(settings),
        *_budgets(settings),
        *_database(settings),
        *_redis(settings),
        *unused_settings(settings, given(environ)),
        *_health(settings),
        *_logging(settings),
        skipped(
            Area.MONITORING,
            "alert rules are outside of this process and cannot be checked",
            "set up alerts for /health/ready answering 503 and /health/detailed being degraded",
        ),
    ]


def misspelt(environ: Mapping[str, str], reported: Collection[str] = ()) -> Iterator[Finding]:
    """Yield a warning for each unknown variable that resembles a known one.

    Names in ``reported`` have findings of their own.
    """
    for name, hint in _misspelt_names(environ):
        if name not in reported:
            yield warned(Area.ENVIRONMENT, f"{name} is not a known variable", hint)


def _misspelt_names(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each such name with its hint."""
    known = [one.variable for one in fields()]
    for name in unknown_names(environ):
        plain = name.removesuffix("_FILE")
        if hint := suggest(plain, known, cutoff=NAME_SIMILARITY):
            yield name, hint


def unread(environ: Mapping[str, str], reported: Collection[str] = ()) -> Iterator[Finding]:
    """Yield a warning with all names that begin as the settings do, and that nothing reads.

    Names in ``reported``, and misspelt ones, have findings of their own.
    """
    misspelt_names = {*reported, *(name for name, _ in _misspelt_names(environ))}
    names = [n for n in unknown_names(environ) if n.startswith(PREFIXES)]
    if names := [name for name in names if name not in misspelt_names]:
        yield warned(
            Area.ENVIRONMENT,
            f"no setting reads {', '.join(names)}",
            "ignore this if they are for another program; `viralfx env` lists all settings",
        )


def _environment(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    name = settings.environment
    number = len(given(environ))
    found = f"{number} variables are set, all of them valid"
    if number == 1:
        found = "1 variable is set, and valid"
    yield passed(Area.ENVIRONMENT, f"ENVIRONMENT={name}; {found}")
    yield from misspelt(environ)
    yield from unread(environ)
    for warning in settings.warnings:
        yield finding_of(Problem.of_line(warning), Area.ENVIRONMENT, warned)
    in_memory = [
        *(["the database"] if settings.database_url is None else []),
        *(["the cache"] if not settings.redis.in_use else []),
    ]
    if settings.in_production and in_memory:
        yield warned(
            Area.ENVIRONMENT,
            f"{' and '.join(in_memory)} of production in memory: it is not shared between"
            " instances and ends with the process",
            "set DATABASE_URL and REDIS_HOST"
            if settings.database_url is None
            else "set REDIS_HOST",
        )


def _secrets(settings: Settings) -> Iterator[Finding]:
    if settings.management_token is None:
        yield warned(
            Area.SECRETS,
            "MANAGEMENT_TOKEN is not set: the shutdown is not accessible over HTTP",
            "set MANAGEMENT_TOKEN to a random text, such as `openssl rand -hex 32` prints",
        )
    if settings.allow_open_api and settings.api_token is None:
        yield warned(
            Area.SECRETS,
            "ALLOW_OPEN_API=true: each client of the port may submit, read and cancel jobs",
            "set API_TOKEN, and remove ALLOW_OPEN_API",
        )
    yield from _strength(settings)
    yield from _short_passwords(settings)


def _short_passwords(settings: Settings) -> Iterator[Finding]:
    address, redis = settings.database_address, settings.redis
    passwords = {
        "DATABASE_URL": address and address.password,
        "DB_PASSWORD": settings.db.password and settings.db.password.value,
        "REDIS_PASSWORD": redis.password and redis.password.value,
        "REDIS_SENTINEL_PASSWORD": redis.sentinel_password and redis.sentinel_password.value,
    }
    for variable, password in passwords.items():
        if password and len(password) < MIN_SECRET_CHARACTERS:
            yield warned(
                Area.SECRETS,
                f"{variable} has a password of fewer than {MIN_SECRET_CHARACTERS} characters, which"
                " can be guessed, and log lines may show it",
                "choose a random password, such as `openssl rand -hex 16` prints",
            )


def _strength(settings: Settings) -> Iterator[Finding]:
    tokens = settings.token_book.tokens
    weak = list(weaknesses(tokens))
    for name in (token.principal.name for token in tokens):
        problems = [problem for each, problem in weak if each == name]
        if not problems:
            yield passed(Area.SECRETS, f"{place_of(name)} is set and cannot be guessed soon")
        finding = failed if settings.in_production else warned
        for problem in problems:
            yield finding(Area.SECRETS, f"{place_of(name)} {problem}", REMEDY)


def _budgets(settings: Settings) -> Iterator[Finding]:
    area, budgets = Area.BUDGETS, settings.shutdown_budgets
    total = budgets.readiness_delay + budgets.drain + budgets.state + budgets.connections
    needed = f"the phases need {total:g} s, and the end is forced after {budgets.force:g} s"
    if settings.shutdown_grace_period is None:
        found = f"{needed}; terminationGracePeriodSeconds must be more"
        yield passed(area, f"{found}; set SHUTDOWN_GRACE_PERIOD to have it checked")
    else:
        yield _granted(needed, budgets.force, settings.shutdown_grace_period)
    if settings.in_production and not budgets.readiness_delay:
        yield warned(
            area,
            "SHUTDOWN_READINESS_DELAY=0: connections are refused while load balancers still"
            " send requests",
            "set SHUTDOWN_READINESS_DELAY to the time that they need to react, such as 5000",
        )
    for variable, seconds, loss in (
        ("SHUTDOWN_DRAIN_TIMEOUT", budgets.drain, "requests and jobs in flight are cut"),
        ("SHUTDOWN_STATE_TIMEOUT", budgets.state, "state is rarely saved"),
        ("SHUTDOWN_CONNECTION_TIMEOUT", budgets.connections, "connections are cut"),
    ):
        if not seconds:
            yield warned(area, f"{variable}=0: {loss} at every stop", f"raise {variable}")


def _granted(needed: str, force: float, grace: float) -> Finding:
    if grace - force < MIN_MARGIN_SECONDS:
        return warned(
            Area.BUDGETS,
            f"{needed}, {grace - force:g} s before the process is killed: a busy machine may be"
            " late by that much",
            f"grant {force + MIN_MARGIN_SECONDS:g} s and set SHUTDOWN_GRACE_PERIOD, or lower"
            " SHUTDOWN_FORCE_TIMEOUT",
        )
    return passed(Area.BUDGETS, f"{needed}, of the {grace:g} s that are granted")


def _database(settings: Settings) -> Iterator[Finding]:
    address, db = settings.database_address, settings.db
    if address is None:
        return
    yield from _servers(settings, address)
    yield from _client_key(db.tls_key_file)
    listens = settings.database_listen_url is not None or db.pooler != "transaction"
    if not (listens or settings.redis.in_use):
        yield warned(
            Area.DATABASE,
            "DB_POOLER=transaction: such a pooler delivers no notification of jobs, so workers poll"
            " five times a second",
            "set DATABASE_LISTEN_URL to the address of the server itself, or REDIS_HOST",
        )
    if settings.in_production:
        yield from _unverified_database(address, db.tls_mode, db.tls_ca_file)
        if not db.statement_timeout:
            yield warned(
                Area.DATABASE,
                "DB_STATEMENT_TIMEOUT=0: a statement may hold its connection without limit",
                "set DB_STATEMENT_TIMEOUT",
            )
    if 0 < db.statement_timeout <= db.slow_query_threshold:
        yield warned(
            Area.DATABASE,
            f"DB_SLOW_QUERY_THRESHOLD={milliseconds(db.slow_query_threshold)}: no query lasts so"
            f" long before DB_STATEMENT_TIMEOUT={milliseconds(db.statement_timeout)} cancels it",
            "lower DB_SLOW_QUERY_THRESHOLD",
        )


def _servers(settings: Settings, address: DatabaseAddress) -> Iterator[Finding]:
    target = address.target_session_attrs
    if target in {"read-only", "standby", "prefer-standby"}:
        yield warned(
            Area.DATABASE,
            f"target_session_attrs={target} chooses a server that refuses writes",
            "set it to read-write",
        )
    elif target == "any" and len(address.hosts) > 1:
        yield warned(
            Area.DATABASE,
            "target_session_attrs=any with several hosts: the first that responds is used, also if"
            " it refuses writes",
            "remove it: with several hosts, read-write is the default",
        )
    pooled = settings.db.pooler == "transaction" and settings.database_listen_url is None
    if pooled and not settings.redis.in_use:
        yield warned(
            Area.DATABASE,
            "DB_POOLER=transaction without DATABASE_LISTEN_URL: no notification passes the pooler,"
            " so workers only poll",
            "set DATABASE_LISTEN_URL to the address of Postgres itself",
        )


def _client_key(path: str | None) -> Iterator[Finding]:
    if path is not None and Path(path).stat().st_mode & 0o007:
        yield warned(
            Area.SECRETS,
            f"DB_TLS_KEY_FILE={path} can be read by every user of this machine",
            "remove the permissions of others",
        )


def _unverified_database(
    address: DatabaseAddress, mode: str, ca_file: str | None
) -> Iterator[Finding]:
    if all(is_local(host) for host, _ in address.hosts):
        return
    remedy = "set DB_TLS_MODE=verify-full, and DB_TLS_CA_FILE if you use your own CA"
    if mode in {"disable", "prefer"}:
        how = "in plain text" if mode == "disable" else "in plain text if the server requests it"
        found = f"DB_TLS_MODE={mode}: password and data may cross the network {how}"
        yield warned(Area.DATABASE, found, remedy)
    elif mode == "require" and ca_file is None:
        found = "DB_TLS_MODE=require: encrypted, but the server's certificate is not verified"
        yield warned(Area.DATABASE, found, remedy)


def _redis(settings: Settings) -> Iterator[Finding]:
    redis = settings.redis
    if not redis.in_use or not settings.in_production:
        return
    if redis.tls_enabled and not redis.tls_reject_unauthorized:
        yield warned(
            Area.REDIS,
            "REDIS_TLS_REJECT_UNAUTHORIZED=false: encrypted, but the server's certificate is not"
            " verified",
            "remove it, and set REDIS_TLS_CA_FILE if you use your own CA",
        )
    hosts = [host for host, _ in redis.sentinel_addresses] if redis.sentinel_enabled else []
    if redis.host is not None and not redis.sentinel_enabled:
        hosts = [redis.host]
    if redis.socket is not None and not redis.sentinel_enabled:
        hosts = [redis.socket]
    if all(is_local(host) for host in hosts):
        return
    if not redis.tls_enabled:
        yield warned(
            Area.REDIS,
            "REDIS_TLS_ENABLED=false: password and data cross the network in plain text",
            "set REDIS_TLS_ENABLED=true, and REDIS_TLS_CA_FILE if you use your own CA",
        )
    if redis.password is None:
        yield warned(
            Area.REDIS,
            "REDIS_PASSWORD is not set: every client in the network may read and change all data",
            "give Redis a password, and set REDIS_PASSWORD",
        )


def _health(settings: Settings) -> Iterator[Finding]:
    area = Area.ENDPOINTS
    if settings.health_check_timeout >= settings.health_check_interval:
        yield warned(
            area,
            f"HEALTH_CHECK_TIMEOUT={milliseconds(settings.health_check_timeout)} is not below"
            f" HEALTH_CHECK_INTERVAL={milliseconds(settings.health_check_interval)}: a hanging"
            " check is reported late",
            "lower HEALTH_CHECK_TIMEOUT, or raise HEALTH_CHECK_INTERVAL",
        )
    if "redis" in settings.readiness_requires and not settings.readiness_fail_open_after:
        yield warned(
            area,
            "READINESS_REQUIRES names redis: an outage of Redis takes all instances out of service",
            "remove redis from it, or set READINESS_FAIL_OPEN_AFTER",
        )
    if settings.in_production and "database" not in settings.readiness_requires:
        yield warned(
            area,
            "READINESS_REQUIRES does not name database: instances without a database get requests",
            "set READINESS_REQUIRES=database",
        )


def _logging(settings: Settings) -> Iterator[Finding]:
    area, level, form = Area.LOGGING, settings.log_level, settings.log_format
    remarks: list[Finding] = []
    if settings.in_production:
        if level in {"debug", "verbose"}:
            found = (
                f"LOG_LEVEL={level} costs time and space, and logs more than you need in production"
            )
            remarks.append(warned(area, found, "set LOG_LEVEL=log"))
        if level == "error":
            found = "LOG_LEVEL=error: losses, recoveries and slow queries are not logged"
            remarks.append(warned(area, found, "set LOG_LEVEL=log or warn"))
        if form == "console":
            found = "LOG_FORMAT=console is for people; log collectors cannot parse it"
            remarks.append(warned(area, found, "set LOG_FORMAT=json"))
    yield from remarks or [passed(area, f"LOG_LEVEL={level}, LOG_FORMAT={form}")]


def is_local(host: str) -> bool:
    """Return True if a host is this machine, so that nothing is sent over a network."""
    name = host.strip("[]").lower()
    return name.startswith(("/", "127.")) or name in {"localhost", "::1"}
