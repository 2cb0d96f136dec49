"""Wires the Redis adapter; imported only where REDIS_HOST or Sentinel is set."""

import ssl
from collections.abc import Callable

from viralfx.adapters.redis import (
    CloseRedis,
    RedisCacheStore,
    RedisClient,
    RedisConfig,
    RedisHealthCheck,
    RedisTls,
)
from viralfx.bootstrap.backend import CHECK_SHARE, Backend, unusable_certificates
from viralfx.domain.cache import CacheStore
from viralfx.domain.clock import Clock
from viralfx.settings import Secret, Settings


def redis_config(settings: Settings) -> RedisConfig:
    """Return how Redis is reached."""
    redis = settings.redis
    tls = RedisTls(ca_file=redis.tls_ca_file, verify=redis.tls_reject_unauthorized)
    return RedisConfig(
        host=redis.address or "localhost",
        port=redis.port,
        db=redis.db,
        username=redis.username,
        password=_revealed(redis.password),
        sentinels=redis.sentinel_addresses if redis.sentinel_enabled else (),
        sentinel_name=redis.sentinel_name,
        sentinel_username=redis.sentinel_username,
        sentinel_password=_revealed(redis.sentinel_password),
        tls=tls if redis.tls_enabled else None,
    )


def wire_redis(
    settings: Settings, clock: Clock, on_doubt: Callable[[], None]
) -> tuple[RedisClient, Backend]:
    """Wire the Redis adapter; nothing is connected before the first request or check.

    Raises :class:`ConfigurationError` for certificates that cannot be used.
    """
    config = redis_config(settings)
    if config.tls is not None and config.tls.ca_file is not None:
        _refuse_unusable(config.tls.ca_file)
    client = RedisClient(config, clock=clock, on_doubt=on_doubt)
    check = RedisHealthCheck(
        client, clock, timeout=settings.health_check_timeout / 1000 * CHECK_SHARE
    )
    return client, Backend(check=check, close=CloseRedis(client))


def cache_store(client: RedisClient) -> CacheStore:
    """Keep cached values in Redis."""
    return RedisCacheStore(client)


def _refuse_unusable(ca_file: str) -> None:
    # The client reads it at its first connection, which is late to be told of a wrong file.
    try:
        ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise unusable_certificates("REDIS_TLS_CA_FILE", ca_file, error) from None


def _revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.value
