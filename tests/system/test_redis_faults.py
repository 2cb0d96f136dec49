"""Redis frozen, killed, emptied, restarted and failed over while the service runs."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.servers.redis import RedisServer, cluster_node, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.load import Load
from tests.system.service import Service, running

from viralfx.adapters.redis import RedisLimits

APP = ("--app", "tests.system.backend_app:app")
LIMITS = RedisLimits()
"""The limits of the service's client."""
WAITS = 3.5
"""Seconds from the first attempt of a request to its last one, by :class:`RedisLimits`."""

TIMES = {"HEALTH_CHECK_TIMEOUT": "2000", "HEALTH_CHECK_INTERVAL": "500"}


@contextmanager
def serving(environment: dict[str, str]) -> Iterator[Service]:
    """Run the application with Redis, and the database in memory."""
    with running(*APP, environment={**TIMES, **environment}) as service:
        yield service.wait_ready()


def of(server: RedisServer) -> dict[str, str]:
    """Return the variables that name a server."""
    return {"REDIS_HOST": server.host, "REDIS_PORT": str(server.port)}


def redis_check(service: Service) -> Any:
    """Return the service's check of Redis."""
    return service.get("/health/detailed").json()["checks"]["redis"]


FAULTS: dict[str, tuple[Callable[[RedisServer], None], Callable[[RedisServer], None]]] = {
    "frozen": (RedisServer.freeze, RedisServer.thaw),
    "killed": (RedisServer.kill, RedisServer.start),
    "stopped": (RedisServer.stop, RedisServer.start),
}


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS if SOAK else ["frozen", "killed"])
def test_the_service_goes_on_without_redis(own_redis: RedisServer, fault: str) -> None:
    """It stays ready but degraded, uses fallbacks at once, recovers, and logs each change once."""
    begin, end = FAULTS[fault]
    own_redis.command("SET", "planted", "value")
    with serving(of(own_redis)) as service:
        assert service.get("/cached").json() == {"value": "value"}
        with Load(service.port, {"/cached": 20.0, "/health/ready": 10.0}) as load:
            wait_until(lambda: len(load.of("/cached")) > 20, what="traffic")
            begin(own_redis)
            wait_until(lambda: redis_check(service)["status"] == "fail", what="the check fails")
            known = time.monotonic()
            wait_until(
                lambda: len(load.of("/cached", since=known)) >= 20, what="reads during the outage"
            )
            while_known = load.of("/cached", since=known)
            median = load.median("/cached", since=known)
            ready, detailed = service.get("/health/ready"), service.get("/health/detailed")
            end(own_redis)
            wait_until(lambda: redis_check(service)["status"] == "pass", what="restored")
            # A server that was killed or stopped without persistence comes back empty.
            expected = "value" if fault == "frozen" else "nothing"
            wait_until(
                lambda: service.get("/cached").json() == {"value": expected}, what="read again"
            )
        assert (ready.status, ready.json()["checks"]["redis"]) == (200, False)
        assert (detailed.status, detailed.json()["status"]) == (200, "degraded")
        assert {a.status for a in load.of("/cached")} == {200}
        assert {a.body for a in while_known} == {'{"value":"fallback"}'}
        # A read that waits for a frozen server waits this long.
        assert median < LIMITS.degrade_after / 2
        assert {a.status for a in load.of("/health/ready")} == {200}
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        assert len(service.logged("Redis connection lost")) == 1
        assert len(service.logged("Redis connection restored")) == 1


def test_flushall_causes_only_cache_misses(own_redis: RedisServer) -> None:
    """An emptied server is healthy; reads are cache misses."""
    own_redis.command("SET", "planted", "value")
    with serving(of(own_redis)) as service:
        assert service.get("/cached").json() == {"value": "value"}
        own_redis.command("FLUSHALL")
        assert service.get("/cached").json() == {"value": "nothing"}
        assert redis_check(service)["status"] == "pass"
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        assert service.logged("Redis connection lost") == []


@pytest.mark.each_python
def test_a_start_without_redis_is_degraded(own_redis: RedisServer) -> None:
    """Redis is optional: the service starts degraded without it and connects later."""
    own_redis.stop()
    with serving(of(own_redis)) as service:
        assert service.get("/health/ready").json() == {
            "ready": True,
            "checks": {"database": True, "redis": False},
        }
        assert redis_check(service)["error"]["code"] == "refused"
        assert service.get("/cached").json() == {"value": "fallback"}
        own_redis.start()
        wait_until(lambda: redis_check(service)["status"] == "pass", what="found")
        assert service.get("/cached").json() == {"value": "nothing"}


def test_a_wrong_password_is_degraded_with_the_code_auth(sentinel_setup: SentinelSetup) -> None:
    """Wrong credentials never stop the service and are never logged."""
    server = sentinel_setup.primary_server()
    with serving({**of(server), "REDIS_PASSWORD": "planted-wrong"}) as service:
        assert service.get("/health/ready").status == 200
        check = redis_check(service)
        assert (check["status"], check["error"]["code"]) == ("fail", "auth")
        assert "planted-wrong" not in "".join([str(check), *service.output, *service.errors])


def test_a_server_that_cannot_work_is_degraded_with_its_code() -> None:
    """A node of a cluster is refused by name at the start; the log says what to do."""
    with (
        redis_server(arguments=cluster_node()) as server,
        serving(of(server)) as service,
    ):
        assert service.get("/health/ready").status == 200
        check = redis_check(service)
        assert (check["status"], check["error"]["code"]) == ("fail", "cluster")
        assert service.get("/cached").json() == {"value": "fallback"}
        lines = wait_until(
            lambda: [
                line for line in service.logged("Health check changed") if line["check"] == "redis"
            ],
            what="the check is logged",
        )
        assert "use a server without cluster mode" in lines[0]["detail"]


@pytest.mark.soak
def test_failover_under_load_loses_no_request(sentinel_setup: SentinelSetup) -> None:
    """After a kill of the primary, the new one answers each write."""
    old = sentinel_setup.primary_server()
    environment = {
        "REDIS_SENTINEL_ENABLED": "true",
        "REDIS_SENTINELS": ",".join(f"{host}:{port}" for host, port in sentinel_setup.sentinels),
        "REDIS_SENTINEL_NAME": sentinel_setup.name,
        "REDIS_PASSWORD": str(sentinel_setup.password),
        "REDIS_SENTINEL_PASSWORD": str(sentinel_setup.sentinel_password),
    }
    with serving(environment) as service:
        config = redis_check(service)["details"]["config"]
        assert (config["host"], config["port"]) == (old.host, old.port)
        rates = {"POST /counter": 15.0, "/cached": 10.0, "/health/ready": 10.0}
        with Load(service.port, rates) as load:
            wait_until(lambda: len(load.of("POST /counter")) > 20, what="traffic")
            killed = time.monotonic()
            sentinel_setup.kill_primary()
            new = sentinel_setup.wait_failover(old)
            promoted = time.monotonic()
            wait_until(
                lambda: any(a.status == 200 for a in load.of("POST /counter", since=promoted)),
                what="writes to the new primary",
            )
            wait_until(
                lambda: redis_check(service)["details"]["config"]["port"] == new.port,
                what="the new primary is shown",
            )
        failed = [a for a in load.of("POST /counter") if a.status != 200]
        # A busy machine may delay the vote beyond the last attempt of the first writes.
        assert failed == [] or (promoted - killed > WAITS and not SOAK)
        assert [a for a in failed if a.at + WAITS > promoted + 1] == []
        assert {a.status for a in load.of("/cached")} == {200}
        assert {a.status for a in load.of("/health/ready")} == {200}
        assert int(new.command("GET", "counter")) > 0
        assert service.process.poll() is None
