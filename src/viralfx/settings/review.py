"""What can be said about settings before anything runs: right one by one, and unwise all the same.

For ``viralfx doctor``. Nothing here keeps the service from starting; that is what
:func:`viralfx.settings.read_settings` refuses.
"""

import difflib
from collections.abc import Iterator, Mapping

from viralfx.domain.diagnosis import Area, Finding, failed, passed, skipped, warned
from viralfx.settings.database_url import DatabaseAddress
from viralfx.settings.environment import given
from viralfx.settings.fields import fields
from viralfx.settings.model import Settings
from viralfx.settings.unused import unused_settings

PRODUCTION = "production"

_LEAST_TOKEN = 16
_LEAST_VARIETY = 6
_LEAST_MARGIN = 5.0
"""Seconds that should be left between the forced end and being killed."""
_CLOSE = 0.85
"""How alike two names are that are probably meant to be one."""


def review(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Look at settings that were read, and at the environment that they were read from."""
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
            "alert rules are not this process's, and cannot be seen from here",
            "have somebody told when /health/ready answers 503, or /health/detailed is degraded",
        ),
    ]


def misspelt(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield variables that nobody reads, and that look like ours with a slip of the finger."""
    known = [one.variable for one in fields()]
    for name in sorted(environ):
        plain = name.removesuffix("_FILE")
        if plain in known or name in known or not environ[name]:
            continue
        for close in difflib.get_close_matches(plain, known, n=1, cutoff=_CLOSE):
            yield warned(Area.ENVIRONMENT, f"{name} is read by nobody", f"did you mean {close}?")


def _environment(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    name = settings.environment
    number = len(given(environ))
    yield passed(
        Area.ENVIRONMENT,
        f"ENVIRONMENT={name}; {number} variables are set, and each can be read",
    )
    yield from misspelt(environ)
    if name != PRODUCTION and name.lower() in {"prod", "production", "live"}:
        yield warned(
            Area.ENVIRONMENT,
            f"ENVIRONMENT={name} is not the word that turns on the rules for production",
            f"set ENVIRONMENT={PRODUCTION}",
        )
    in_memory = [
        *(["the database"] if settings.database_url is None else []),
        *(["the cache"] if not settings.redis.in_use else []),
    ]
    if name == PRODUCTION and in_memory:
        yield warned(
            Area.ENVIRONMENT,
            f"{' and '.join(in_memory)} of production in memory: no two instances share it,"
            " and it ends with the process",
            "set DATABASE_URL and REDIS_HOST, and remove ALLOW_MEMORY_ADAPTERS",
        )


def _secrets(settings: Settings) -> Iterator[Finding]:
    if settings.management_token is None:
        yield warned(
            Area.SECRETS,
            "MANAGEMENT_TOKEN is not set: nobody may see or begin the shutdown over HTTP",
            "set MANAGEMENT_TOKEN to a random text, such as `openssl rand -hex 32` prints",
        )
    tokens = {"MANAGEMENT_TOKEN": settings.management_token, "API_TOKEN": settings.api_token}
    for variable, secret in tokens.items():
        if secret is not None:
            yield _strength(variable, secret.value.strip(), settings.environment)


def _strength(variable: str, token: str, environment: str) -> Finding:
    weakness = None
    if len(token) < _LEAST_TOKEN:
        weakness = f"{variable} has fewer than {_LEAST_TOKEN} characters"
    elif len(set(token)) < _LEAST_VARIETY:
        weakness = f"{variable} repeats a few characters and can be guessed"
    if weakness is None:
        return passed(Area.SECRETS, f"{variable} is set and long enough")
    tell = failed if environment == PRODUCTION else warned
    return tell(Area.SECRETS, weakness, "set it to what `openssl rand -hex 32` prints")


def _budgets(settings: Settings) -> Iterator[Finding]:
    area, budgets = Area.BUDGETS, settings.shutdown_budgets
    total = budgets.readiness_delay + budgets.drain + budgets.state + budgets.connections
    needed = f"the phases need {total:g} s, and the end is forced after {budgets.force:g} s"
    if settings.shutdown_grace_period is None:
        found = f"{needed}; terminationGracePeriodSeconds must be more"
        yield passed(area, f"{found}, which is compared where SHUTDOWN_GRACE_PERIOD tells it")
    else:
        yield _granted(needed, budgets.force, settings.shutdown_grace_period / 1000)
    if settings.environment == PRODUCTION and not budgets.readiness_delay:
        yield warned(
            area,
            "SHUTDOWN_READINESS_DELAY=0: connections are refused while load balancers still"
            " send some",
            "set SHUTDOWN_READINESS_DELAY to the time they need to notice, such as 5000",
        )
    for variable, seconds, loss in (
        ("SHUTDOWN_DRAIN_TIMEOUT", budgets.drain, "requests and jobs under way are cut"),
        ("SHUTDOWN_STATE_TIMEOUT", budgets.state, "state is hardly ever saved"),
        ("SHUTDOWN_CONNECTION_TIMEOUT", budgets.connections, "connections are cut"),
    ):
        if not seconds:
            yield warned(area, f"{variable}=0: {loss} at every stop", f"raise {variable}")


def _granted(needed: str, force: float, grace: float) -> Finding:
    if grace - force < _LEAST_MARGIN:
        return warned(
            Area.BUDGETS,
            f"{needed}, {grace - force:g} s before the process is killed: a busy machine may be"
            " late by as much",
            f"grant {force + _LEAST_MARGIN:g} s and set SHUTDOWN_GRACE_PERIOD, or lower"
            " SHUTDOWN_FORCE_TIMEOUT",
        )
    return passed(Area.BUDGETS, f"{needed}, of the {grace:g} s that are granted")


def _database(settings: Settings) -> Iterator[Finding]:
    address, db = settings.database_address, settings.db
    if address is None:
        return
    if settings.environment == PRODUCTION:
        yield from _unverified_database(address, db.tls_mode, db.tls_ca_file)
        if not db.statement_timeout:
            yield warned(
                Area.DATABASE,
                "DB_STATEMENT_TIMEOUT=0: a statement may run, and hold its connection, for ever",
                "set DB_STATEMENT_TIMEOUT",
            )
    if 0 < db.statement_timeout <= db.slow_query_threshold:
        yield warned(
            Area.DATABASE,
            f"DB_SLOW_QUERY_THRESHOLD={db.slow_query_threshold}: no query lasts so long before"
            f" DB_STATEMENT_TIMEOUT={db.statement_timeout} cancels it",
            "lower DB_SLOW_QUERY_THRESHOLD",
        )


def _unverified_database(
    address: DatabaseAddress, mode: str, ca_file: str | None
) -> Iterator[Finding]:
    if is_local(address.host):
        return
    remedy = "set DB_TLS_MODE=verify-full, and DB_TLS_CA_FILE where the authority is your own"
    if mode in {"disable", "prefer"}:
        how = "in plain text" if mode == "disable" else "in plain text to whoever asks for it"
        found = f"DB_TLS_MODE={mode}: password and data may cross the network {how}"
        yield warned(Area.DATABASE, found, remedy)
    elif mode == "require" and ca_file is None:
        found = "DB_TLS_MODE=require: encrypted, but whoever answers is believed to be the database"
        yield warned(Area.DATABASE, found, remedy)


def _redis(settings: Settings) -> Iterator[Finding]:
    redis = settings.redis
    if not redis.in_use or settings.environment != PRODUCTION:
        return
    if redis.tls_enabled and not redis.tls_reject_unauthorized:
        yield warned(
            Area.REDIS,
            "REDIS_TLS_REJECT_UNAUTHORIZED=false: encrypted, but whoever answers is believed to"
            " be Redis",
            "remove it, and set REDIS_TLS_CA_FILE where the authority is your own",
        )
    hosts = [host for host, _ in redis.sentinel_addresses] if redis.sentinel_enabled else []
    if redis.host is not None and not redis.sentinel_enabled:
        hosts = [redis.host]
    if all(is_local(host) for host in hosts):
        return
    if not redis.tls_enabled:
        yield warned(
            Area.REDIS,
            "REDIS_TLS_ENABLED=false: password and data cross the network in plain text",
            "set REDIS_TLS_ENABLED=true, and REDIS_TLS_CA_FILE where the authority is your own",
        )
    if redis.password is None:
        yield warned(
            Area.REDIS,
            "REDIS_PASSWORD is not set: whoever reaches Redis may read and change everything",
            "give Redis a password, and set REDIS_PASSWORD",
        )


def _health(settings: Settings) -> Iterator[Finding]:
    area = Area.ENDPOINTS
    if settings.health_check_timeout >= settings.health_check_interval:
        yield warned(
            area,
            f"HEALTH_CHECK_TIMEOUT={settings.health_check_timeout} is not below"
            f" HEALTH_CHECK_INTERVAL={settings.health_check_interval}: a check that hangs is told"
            " late",
            "lower HEALTH_CHECK_TIMEOUT, or raise HEALTH_CHECK_INTERVAL",
        )
    if "redis" in settings.readiness_requires and not settings.readiness_fail_open_after:
        yield warned(
            area,
            "READINESS_REQUIRES names redis: without Redis every instance is taken out of service",
            "take redis out of it, or set READINESS_FAIL_OPEN_AFTER",
        )
    if settings.environment == PRODUCTION and "database" not in settings.readiness_requires:
        yield warned(
            area,
            "READINESS_REQUIRES does not name database: instances without it get requests",
            "set READINESS_REQUIRES=database",
        )


def _logging(settings: Settings) -> Iterator[Finding]:
    area, level, form = Area.LOGGING, settings.log_level, settings.log_format
    remarks: list[Finding] = []
    if settings.environment == PRODUCTION:
        if level in {"debug", "verbose"}:
            found = f"LOG_LEVEL={level} costs time and space, and tells more than people need"
            remarks.append(warned(area, found, "set LOG_LEVEL=log"))
        if level == "error":
            found = "LOG_LEVEL=error: losses, recoveries and slow queries are not logged"
            remarks.append(warned(area, found, "set LOG_LEVEL=log or warn"))
        if form == "console":
            found = "LOG_FORMAT=console is for people; what collects logs cannot take it apart"
            remarks.append(warned(area, found, "set LOG_FORMAT=json"))
    yield from remarks or [passed(area, f"LOG_LEVEL={level}, LOG_FORMAT={form}")]


def is_local(host: str) -> bool:
    """Whether a host is this machine itself: nothing is sent over a network then."""
    name = host.strip("[]").lower()
    return name.startswith(("/", "127.")) or name in {"localhost", "::1"}
