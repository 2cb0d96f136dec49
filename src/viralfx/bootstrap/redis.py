"""Wires the Redis adapter; imported only if the settings name a Redis."""

import ssl
from collections.abc import Callable
from functools import partial

from viralfx.adapters.redis import (
    RedisCacheStore,
    RedisClient,
    RedisHealthCheck,
    close_redis,
)
from viralfx.core.clock import Clock
from viralfx.core.errors import unusable_certificates
from viralfx.core.loops import HomeLoop
from viralfx.domain.cache import CacheStore
from viralfx.domain.operations import CHECK_SHARE, Backend
from viralfx.settings import CredentialsCallable, Settings


def wire_redis(
    settings: Settings,
    clock: Clock,
    on_suspected_outage: Callable[[], None],
    credentials: CredentialsCallable | None = None,
    home: HomeLoop | None = None,
) -> tuple[RedisClient, Backend]:
    """Wire the Redis adapter; nothing is connected before the first request or check.

    ``credentials`` is the application's callable, in place of user and password of the settings.
    ``home`` is the event loop that the connections belong to.
    Raises :class:`ConfigurationError` for unusable certificates.
    """
    redis = settings.redis
    if redis.tls_enabled and redis.tls_ca_file is not None:
        _refuse_unusable(redis.tls_ca_file)
    client = RedisClient(
        redis,
        clock=clock,
        on_suspected_outage=on_suspected_outage,
        credentials=credentials,
        home=home,
    )
    check = RedisHealthCheck(client, clock, timeout=settings.health_check_timeout * CHECK_SHARE)
    return client, Backend(check=check, close=partial(close_redis, client))


def cache_store(client: RedisClient) -> CacheStore:
    """Return the cache store in Redis."""
    return RedisCacheStore(client)


def _refuse_unusable(ca_file: str) -> None:
    # The client reads the file at its first connection, too late to refuse to start.
    try:
        ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise unusable_certificates("REDIS_TLS_CA_FILE", ca_file, error) from None
