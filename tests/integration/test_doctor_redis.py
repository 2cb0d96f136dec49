"""``viralfx doctor`` with a real Redis and Sentinels finds planted misconfigurations."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.integration.doctor import GOOD, visit
from tests.servers.certificates import Certificates
from tests.servers.ports import free_port
from tests.servers.redis import RedisServer, cluster_node, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.waiting import wait_until

PASSWORD = "h:u@s%41"
WEAK, DUMB = "we:ak", "du:mb"
USERS = [
    f"weak on >{WEAK} ~* +@all -info",
    f"dumb on >{DUMB} ~* -@all +hello +client",
]
SECRETS = (PASSWORD, WEAK, DUMB)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Return a correctly configured Redis with a password and users."""
    with redis_server(password=PASSWORD, users=USERS, arguments=["--appendonly", "yes"]) as running:
        yield running


def good(server: RedisServer, **changes: str) -> dict[str, str]:
    """Return a correct configuration with this Redis, except for the changes."""
    return {
        **GOOD,
        "REDIS_HOST": server.host,
        "REDIS_PORT": str(server.port),
        "REDIS_PASSWORD": server.password or "",
        **changes,
    }


def test_correct_redis_passes(server: RedisServer) -> None:
    """The finding has product and version."""
    found = visit(good(server), secrets=SECRETS)
    texts = [f["found"] for f in found.findings if f["area"] == "redis" and f["status"] == "pass"]

    assert (found.code, found.of("redis")) == (0, []), found
    assert f" at {server.host}:{server.port} answers in plain text" in texts[0]


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
        ({"REDIS_TLS_ENABLED": "true"}, "or does not support it", "check REDIS_TLS_ENABLED"),
        (
            {"REDIS_TLS_ENABLED": "true", "REDIS_TLS_CA_FILE": __file__},
            "REDIS_TLS_CA_FILE: ",
            "PEM",
        ),
    ],
)
def test_connection_problems_are_found(
    server: RedisServer, changes: dict[str, str], text: str, remedy: str
) -> None:
    """Each is one failure that names the variable; the endpoints work without Redis."""
    found = visit(good(server, **changes), secrets=(*SECRETS, "wr0ng"))

    assert (found.code, found.judged("redis", text)) == (1, ["fail"]), found
    assert remedy in found.of("redis")[0]["remedy"]


def test_refused_port_is_found(server: RedisServer) -> None:
    """The port is closed."""
    found = visit(good(server, REDIS_PORT=str(free_port())), secrets=SECRETS)

    assert found.judged("redis", "refuses connections") == ["fail"], found


def test_forbidden_query_is_skipped(server: RedisServer) -> None:
    """A service user need not have all permissions."""
    found = visit(good(server, REDIS_USERNAME="weak", REDIS_PASSWORD=WEAK), secrets=SECRETS)
    skipped = [f for f in found.findings if f["area"] == "redis" and f["status"] == "skip"]

    assert (found.code, found.of("redis"), len(skipped)) == (0, [], 1), found
    assert "+info" in skipped[0]["remedy"]


# -- what is planted in the server -----------------------------------------------------------


def fill(server: RedisServer) -> None:
    """Use up almost all of maxmemory."""
    server.command("SET", "filler", b"x" * 4_000_000)
    used = int(server.command("INFO", "memory")["used_memory"])
    server.command("CONFIG", "SET", "maxmemory", round(used / 0.95))


def configured(name: str, value: str) -> Callable[[RedisServer], object]:
    """Change the server's configuration."""
    return lambda server: server.command("CONFIG", "SET", name, value)


SERVER: dict[str, tuple[Callable[[RedisServer], object], str, str]] = {
    "eviction": (configured("maxmemory-policy", "allkeys-lru"), "warn", "allkeys-lru"),
    "no persistence": (configured("appendonly", "no"), "warn", "nothing is kept on disk"),
    "little memory": (fill, "warn", "% of maxmemory are in use"),
    "full": (
        lambda server: server.command("CONFIG", "SET", "maxmemory", 100_000),
        "fail",
        "memory is full",
    ),
    "few connections": (configured("maxclients", "100"), "warn", "that maxclients allows"),
    "a replica": (
        lambda server: server.command("REPLICAOF", "127.0.0.1", free_port()),
        "fail",
        "is a replica that accepts no writes",
    ),
    "frozen": (lambda server: server.freeze(), "fail", "does not answer in time"),
}


@pytest.mark.parametrize("planted", SERVER.values(), ids=SERVER)
def test_each_problem_of_the_server_is_found(
    planted: tuple[Callable[[RedisServer], object], str, str],
) -> None:
    """Once; risks are warnings."""
    plant, status, text = planted
    with redis_server(password=PASSWORD, arguments=["--appendonly", "yes"]) as server:
        plant(server)
        found = visit(good(server), secrets=SECRETS)

    assert found.judged("redis", text) == [status], found
    assert found.code == (1 if status == "fail" else 0)


@pytest.mark.parametrize("rights", ["all", "no INFO"])
def test_cluster_node_is_refused(rights: str) -> None:
    """By name, also for a user who may not ask for INFO."""
    arguments = [*cluster_node(), "--appendonly", "yes"]
    weak = {"REDIS_USERNAME": "weak", "REDIS_PASSWORD": WEAK} if rights == "no INFO" else {}
    with redis_server(password=PASSWORD, users=USERS, arguments=arguments) as server:
        found = visit(good(server, **weak), secrets=SECRETS)

    assert (found.code, found.judged("redis", "is a node of a cluster")) == (1, ["fail"]), found


@pytest.mark.parametrize("password", ["right", "wrong"])
def test_callable_of_the_application_is_used(
    server: RedisServer, tmp_path: Path, password: str
) -> None:
    """In place of the variables, as in the service."""
    token = tmp_path / "token"
    token.write_text(WEAK if password == "right" else "wr0ng")
    environ = good(server, REDIS_PASSWORD="", TOKEN_PATH=str(token), TOKEN_USER="weak")
    app = ("--app", "tests.system.rotating_app:app")
    found = visit(environ, *app, secrets=(*SECRETS, "wr0ng"))
    problems = [] if password == "right" else ["fail"]

    assert found.judged("redis", "refuses the user or password") == problems, found
    if password == "wrong":
        assert "OperationsConfig.redis_credentials" in found.of("redis")[0]["remedy"]


def test_socket_is_checked() -> None:
    """A missing one is a failure that names the variable."""
    missing = {**GOOD, "REDIS_SOCKET": "/proc/none.sock"}
    found = visit(missing, secrets=SECRETS)

    assert (found.code, found.judged("redis", "cannot be reached")) == (1, ["fail"]), found
    assert "REDIS_SOCKET" in found.of("redis")[0]["remedy"]


def test_loading_server_is_found(own_redis: RedisServer) -> None:
    """It responds but is not ready."""
    own_redis.loading(10)
    found = visit(good(own_redis))

    assert found.judged("redis", "is loading its data") == ["fail"], found


def test_snapshots_are_persistence(own_redis: RedisServer) -> None:
    """As good as an append-only file for this service."""
    own_redis.command("CONFIG", "SET", "save", "3600 1")
    found = visit(good(own_redis))

    assert found.judged("redis", "nothing is kept on disk") == [], found


# -- TLS -------------------------------------------------------------------------------------


@pytest.mark.each_python
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
            "the server's certificate is not verified",
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
    """Plain text to a TLS server, an unknown CA, a wrong one, and no verification."""
    changes = {n: v.replace("other-ca", str(certificates.other_ca)) for n, v in changes.items()}
    found = visit(good(tls_redis, **changes), secrets=("hush",))

    assert found.judged("redis", text) == [status], found
    assert "REDIS_TLS" in found.of("redis")[0]["remedy"]


def test_correct_tls_to_redis_passes(tls_redis: RedisServer, certificates: Certificates) -> None:
    """The finding says that TLS is used."""
    changes = {"REDIS_TLS_ENABLED": "true", "REDIS_TLS_CA_FILE": str(certificates.ca)}
    found = visit(good(tls_redis, **changes), secrets=("hush",))

    assert [f["status"] for f in found.findings if "answers over TLS" in f["found"]] == ["pass"]


# -- Sentinel --------------------------------------------------------------------------------


def with_sentinels(setup: SentinelSetup, **changes: str) -> dict[str, str]:
    """Return a correct configuration with these Sentinels, except for the changes."""
    return {
        **GOOD,
        "REDIS_SENTINEL_ENABLED": "true",
        "REDIS_SENTINELS": ",".join(f"{host}:{port}" for host, port in setup.sentinels),
        "REDIS_SENTINEL_NAME": setup.name,
        "REDIS_SENTINEL_PASSWORD": setup.sentinel_password or "",
        "REDIS_PASSWORD": setup.password or "",
        **changes,
    }


def test_sentinels_are_checked(sentinel_setup: SentinelSetup) -> None:
    """Correct ones pass; wrong name, wrong passwords and too few of them are found."""
    setup = sentinel_setup
    run_doctor = partial(visit, secrets=("hush", "watch", "wr0ng"))
    setup.primary_server().command("CONFIG", "SET", "appendonly", "yes")
    right = run_doctor(with_sentinels(setup))
    name = run_doctor(with_sentinels(setup, REDIS_SENTINEL_NAME="unknown"))
    password = run_doctor(with_sentinels(setup, REDIS_PASSWORD="wr0ng"))
    own_password = run_doctor(with_sentinels(setup, REDIS_SENTINEL_PASSWORD="wr0ng"))
    host, port = setup.sentinels[0]
    alone = run_doctor(with_sentinels(setup, REDIS_SENTINELS=f"{host}:{port}"))
    missing = run_doctor(
        with_sentinels(setup, REDIS_SENTINELS=f"{host}:{port},127.0.0.1:{free_port()}")
    )
    mistaken = run_doctor(
        {**GOOD, "REDIS_HOST": host, "REDIS_PORT": str(port), "REDIS_PASSWORD": "watch"}
    )

    assert (right.code, right.of("redis")) == (0, []), right
    assert name.judged("redis", "the Sentinels know no primary 'unknown'") == ["fail"], name
    assert password.judged("redis", "Redis at 127.0.0.1:") == ["fail"], password
    assert own_password.judged("redis", "refuses the user or password") == ["fail"] * 3
    assert alone.judged("redis", "fewer than 3") == ["warn"], alone
    assert missing.judged("redis", "refuses connections") == ["warn"], missing
    assert mistaken.judged("redis", "is a Sentinel, and keeps no data") == ["fail"], mistaken


def test_missing_sentinels_and_servers_are_found(sentinel_setup: SentinelSetup) -> None:
    """No replica, no majority, no primary, and no Sentinel at all."""
    setup, run_doctor = sentinel_setup, partial(visit, secrets=("hush", "watch"))
    primary = setup.primary_server()
    setup.replica_server().kill()
    wait_until(lambda: primary.command("ROLE")[2] == [], what="the primary misses its replica")
    no_replica = run_doctor(with_sentinels(setup))
    for sentinel in setup.sentinel_servers[1:]:
        sentinel.kill()
    last = setup.sentinel_servers[0]
    wait_until(partial(_alone, last, setup.name), what="the Sentinel misses the others")
    no_majority = run_doctor(with_sentinels(setup))
    primary.kill()
    no_primary = run_doctor(with_sentinels(setup))
    last.kill()
    unreachable = run_doctor(with_sentinels(setup))

    assert no_replica.judged("redis", "nothing to fail over to") == ["warn"], no_replica
    assert no_majority.judged("redis", "have no majority") == ["fail"], no_majority
    assert no_primary.judged("redis", "Redis at 127.0.0.1:") == ["fail"], no_primary
    if setup.refuses:
        assert "the Sentinels announce" in str(no_primary.of("redis"))
    assert unreachable.judged("redis", "Sentinel at 127.0.0.1:") == ["fail"] * 3, unreachable


def _alone(sentinel: RedisServer, name: str) -> bool:
    try:
        sentinel.command("SENTINEL", "CKQUORUM", name)
    except Exception as error:  # noqa: BLE001 - the type depends on the client
        return "NOQUORUM" in str(error)
    return False
