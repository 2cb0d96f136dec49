"""Redis through redis-py: standalone or behind Sentinel, with or without TLS.

* :class:`RedisClient`: ``redis`` for requests, ``available``, and
  ``get_with_graceful_degradation(operation, fallback)`` for callers that can do without Redis.
* :class:`RedisHealthCheck`, :func:`close_redis` and :func:`retry_policy` implement the three ports.
* :class:`RedisCacheStore` keeps the values of a ``Cache``.
* :func:`problem_of` maps an error to a code, ``MESSAGES`` has a text for each code;
  :func:`is_unavailable` and :func:`is_transient` classify errors.
"""

from viralfx.adapters.redis.cache import RedisCacheStore
from viralfx.adapters.redis.client import RedisClient, RedisLimits
from viralfx.adapters.redis.errors import (
    MESSAGES,
    RedisProblem,
    is_transient,
    is_unavailable,
    problem_of,
)
from viralfx.adapters.redis.health import RedisHealthCheck
from viralfx.adapters.redis.retry import retry_policy
from viralfx.adapters.redis.shutdown import close_redis

__all__ = [
    "MESSAGES",
    "RedisCacheStore",
    "RedisClient",
    "RedisHealthCheck",
    "RedisLimits",
    "RedisProblem",
    "close_redis",
    "is_transient",
    "is_unavailable",
    "problem_of",
    "retry_policy",
]
