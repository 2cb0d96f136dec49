"""Redis frozen, killed, emptied, restarted and failed over while the service runs."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.servers.redis import RedisServer, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.waiting import wait_until
from tests.system.load import Load, require_quick
from tests.system.service import Service, running

APP = ("--app", "tests.system.backend_app:app")
QUICK = 0.1
"""Seconds within which a cached read returns its fallback once the outage is known."""

TIMES = {"HEALTH_CHECK_TIMEOUT": "1000", "HEALTH_CHECK_INTERVAL": "500"}


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


@pytest.mark.alone
@pytest.mark.parametrize("fault", FAULTS)
def test_the_service_goes_on_without_redis(own_redis: RedisServer, fault: str) -> None:
    """It stays ready but degraded, uses fallbacks at once, recovers, and logs each change once."""
    begin, end = FAULTS[fault]
    own_redis.command("SET", "planted", "value")
    with serving(of(own_redis)) as service:
        assert service.get("/cached").json() == {"value": "value"}
        rates = {"/cached": 60.0, "/health/ready": 40.0}
        with Load(service.port, rates) as load:
            wait_until(lambda: len(load.of("/cached")) > 50, what="traffic")
            began = time.monotonic()
            begin(own_redis)
            wait_until(lambda: redis_check(service)["status"] == "fail", what="the check fails")
            known = time.monotonic()
            wait_until(lambda: time.monotonic() > known + 3, what="three seconds of the outage")
            ready, detailed = service.get("/health/ready"), service.get("/health/detailed")
            end(own_redis)
            wait_until(lambda: redis_check(service)["status"] == "pass", what="restored")
            restored = time.monotonic()
            # A server that was killed or stopped without persistence comes back empty.
            expected = "value" if fault == "frozen" else "nothing"
            wait_until(
                lambda: service.get("/cached").json() == {"value": expected}, what="read again"
            )
        assert (ready.status, ready.json()["checks"]["redis"]) == (200, False)
        assert (detailed.status, detailed.json()["status"]) == (200, "degraded")
        responses = load.of("/cached")
        assert {a.status for a in responses} == {200}
        while_known = [a for a in responses if known <= a.at < known + 2.5]
        assert {a.body for a in while_known} == {'{"value":"fallback"}'}
        slowest = max(a.seconds for a in while_known)
        require_quick(slowest, QUICK, "/cached")
        assert {a.status for a in load.of("/health/ready")} == {200}
        print(  # noqa: T201 - the timeline, to explain a failure
            f"{fault}: known after {known - began:.2f} s, slowest fallback then {slowest:.4f} s,"
            f" before {max(a.seconds for a in responses if a.at < known):.2f} s,"
            f" {len(responses)} reads, back at {restored - began:.2f} s"
        )
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
        redis_server(arguments=["--cluster-enabled", "yes"]) as server,
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


@pytest.mark.alone
def test_failover_under_load_loses_no_request(sentinel_setup: SentinelSetup) -> None:
    """After a kill of the primary at 150 requests/s, the new one answers all requests."""
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
        rates = {"POST /counter": 100.0, "/cached": 50.0, "/health/ready": 20.0}
        with Load(service.port, rates) as load:
            wait_until(lambda: len(load.of("POST /counter")) > 200, what="traffic")
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
        writes = load.of("POST /counter")
        after = [a for a in writes if a.at >= killed]
        print(  # noqa: T201 - the timeline, to explain a failure
            f"promoted after {promoted - killed:.2f} s, slowest write"
            f" {max(a.seconds for a in after):.2f} s, {len(writes)} writes,"
            f" failed {[a.status for a in writes if a.status != 200]}"
        )
        assert {a.status for a in writes} == {200}
        assert {a.status for a in load.of("/cached")} == {200}
        assert {a.status for a in load.of("/health/ready")} == {200}
        assert int(new.command("GET", "counter")) > 0
        assert service.process.poll() is None
