"""Finds settings that were made and do nothing, because of what another one says."""

from collections.abc import Collection, Iterator

from viralfx.domain.diagnosis import Area, Finding, warned
from viralfx.settings.model import Settings

_SENTINEL = (
    "REDIS_SENTINELS",
    "REDIS_SENTINEL_NAME",
    "REDIS_SENTINEL_USERNAME",
    "REDIS_SENTINEL_PASSWORD",
)


def unused_settings(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    """Yield what was set in vain; ``given`` are the variables that were set."""
    yield from _of_database(settings, given)
    yield from _of_redis(settings, given)
    yield from _of_webhooks(settings, given)
    if "STATE_DIR" in given and "DATABASE_URL" in given:
        yield warned(
            Area.STATE,
            "STATE_DIR and DATABASE_URL are both set: state is kept in STATE_DIR, where only this"
            " machine finds it",
            "remove STATE_DIR, and it is kept in the database",
        )
    kept = settings.database_url is not None and settings.redis.in_use
    if settings.allow_memory_adapters and settings.environment == "production" and kept:
        yield warned(
            Area.ENVIRONMENT,
            "ALLOW_MEMORY_ADAPTERS=true has no effect now, and hides it when DATABASE_URL or"
            " REDIS_HOST is lost",
            "remove ALLOW_MEMORY_ADAPTERS",
        )


def _of_database(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    if settings.database_url is None:
        variables = [n for n in given if n.startswith("DB_") or n == "POOL_PROFILE"]
        yield from _in_vain(Area.DATABASE, variables, "DATABASE_URL is not set", "set DATABASE_URL")
        return
    if {"POOL_PROFILE", "DB_POOL_MIN", "DB_POOL_MAX"} <= set(given):
        yield from _in_vain(
            Area.POOL, ["POOL_PROFILE"], "DB_POOL_MIN and DB_POOL_MAX say it", "remove POOL_PROFILE"
        )


def _of_redis(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    redis, area = settings.redis, Area.REDIS
    ours = {name for name in given if name.startswith("REDIS_")}
    if not redis.in_use:
        ours.discard("REDIS_SENTINEL_ENABLED")
        yield from _in_vain(
            area,
            ours,
            "neither REDIS_HOST nor REDIS_SENTINEL_ENABLED=true is set",
            "set REDIS_HOST, or REDIS_SENTINEL_ENABLED=true",
        )
        return
    if redis.sentinel_enabled:
        yield from _in_vain(
            area,
            ours & {"REDIS_HOST", "REDIS_PORT"},
            "the Sentinels say where Redis is",
            "remove it, or REDIS_SENTINEL_ENABLED",
        )
    else:
        yield from _in_vain(
            area,
            ours.intersection(_SENTINEL),
            "REDIS_SENTINEL_ENABLED=false",
            "set REDIS_SENTINEL_ENABLED=true",
        )
    if not redis.tls_enabled:
        yield from _in_vain(
            area,
            ours & {"REDIS_TLS_REJECT_UNAUTHORIZED"},
            "REDIS_TLS_ENABLED=false",
            "set REDIS_TLS_ENABLED=true",
        )
    elif redis.tls_ca_file is not None and not redis.tls_reject_unauthorized:
        yield from _in_vain(
            area,
            ["REDIS_TLS_CA_FILE"],
            "REDIS_TLS_REJECT_UNAUTHORIZED=false verifies nothing",
            "remove REDIS_TLS_REJECT_UNAUTHORIZED",
        )


def _of_webhooks(settings: Settings, given: Collection[str]) -> Iterator[Finding]:
    area, alerts = Area.ENVIRONMENT, settings.alert_webhook_url is not None
    if not settings.webhook.allowed_hosts and not alerts:
        yield from _in_vain(
            area,
            {"WEBHOOK_SECRET", "WEBHOOK_TIMEOUT"}.intersection(given),
            "WEBHOOK_ALLOWED_HOSTS lists no host, so no webhook is sent",
            "set WEBHOOK_ALLOWED_HOSTS",
        )
    elif settings.webhook.allowed_hosts and settings.webhook.secret is None:
        yield from _in_vain(
            area,
            ["WEBHOOK_ALLOWED_HOSTS"],
            "WEBHOOK_SECRET is not set, so no webhook but alerts is sent",
            "set WEBHOOK_SECRET to whsec_ and what `openssl rand -base64 32` prints",
        )


def _in_vain(area: Area, variables: Collection[str], reason: str, remedy: str) -> Iterator[Finding]:
    if variables:
        names = ", ".join(sorted(variables))
        yield warned(area, f"{names} without effect: {reason}", remedy)
