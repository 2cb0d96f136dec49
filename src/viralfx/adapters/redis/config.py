"""What the Redis adapter needs to know, in the units the code computes with."""

from dataclasses import dataclass, field

from viralfx.domain.resilience.quantities import (
    require_count,
    require_not_negative,
    require_positive,
)

Address = tuple[str, int]
"""A host and a port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisTls:
    """How TLS is spoken, to the servers and to the sentinels alike.

    ``ca_file`` (PEM) replaces the system's trust. ``verify=False`` takes any certificate: the
    traffic is encrypted, but nobody knows with whom.
    """

    ca_file: str | None = None
    verify: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig:
    """Where Redis is and how long to wait for it. Durations are seconds.

    With ``sentinels``, they say where the primary ``sentinel_name`` is, and ``host`` and ``port``
    are not used. An ACL user needs ``+@connection`` beside the commands of the application: the
    connections introduce themselves, and the health check pings.

    A request has ``1 + retries`` attempts, ``retry_base * 2``, ``* 4``, ``* 8`` ... apart and
    never more than ``retry_cap``: by default 0.5, 1 and 2. Each attempt opens a connection where
    there is none, within ``connect_timeout``, and waits ``socket_timeout`` for each reply. That is
    two seconds, because a cache that is slower is none, and so a frozen server holds a request for
    11.5 s at most; commands that block on purpose need a client of their own. ``sentinel_timeout``
    is for connecting to one sentinel and for its reply, before the next one is asked.

    At most ``pool_size`` requests are under way, those between two attempts included; others wait
    their turn up to ``pool_timeout``, which is more than the 3.5 s that all attempts are apart, so
    that a failover does not exhaust anybody's patience.
    ``degrade_after`` bounds what
    :meth:`~viralfx.adapters.redis.client.RedisClient.get_with_graceful_degradation` waits while
    nobody knows yet that Redis is away.
    """

    host: str = "localhost"
    port: int = 6379
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinels: tuple[Address, ...] = ()
    sentinel_name: str = "mymaster"
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: RedisTls | None = None
    connect_timeout: float = 10.0
    keep_alive: float = 30.0
    """Idle seconds after which the kernel probes whether the other end is still there."""
    socket_timeout: float = 2.0
    retries: int = 3
    retry_base: float = 0.25
    retry_cap: float = 3.0
    sentinel_timeout: float = 1.0
    pool_size: int = 50
    pool_timeout: float = 5.0
    degrade_after: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what could never work; ``ValueError`` and ``TypeError`` name the field."""
        for name in (
            "connect_timeout",
            "keep_alive",
            "socket_timeout",
            "sentinel_timeout",
            "pool_timeout",
            "degrade_after",
        ):
            require_positive(name, getattr(self, name))
        for name in ("retries", "retry_base", "retry_cap", "db"):
            require_not_negative(name, getattr(self, name))
        require_count("pool_size", self.pool_size)
