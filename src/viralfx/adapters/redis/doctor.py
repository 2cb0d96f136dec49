"""Checks Redis before a deployment, with or without Sentinel; changes no data."""

import asyncio
import re
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from viralfx.adapters.redis.client import (
    CREDENTIALS_OPTION,
    DEFAULT_LIMITS,
    RedisClient,
    RedisLimits,
)
from viralfx.adapters.redis.connections import Address
from viralfx.adapters.redis.errors import RedisProblem, problem_of
from viralfx.domain.doctor import Area, Finding, failed, passed, skipped, warned
from viralfx.settings import CredentialsCallable, RedisSettings

MIN_VERSION = (6, 2)
"""The first version that supports all commands in use."""

MEMORY_WARN_RATIO = 0.9
"""Share of maxmemory from which the doctor warns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """State of a server. Memory is in bytes; 0: no limit."""

    product: str
    """Name and version of the product."""
    version: tuple[int, ...]
    """The compatible version of Redis."""
    mode: str = "standalone"
    """``standalone``, ``sentinel`` or ``cluster``."""
    replica: bool = False
    replicas: int = 1
    memory: int = 0
    memory_limit: int = 0
    policy: str = "noeviction"
    persistent: bool | None = True
    """None: unknown."""
    saved: bool = True
    """True if the last attempt to save the data succeeded."""
    clients: int = 1
    clients_limit: int = 10_000


async def query_server(redis: Redis) -> ServerInfo:
    """Query the server; raises redis-py's errors."""
    info: Mapping[str, Any] = await redis.info("everything")
    mode = str(info.get("redis_mode") or info.get("server_mode") or "standalone")
    version = str(info.get("redis_version", "0"))
    valkey = info.get("valkey_version")
    return ServerInfo(
        product=f"Valkey {valkey}" if valkey else f"Redis {version}",
        version=tuple(int(part) for part in re.findall(r"\d+", version)[:3]),
        mode=mode,
        replica=info.get("role") == "slave",
        replicas=int(info.get("connected_slaves", 0)),
        memory=int(info.get("used_memory", 0)),
        memory_limit=int(info.get("maxmemory", 0)),
        policy=str(info.get("maxmemory_policy", "noeviction")),
        persistent=True if info.get("aof_enabled") else await _snapshots(redis, mode),
        saved=(info.get("rdb_last_bgsave_status", "ok"), info.get("aof_last_write_status", "ok"))
        == ("ok", "ok"),
        clients=int(info.get("connected_clients", 1)),
        clients_limit=int(info.get("maxclients", 10_000)),
    )


async def query_greeting(redis: Redis) -> ServerInfo:
    """Query the facts that no permission hides; raises redis-py's errors."""
    greeting: Mapping[bytes, Any] = await redis.execute_command("HELLO")  # type: ignore[no-untyped-call]
    shown = {name: value.decode() for name, value in greeting.items() if isinstance(value, bytes)}
    version = shown.get(b"version", "0")
    return ServerInfo(
        product=f"{shown.get(b'server', 'redis').capitalize()} {version}",
        version=tuple(int(part) for part in re.findall(r"\d+", version)[:3]),
        mode=shown.get(b"mode", "standalone"),
        replica=shown.get(b"role", "master") != "master",
    )


async def _snapshots(redis: Redis, mode: str) -> bool | None:
    if mode == "sentinel":
        return None
    try:
        config: Mapping[Any, Any] = await redis.config_get("save")
    except ResponseError:
        return None  # forbidden, for example on a hosted Redis
    return any(config.values())


def judge(info: ServerInfo, settings: RedisSettings, address: str) -> Iterator[Finding]:
    """Yield the findings on a server for these settings."""
    area = Area.REDIS
    if info.mode == "sentinel":
        yield failed(
            area,
            f"{address} is a Sentinel, and keeps no data",
            "set REDIS_SENTINELS to it and REDIS_SENTINEL_ENABLED=true, or correct REDIS_PORT",
        )
        return
    how = "over TLS" if settings.tls_enabled else "in plain text"
    yield passed(area, f"{info.product} at {address} answers {how}")
    if info.version < MIN_VERSION:
        minimum = ".".join(map(str, MIN_VERSION))
        yield failed(
            area, f"{info.product} is too old", f"upgrade the server to version {minimum} or later"
        )
    if info.mode == "cluster":
        yield failed(
            area,
            f"{address} is a node of a cluster, which is not supported",
            "set REDIS_HOST to a server that is not in a cluster",
        )
    if info.replica:
        yield failed(
            area,
            f"{address} is a replica that accepts no writes",
            "name the primary in REDIS_HOST, or ask Sentinels: REDIS_SENTINEL_ENABLED",
        )
    elif settings.sentinel_enabled and not info.replicas:
        yield warned(
            area,
            f"the primary at {address} has no replica: there is nothing to fail over to",
            "start a replica, or check why none is connected",
        )
    yield from _memory(info)
    yield from _clients(info)


def _memory(info: ServerInfo) -> Iterator[Finding]:
    area = Area.REDIS
    if info.policy.startswith("allkeys-"):
        yield warned(
            area,
            f"maxmemory-policy is {info.policy}: when memory is full, Redis evicts any key, also"
            " those of the queues",
            "set maxmemory-policy to noeviction, or to one of volatile-*",
        )
    if info.memory_limit and info.memory >= info.memory_limit and info.policy == "noeviction":
        yield failed(
            area,
            "memory is full: Redis refuses writes",
            "raise maxmemory, or set maxmemory-policy to one of volatile-*",
        )
    elif info.memory_limit and info.memory >= MEMORY_WARN_RATIO * info.memory_limit:
        percent = round(100 * info.memory / info.memory_limit)
        yield warned(
            area,
            f"{percent} % of maxmemory are in use",
            "raise maxmemory, or check which keys use it",
        )
    if info.persistent is False:
        yield warned(
            area,
            "nothing is kept on disk: a restart of Redis empties queues and cache",
            "set appendonly to yes, or save to some interval",
        )
    if not info.saved:
        yield warned(
            area,
            "Redis could not save its data the last time, and may refuse writes",
            "check its log and its disk",
        )


def _clients(info: ServerInfo) -> Iterator[Finding]:
    area, needed = Area.REDIS, DEFAULT_LIMITS.pool_size + 1
    if 2 * needed > info.clients_limit:
        yield warned(
            area,
            f"up to {needed} connections of one instance are more than half of the"
            f" {info.clients_limit} that maxclients allows: a second one does not fit",
            "raise maxclients",
        )
    elif info.clients + needed > info.clients_limit:
        yield warned(
            area,
            f"up to {needed} connections of one instance exceed the free ones:"
            f" {info.clients} of {info.clients_limit} are in use",
            "raise maxclients, or check the connected clients",
        )


SERVER_LIMITS = RedisLimits(connect_timeout=3.0, attempts=1)
SENTINEL_LIMITS = RedisLimits(connect_timeout=1.0, socket_timeout=1.0, attempts=1)
"""Limits of the doctor's connections: one attempt each."""

MIN_SENTINELS = 3
"""The minimum that survives the loss of one Sentinel."""

_PROBLEMS = {
    RedisProblem.REFUSED: "refuses connections",
    RedisProblem.UNREACHABLE: "cannot be reached: unknown host, no route to it, or no socket",
    RedisProblem.TIMEOUT: "does not answer in time",
    RedisProblem.AUTH: "refuses the user or password",
    RedisProblem.TLS: "cannot be trusted over TLS, or does not support it",
    RedisProblem.LOADING: "is loading its data",
    RedisProblem.LOST: "closes the connection",
    RedisProblem.TOO_MANY_CONNECTIONS: "takes no more clients",
    RedisProblem.CLUSTER: "is a node of a cluster, which is not supported",
}
_REMEDIES = {
    RedisProblem.REFUSED: "check that it is running, and {where}",
    RedisProblem.UNREACHABLE: "check {where}",
    RedisProblem.TIMEOUT: "check the server, the network and {where}",
    RedisProblem.AUTH: "check {user} and {password}",
    RedisProblem.TLS: "check REDIS_TLS_ENABLED and REDIS_TLS_CA_FILE",
    RedisProblem.LOADING: "wait until it has finished, and run this again",
    RedisProblem.LOST: "check its log; if it accepts only TLS, set REDIS_TLS_ENABLED=true",
    RedisProblem.TOO_MANY_CONNECTIONS: "raise maxclients, or check the connected clients",
}
_SERVER = {
    "where": "REDIS_HOST and REDIS_PORT",
    "user": "REDIS_USERNAME",
    "password": "REDIS_PASSWORD",
}
_SOCKET = {**_SERVER, "where": "REDIS_SOCKET"}
_PRIMARY = {**_SERVER, "where": "that the address that the Sentinels announce is reachable"}
_SENTINEL = {
    "where": "REDIS_SENTINELS",
    "user": "REDIS_SENTINEL_USERNAME",
    "password": "REDIS_SENTINEL_PASSWORD",
}


@dataclass(frozen=True, slots=True)
class _SentinelReply:
    """The state of the primary as one Sentinel reports it."""

    at: Address
    error: RedisError | OSError | None = None
    unknown: bool = False
    """The Sentinel monitors no primary of that name."""
    primary: Address = ("", 0)
    down: bool = False
    """The Sentinel considers the primary down."""
    quorum: bool = True
    """Enough Sentinels are connected for a failover."""


class RedisDoctor:
    """Checks the Sentinels, if configured, and the Redis server that the service would use."""

    def __init__(
        self,
        settings: RedisSettings,
        credentials: Callable[[], Awaitable[CredentialsCallable | None]] | None = None,
    ) -> None:
        """``credentials`` returns the application's callable, if it has one."""
        self._settings = settings
        self._find_credentials = credentials
        self._credentials: CredentialsCallable | None = None

    async def check(self) -> Sequence[Finding]:
        """Connect to each Sentinel and to the server once; return the findings."""
        settings = self._settings
        if self._find_credentials is not None:
            self._credentials = await self._find_credentials()
        if settings.tls_enabled and settings.tls_ca_file is not None:
            try:
                ssl.create_default_context(cafile=settings.tls_ca_file)
            except OSError:
                found = f"REDIS_TLS_CA_FILE: {settings.tls_ca_file} holds no certificates"
                return [failed(Area.REDIS, found, "name a file in PEM format")]
        if settings.socket is not None and not settings.sentinel_enabled:
            return await self._server((settings.socket, 0), _SOCKET)
        if not settings.sentinel_enabled:
            host = settings.address or "localhost"
            return await self._server((host, settings.port), _SERVER)
        replies = await asyncio.gather(
            *(self._query_sentinel(at) for at in settings.sentinel_addresses)
        )
        findings = list(_judge_sentinels(replies, settings.sentinel_name))
        named = Counter(w.primary for w in replies if w.primary[1]).most_common(1)
        for primary, _ in named:
            findings += await self._server(primary, _PRIMARY)
        return findings

    async def _server(self, at: Address, names: dict[str, str]) -> Sequence[Finding]:
        address = _text(at)
        settings = self._settings
        if at[1]:
            settings = msgspec.structs.replace(
                settings, host=at[0], port=at[1], socket=None, sentinel_enabled=False
            )
        client = RedisClient(
            settings, SERVER_LIMITS, credentials=self._credentials, any_server=True
        )
        if self._credentials is not None:
            names = {**names, "user": "the user", "password": CREDENTIALS_OPTION}
        refused = []
        try:
            await client.redis.ping()
            try:
                info = await query_server(client.redis)
            except NoPermissionError:
                found = f"Redis at {address} accepts this user, but refuses it the command INFO"
                remedy = (
                    "grant +info to the user of REDIS_USERNAME, so that the server can be checked"
                )
                refused = [skipped(Area.REDIS, found, remedy)]
                info = await query_greeting(client.redis)
        except (RedisError, OSError) as error:
            return [_explained(f"Redis at {address}", error, names)]
        finally:
            await client.close()
        return [*judge(info, self._settings, address), *refused]

    async def _query_sentinel(self, at: Address) -> _SentinelReply:
        settings = msgspec.structs.replace(
            self._settings,
            host=at[0],
            port=at[1],
            db=0,
            username=self._settings.sentinel_username,
            password=self._settings.sentinel_password,
            socket=None,
            sentinel_enabled=False,
        )
        client = RedisClient(settings, SENTINEL_LIMITS, any_server=True)
        try:
            return await _primary_of(client, at, settings.sentinel_name)
        except (RedisError, OSError) as error:
            return _SentinelReply(at, error)
        finally:
            await client.close()


async def _primary_of(client: RedisClient, at: Address, name: str) -> _SentinelReply:
    try:
        state = cast("dict[str, Any]", await client.redis.sentinel_master(name))
    except ResponseError as error:
        if problem_of(error) is not RedisProblem.ERROR:
            raise
        return _SentinelReply(at, unknown=True)
    quorum = True
    try:
        await client.redis.sentinel_ckquorum(name)
    except ResponseError as error:
        quorum = problem_of(error) is not RedisProblem.ERROR  # or the command is forbidden
    down = bool(state["is_sdown"] or state["is_odown"])
    return _SentinelReply(
        at, primary=(str(state["ip"]), int(state["port"])), down=down, quorum=quorum
    )


def _judge_sentinels(replies: Sequence[_SentinelReply], name: str) -> Iterator[Finding]:
    area = Area.REDIS
    reached = [w for w in replies if w.error is None]
    for reply in replies:
        if reply.error is not None:
            what = f"Sentinel at {_text(reply.at)}"
            finding = _explained(what, reply.error, _SENTINEL)
            yield warned(area, finding.found, finding.remedy) if reached else finding
    knowing = [w for w in reached if not w.unknown]
    if not knowing:
        if reached:
            found = f"the Sentinels know no primary {name!r}"
            yield failed(area, found, "check REDIS_SENTINEL_NAME")
        return
    if len(knowing) < len(reached):
        yield warned(
            area,
            f"some of the Sentinels know no primary {name!r}",
            "check REDIS_SENTINELS: one may be of another set",
        )
    if len({w.primary for w in knowing}) > 1:
        yield warned(
            area,
            "the Sentinels name different primaries",
            "wait for the end of a failover, or check REDIS_SENTINELS: one may be of another set",
        )
    if any(w.down for w in knowing):
        yield failed(
            area,
            f"the Sentinels see the primary {name!r} down",
            "check the primary and the logs of the Sentinels",
        )
    if any(not w.quorum for w in knowing):
        yield failed(
            area,
            "the Sentinels have no majority, and could not fail over",
            "start the missing ones, or check their network",
        )
    elif len(reached) < MIN_SENTINELS:
        yield warned(
            area,
            f"{len(reached)} of {len(replies)} Sentinels answer: fewer than {MIN_SENTINELS} do not"
            " survive the loss of one",
            "run at least three, and name them all in REDIS_SENTINELS",
        )
    else:
        yield passed(area, f"{len(reached)} of {len(replies)} Sentinels answer and can fail over")


def _explained(what: str, error: BaseException, names: dict[str, str]) -> Finding:
    code = problem_of(error)
    problem = _PROBLEMS.get(code, "answers with an error")
    remedy = _REMEDIES.get(code, "check its log, REDIS_DB and the permissions of the user")
    remedy = remedy.format(**names)
    return failed(Area.REDIS, f"{what} {problem}", remedy)


def _text(address: Address) -> str:
    host, port = address
    return f"{host}:{port}" if port else host  # the path of a socket has no port
