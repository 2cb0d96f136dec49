"""Redis, standalone or behind Sentinel, with or without TLS; and how to do without it.

* :class:`RedisClient` (config, on_doubt): ``redis`` for requests, ``available``,
  ``get_with_graceful_degradation(operation, fallback)``; opens nothing by itself.
* :class:`RedisHealthCheck` (client, clock), :class:`CloseRedis` (client) and
  :class:`RedisRetryPolicy` are its answers to the three ports.
* :class:`RedisCacheStore` (client) keeps the values of a ``Cache``.
* :func:`trouble` names what an error is about, with ``MESSAGES`` for people;
  :func:`is_away` and :func:`is_transient` decide by it.
"""

from viralfx.adapters.redis.cache import RedisCacheStore
from viralfx.adapters.redis.client import RedisClient
from viralfx.adapters.redis.config import RedisConfig, RedisTls
from viralfx.adapters.redis.errors import MESSAGES, Trouble, is_away, is_transient, trouble
from viralfx.adapters.redis.health import RedisHealthCheck
from viralfx.adapters.redis.retry import RedisRetryPolicy
from viralfx.adapters.redis.shutdown import CloseRedis

__all__ = [
    "MESSAGES",
    "CloseRedis",
    "RedisCacheStore",
    "RedisClient",
    "RedisConfig",
    "RedisHealthCheck",
    "RedisRetryPolicy",
    "RedisTls",
    "Trouble",
    "is_away",
    "is_transient",
    "trouble",
]
