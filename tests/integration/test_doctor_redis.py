"""``viralfx doctor`` with a real Redis and real Sentinels: what is planted there is found."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from tests.integration.doctor import GOOD, visit
from tests.servers.certificates import Certificates
from tests.servers.ports import free_port
from tests.servers.redis import RedisServer, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.waiting import wait_until

PASSWORD = "h:u@sh"
WEAK, DUMB = "we:ak", "du:mb"
USERS = [
    f"weak on >{WEAK} ~* +@all -info",
    f"dumb on >{DUMB} ~* -@all +hello +client",
]
SECRETS = (PASSWORD, WEAK, DUMB)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Return a Redis with a password and users, as it should be."""
    with redis_server(password=PASSWORD, users=USERS, arguments=["--appendonly", "yes"]) as running:
        yield running


def good(server: RedisServer, **changes: str) -> dict[str, str]:
    """Return a right configuration with this Redis, but for the changes."""
    return {
        **GOOD,
        "REDIS_HOST": server.host,
        "REDIS_PORT": str(server.port),
        "REDIS_PASSWORD": server.password or "",
        **changes,
    }


def test_a_right_redis_passes(server: RedisServer) -> None:
    """It says what it is."""
    found = visit(good(server), secrets=SECRETS)
    said = [f["found"] for f in found.findings if f["area"] == "redis" and f["status"] == "pass"]

    assert (found.code, found.of("redis")) == (0, []), found
    assert f" at {server.host}:{server.port} answers in plain text" in said[0]


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"REDIS_PASSWORD": "wr0ng"}, "refuses the user or password", "REDIS_PASSWORD"),
        ({"REDIS_PASSWORD": ""}, "refuses the user or password", "REDIS_PASSWORD"),
        ({"REDIS_USERNAME": "nobody"}, "refuses the user or password", "REDIS_USERNAME"),
        (
            {"REDIS_USERNAME": "dumb", "REDIS_PASSWORD": DUMB},
            "refuses the user or password",
            "REDIS_USERNAME",
        ),
        ({"REDIS_HOST": "redis.invalid"}, "cannot be reached", "REDIS_HOST"),
        ({"REDIS_DB": "99"}, "answers with an error", "REDIS_DB"),
        ({"REDIS_TLS_ENABLED": "true"}, "or speaks none", "check REDIS_TLS_ENABLED"),
        (
            {"REDIS_TLS_ENABLED": "true", "REDIS_TLS_CA_FILE": __file__},
            "REDIS_TLS_CA_FILE: ",
            "PEM",
        ),
    ],
)
def test_what_keeps_the_service_out_is_found(
    server: RedisServer, changes: dict[str, str], text: str, remedy: str
) -> None:
    """Each is one failure that names the variable; the endpoints work without Redis."""
    found = visit(good(server, **changes), secrets=(*SECRETS, "wr0ng"))

    assert (found.code, found.judged("redis", text)) == (1, ["fail"]), found
    assert remedy in found.of("redis")[0]["remedy"]


def test_a_refused_port_is_found(server: RedisServer) -> None:
    """Nobody listens there."""
    found = visit(good(server, REDIS_PORT=str(free_port())), secrets=SECRETS)

    assert found.judged("redis", "refuses connections") == ["fail"], found


def test_what_may_not_be_asked_is_skipped(server: RedisServer) -> None:
    """A user for the service need not see everything."""
    found = visit(good(server, REDIS_USERNAME="weak", REDIS_PASSWORD=WEAK), secrets=SECRETS)
    skipped = [f for f in found.findings if f["area"] == "redis" and f["status"] == "skip"]

    assert (found.code, found.of("redis"), len(skipped)) == (0, [], 1), found
    assert "+info" in skipped[0]["remedy"]


# -- what is planted in the server -----------------------------------------------------------


def fill(server: RedisServer) -> None:
    """Leave hardly any of the memory that it may use."""
    server.command("SET", "filler", b"x" * 4_000_000)
    used = int(server.command("INFO", "memory")["used_memory"])
    server.command("CONFIG", "SET", "maxmemory", round(used / 0.95))


def configured(name: str, value: str) -> Callable[[RedisServer], object]:
    """Plant by the server's configuration."""
    return lambda server: server.command("CONFIG", "SET", name, value)


SERVER: dict[str, tuple[Callable[[RedisServer], object], str, str]] = {
    "eviction": (configured("maxmemory-policy", "allkeys-lru"), "warn", "allkeys-lru"),
    "no persistence": (configured("appendonly", "no"), "warn", "nothing is kept on disk"),
    "little memory": (fill, "warn", "% of maxmemory are in use"),
    "few connections": (configured("maxclients", "100"), "warn", "that maxclients allows"),
    "a replica": (
        lambda server: server.command("REPLICAOF", "127.0.0.1", free_port()),
        "fail",
        "is a replica that accepts no writes",
    ),
    "frozen": (lambda server: server.freeze(), "fail", "does not answer in time"),
}


@pytest.mark.parametrize("planted", SERVER.values(), ids=SERVER)
def test_what_is_wrong_with_the_server_is_found(
    planted: tuple[Callable[[RedisServer], object], str, str],
) -> None:
    """Each is found once, and what only may go wrong is a warning."""
    plant, status, text = planted
    with redis_server(password=PASSWORD, arguments=["--appendonly", "yes"]) as server:
        plant(server)
        found = visit(good(server), secrets=SECRETS)

    assert found.judged("redis", text) == [status], found
    assert found.code == (1 if status == "fail" else 0)


def test_a_server_that_loads_is_found(own_redis: RedisServer) -> None:
    """It is there, and not ready."""
    own_redis.loading(10)
    found = visit(good(own_redis))

    assert found.judged("redis", "is loading its data") == ["fail"], found


def test_snapshots_are_persistence(own_redis: RedisServer) -> None:
    """As good as a log of commands, for what is kept here."""
    own_redis.command("CONFIG", "SET", "save", "3600 1")
    found = visit(good(own_redis))

    assert found.judged("redis", "nothing is kept on disk") == [], found


# -- TLS -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, "fail", "closes the connection"),
        ({"REDIS_TLS_ENABLED": "true"}, "fail", "cannot be trusted over TLS"),
        (
            {"REDIS_TLS_ENABLED": "true", "REDIS_TLS_CA_FILE": "other-ca"},
            "fail",
            "cannot be trusted over TLS",
        ),
        (
            {"REDIS_TLS_ENABLED": "true", "REDIS_TLS_REJECT_UNAUTHORIZED": "false"},
            "warn",
            "whoever answers is believed to be Redis",
        ),
    ],
)
def test_wrong_tls_to_redis_is_found(
    tls_redis: RedisServer,
    certificates: Certificates,
    changes: dict[str, str],
    status: str,
    text: str,
) -> None:
    """Plain text where TLS is a must, an unknown authority, a wrong one, and no verification."""
    changes = {n: v.replace("other-ca", str(certificates.other_ca)) for n, v in changes.items()}
    found = visit(good(tls_redis, **changes), secrets=("hush",))

    assert found.judged("redis", text) == [status], found
    assert "REDIS_TLS" in found.of("redis")[0]["remedy"]


def test_right_tls_to_redis_passes(tls_redis: RedisServer, certificates: Certificates) -> None:
    """It says that TLS is spoken."""
    changes = {"REDIS_TLS_ENABLED": "true", "REDIS_TLS_CA_FILE": str(certificates.ca)}
    found = visit(good(tls_redis, **changes), secrets=("hush",))

    assert [f["status"] for f in found.findings if "answers over TLS" in f["found"]] == ["pass"]


# -- Sentinel --------------------------------------------------------------------------------


def watched(setup: SentinelSetup, **changes: str) -> dict[str, str]:
    """Return a right configuration with these Sentinels, but for the changes."""
    return {
        **GOOD,
        "REDIS_SENTINEL_ENABLED": "true",
        "REDIS_SENTINELS": ",".join(f"{host}:{port}" for host, port in setup.sentinels),
        "REDIS_SENTINEL_NAME": setup.name,
        "REDIS_SENTINEL_PASSWORD": setup.sentinel_password or "",
        "REDIS_PASSWORD": setup.password or "",
        **changes,
    }


def test_sentinels_are_asked(sentinel_setup: SentinelSetup) -> None:
    """Right ones pass; a wrong name, wrong passwords and too few of them are found."""
    setup = sentinel_setup
    look = partial(visit, secrets=("hush", "watch", "wr0ng"))
    setup.primary_server().command("CONFIG", "SET", "appendonly", "yes")
    right = look(watched(setup))
    name = look(watched(setup, REDIS_SENTINEL_NAME="nobody"))
    password = look(watched(setup, REDIS_PASSWORD="wr0ng"))
    own_password = look(watched(setup, REDIS_SENTINEL_PASSWORD="wr0ng"))
    host, port = setup.sentinels[0]
    alone = look(watched(setup, REDIS_SENTINELS=f"{host}:{port}"))
    missing = look(watched(setup, REDIS_SENTINELS=f"{host}:{port},127.0.0.1:{free_port()}"))
    mistaken = look(
        {**GOOD, "REDIS_HOST": host, "REDIS_PORT": str(port), "REDIS_PASSWORD": "watch"}
    )

    assert (right.code, right.of("redis")) == (0, []), right
    assert name.judged("redis", "the Sentinels know no primary 'nobody'") == ["fail"], name
    assert password.judged("redis", "Redis at 127.0.0.1:") == ["fail"], password
    assert own_password.judged("redis", "refuses the user or password") == ["fail"] * 3
    assert alone.judged("redis", "fewer than 3") == ["warn"], alone
    assert missing.judged("redis", "refuses connections") == ["warn"], missing
    assert mistaken.judged("redis", "is a Sentinel, and keeps no data") == ["fail"], mistaken


def test_sentinels_and_servers_that_are_missing_are_found(sentinel_setup: SentinelSetup) -> None:
    """No replica, no majority, then no primary, and at last no Sentinel either."""
    setup, look = sentinel_setup, partial(visit, secrets=("hush", "watch"))
    primary = setup.primary_server()
    setup.replica_server().kill()
    wait_until(lambda: primary.command("ROLE")[2] == [], what="the primary misses its replica")
    no_replica = look(watched(setup))
    for sentinel in setup.sentinel_servers[1:]:
        sentinel.kill()
    last = setup.sentinel_servers[0]
    wait_until(partial(_alone, last, setup.name), what="the Sentinel misses the others")
    no_majority = look(watched(setup))
    primary.kill()
    no_primary = look(watched(setup))
    last.kill()
    nobody = look(watched(setup))

    assert no_replica.judged("redis", "nothing to fail over to") == ["warn"], no_replica
    assert no_majority.judged("redis", "have no majority") == ["fail"], no_majority
    assert no_primary.judged("redis", "Redis at 127.0.0.1:") == ["fail"], no_primary
    if setup.refuses:
        assert "the Sentinels announce" in str(no_primary.of("redis"))
    assert nobody.judged("redis", "Sentinel at 127.0.0.1:") == ["fail"] * 3, nobody


def _alone(sentinel: RedisServer, name: str) -> bool:
    try:
        sentinel.command("SENTINEL", "CKQUORUM", name)
    except Exception as error:  # noqa: BLE001 - which one it is depends on the client
        return "NOQUORUM" in str(error)
    return False
