"""What a Redis says about itself, and what follows from it for a service that is to use it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from viralfx.adapters.redis.config import RedisConfig
from viralfx.domain.diagnosis import Area, Finding, failed, passed, warned

OLDEST = (6, 2)
"""The first version that has every command that is used."""

_FULL = 0.9
"""Part of the memory in use from which there is hardly any left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was asked. Memory is in bytes; 0: no limit."""

    product: str
    """The product's name and version, for people."""
    version: tuple[int, ...]
    """The version of Redis that it is compatible with."""
    mode: str = "standalone"
    """Or ``sentinel``, or ``cluster``."""
    replica: bool = False
    replicas: int = 1
    memory: int = 0
    memory_limit: int = 0
    policy: str = "noeviction"
    persistent: bool | None = True
    """None: nobody would tell."""
    saved: bool = True
    """Whether its last attempt to save its data succeeded."""
    clients: int = 1
    clients_limit: int = 10_000


async def ask(redis: Redis) -> Facts:
    """Ask the server; raises what redis-py does."""
    said: Mapping[str, Any] = await redis.info("everything")
    mode = str(said.get("redis_mode") or said.get("server_mode") or "standalone")
    version = str(said.get("redis_version", "0"))
    valkey = said.get("valkey_version")
    return Facts(
        product=f"Valkey {valkey}" if valkey else f"Redis {version}",
        version=tuple(int(part) for part in re.findall(r"\d+", version)[:3]),
        mode=mode,
        replica=said.get("role") == "slave",
        replicas=int(said.get("connected_slaves", 0)),
        memory=int(said.get("used_memory", 0)),
        memory_limit=int(said.get("maxmemory", 0)),
        policy=str(said.get("maxmemory_policy", "noeviction")),
        persistent=True if said.get("aof_enabled") else await _snapshots(redis, mode),
        saved=(said.get("rdb_last_bgsave_status", "ok"), said.get("aof_last_write_status", "ok"))
        == ("ok", "ok"),
        clients=int(said.get("connected_clients", 1)),
        clients_limit=int(said.get("maxclients", 10_000)),
    )


async def _snapshots(redis: Redis, mode: str) -> bool | None:
    if mode == "sentinel":
        return None
    try:
        said: Mapping[Any, Any] = await redis.config_get("save")
    except ResponseError:
        return None  # as of a hosted Redis, or of a user who may not ask
    return any(said.values())


def judge(facts: Facts, config: RedisConfig, address: str) -> Iterator[Finding]:
    """Say what is wrong with the server for this configuration, or that nothing is."""
    area = Area.REDIS
    if facts.mode == "sentinel":
        yield failed(
            area,
            f"{address} is a Sentinel, and keeps no data",
            "set REDIS_SENTINELS to it and REDIS_SENTINEL_ENABLED=true, or correct REDIS_PORT",
        )
        return
    how = "in plain text" if config.tls is None else "over TLS"
    yield passed(area, f"{facts.product} at {address} answers {how}")
    if facts.version < OLDEST:
        least = ".".join(map(str, OLDEST))
        yield failed(
            area, f"{facts.product} is too old", f"upgrade the server to version {least} or later"
        )
    if facts.mode == "cluster":
        yield failed(
            area,
            f"{address} is a part of a cluster, and most keys are elsewhere",
            "name a Redis that is not, in REDIS_HOST",
        )
    if facts.replica:
        yield failed(
            area,
            f"{address} is a replica that accepts no writes",
            "name the primary in REDIS_HOST, or ask Sentinels: REDIS_SENTINEL_ENABLED",
        )
    elif config.sentinels and not facts.replicas:
        yield warned(
            area,
            f"the primary at {address} has no replica: there is nothing to fail over to",
            "start a replica of it, or look why it is not connected",
        )
    yield from _memory(facts)
    yield from _clients(facts, config)


def _memory(facts: Facts) -> Iterator[Finding]:
    area = Area.REDIS
    if facts.policy.startswith("allkeys-"):
        yield warned(
            area,
            f"maxmemory-policy is {facts.policy}: when memory is full it drops any key, those of"
            " the queues as well",
            "set maxmemory-policy to noeviction, or to one of volatile-*",
        )
    if facts.memory_limit and facts.memory >= _FULL * facts.memory_limit:
        percent = round(100 * facts.memory / facts.memory_limit)
        yield warned(
            area,
            f"{percent} % of maxmemory are in use",
            "raise maxmemory, or look at what fills it",
        )
    if facts.persistent is False:
        yield warned(
            area,
            "nothing is kept on disk: a restart of Redis empties queues and cache",
            "set appendonly to yes, or save to some interval",
        )
    if not facts.saved:
        yield warned(
            area,
            "Redis could not save its data the last time, and may refuse writes",
            "look at its log, and at its disk",
        )


def _clients(facts: Facts, config: RedisConfig) -> Iterator[Finding]:
    area, needed = Area.REDIS, config.pool_size + 1
    if 2 * needed > facts.clients_limit:
        yield warned(
            area,
            f"up to {needed} connections of one instance are more than half of the"
            f" {facts.clients_limit} that maxclients allows: a second one does not fit",
            "raise maxclients",
        )
    elif facts.clients + needed > facts.clients_limit:
        yield warned(
            area,
            f"up to {needed} connections of one instance are more than what is left:"
            f" {facts.clients} of {facts.clients_limit} are in use",
            "raise maxclients, or look at who is connected",
        )
