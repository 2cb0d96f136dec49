"""Examines Redis before a deployment, behind Sentinel or not; nothing is changed."""

import asyncio
import ssl
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from redis.exceptions import NoPermissionError, RedisError, ResponseError

from viralfx.adapters.redis.client import RedisClient
from viralfx.adapters.redis.config import Address, RedisConfig
from viralfx.adapters.redis.errors import Trouble, trouble
from viralfx.adapters.redis.facts import ask, judge
from viralfx.domain.diagnosis import Area, Finding, failed, passed, skipped, warned

LONGEST = 3.0
"""Seconds to connect at most, whatever the configuration allows."""

FEWEST = 3
"""Sentinels that survive the loss of one of them."""

_PROBLEMS = {
    Trouble.REFUSED: "refuses connections",
    Trouble.UNREACHABLE: "cannot be reached: the host is not known, or there is no way to it",
    Trouble.TIMEOUT: "does not answer in time",
    Trouble.AUTH: "refuses the user or password",
    Trouble.TLS: "cannot be trusted over TLS, or speaks none",
    Trouble.LOADING: "is loading its data",
    Trouble.LOST: "closes the connection",
}
_REMEDIES = {
    Trouble.REFUSED: "check that it runs, and {where}",
    Trouble.UNREACHABLE: "check {where}",
    Trouble.TIMEOUT: "look at the server, and at what is in between ({where})",
    Trouble.AUTH: "check {user} and {password}",
    Trouble.TLS: "check REDIS_TLS_ENABLED and REDIS_TLS_CA_FILE",
    Trouble.LOADING: "wait until it is done, and try again",
    Trouble.LOST: "look at its log; if it speaks TLS only, set REDIS_TLS_ENABLED=true",
}
_SERVER = {
    "where": "REDIS_HOST and REDIS_PORT",
    "user": "REDIS_USERNAME",
    "password": "REDIS_PASSWORD",
}
_PRIMARY = {**_SERVER, "where": "the address that the Sentinels announce: it must lead there"}
_SENTINEL = {
    "where": "REDIS_SENTINELS",
    "user": "REDIS_SENTINEL_USERNAME",
    "password": "REDIS_SENTINEL_PASSWORD",
}


@dataclass(frozen=True, slots=True)
class _Watch:
    """What one Sentinel says."""

    at: Address
    error: RedisError | OSError | None = None
    unknown: bool = False
    """It knows no primary of that name."""
    primary: Address = ("", 0)
    down: bool = False
    """It believes that the primary is down."""
    quorum: bool = True
    """Enough Sentinels see each other to fail over."""


class RedisExamination:
    """Asks the Sentinels, if there are any, and then the Redis that the service would use."""

    def __init__(self, config: RedisConfig) -> None:
        self._config = replace(
            config, connect_timeout=min(config.connect_timeout, LONGEST), retries=0
        )

    async def examine(self) -> Sequence[Finding]:
        """Look once."""
        config = self._config
        if config.tls is not None and config.tls.ca_file is not None:
            try:
                ssl.create_default_context(cafile=config.tls.ca_file)
            except OSError:
                found = f"REDIS_TLS_CA_FILE: {config.tls.ca_file} holds no certificates"
                return [failed(Area.REDIS, found, "name a file in PEM format")]
        if not config.sentinels:
            return await self._server((config.host, config.port), _SERVER)
        watches = await asyncio.gather(*(self._watch(at) for at in config.sentinels))
        findings = list(_judge_sentinels(watches, config.sentinel_name))
        named = Counter(w.primary for w in watches if w.primary[1]).most_common(1)
        for primary, _ in named:
            findings += await self._server(primary, _PRIMARY)
        return findings

    async def _server(self, at: Address, names: dict[str, str]) -> Sequence[Finding]:
        config = self._config
        address = _text(at)
        client = RedisClient(replace(config, host=at[0], port=at[1], sentinels=()))
        try:
            await client.redis.ping()
            try:
                facts = await ask(client.redis)
            except NoPermissionError:
                found = f"Redis at {address} lets this user in, but does not let it ask INFO"
                remedy = "grant +info to the user of REDIS_USERNAME to have the server looked at"
                return [skipped(Area.REDIS, found, remedy)]
        except (RedisError, OSError) as error:
            return [_explained(f"Redis at {address}", error, names)]
        finally:
            await client.close()
        return list(judge(facts, config, address))

    async def _watch(self, at: Address) -> _Watch:
        config = self._config
        client = RedisClient(
            RedisConfig(
                host=at[0],
                port=at[1],
                username=config.sentinel_username,
                password=config.sentinel_password,
                tls=config.tls,
                connect_timeout=config.sentinel_timeout,
                socket_timeout=config.sentinel_timeout,
                retries=0,
            )
        )
        try:
            return await _ask_sentinel(client, at, config.sentinel_name)
        except (RedisError, OSError) as error:
            return _Watch(at, error)
        finally:
            await client.close()


async def _ask_sentinel(client: RedisClient, at: Address, name: str) -> _Watch:
    try:
        said = cast("dict[str, Any]", await client.redis.sentinel_master(name))
    except ResponseError as error:
        if trouble(error) is not Trouble.ERROR:
            raise
        return _Watch(at, unknown=True)
    quorum = True
    try:
        await client.redis.sentinel_ckquorum(name)
    except ResponseError as error:
        quorum = trouble(error) is not Trouble.ERROR  # unless it may not be asked
    down = bool(said["is_sdown"] or said["is_odown"])
    return _Watch(at, primary=(str(said["ip"]), int(said["port"])), down=down, quorum=quorum)


def _judge_sentinels(watches: Sequence[_Watch], name: str) -> Iterator[Finding]:
    area = Area.REDIS
    answered = [w for w in watches if w.error is None]
    for watch in watches:
        if watch.error is not None:
            what = f"Sentinel at {_text(watch.at)}"
            finding = _explained(what, watch.error, _SENTINEL)
            yield warned(area, finding.found, finding.remedy) if answered else finding
    knowing = [w for w in answered if not w.unknown]
    if not knowing:
        if answered:
            found = f"the Sentinels know no primary {name!r}"
            yield failed(area, found, "check REDIS_SENTINEL_NAME")
        return
    if len(knowing) < len(answered):
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
            area, f"the Sentinels see the primary {name!r} down", "look at it, and at their logs"
        )
    if any(not w.quorum for w in knowing):
        yield failed(
            area,
            "the Sentinels have no majority, and could not fail over",
            "start those that are missing, or let them reach each other",
        )
    elif len(answered) < FEWEST:
        yield warned(
            area,
            f"{len(answered)} of {len(watches)} Sentinels answer: fewer than {FEWEST} do not"
            " survive the loss of one",
            "run at least three, and name them all in REDIS_SENTINELS",
        )
    else:
        yield passed(area, f"{len(answered)} of {len(watches)} Sentinels answer and can fail over")


def _explained(what: str, error: BaseException, names: dict[str, str]) -> Finding:
    code = trouble(error)
    problem = _PROBLEMS.get(code, "answers with an error")
    remedy = _REMEDIES.get(code, "look at its log; check REDIS_DB, and what its user may do")
    remedy = remedy.format(**names)
    return failed(Area.REDIS, f"{what} {problem}", remedy)


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
