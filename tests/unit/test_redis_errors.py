"""Classification of errors for codes and retries, without a server."""

import errno
import socket
import ssl

import pytest
from redis import exceptions

from viralfx.adapters.redis import (
    MESSAGES,
    RedisLimits,
    RedisProblem,
    is_transient,
    is_unavailable,
    problem_of,
)
from viralfx.adapters.redis.errors import (
    DemotedError,
    IdleConnectionError,
    WrongServerError,
    message_of,
    refuses_writes,
)
from viralfx.adapters.redis.retry import RequestRetry, retry_policy
from viralfx.settings import CredentialsError, RedisSettings, Secret


def caused(cause: BaseException, error: BaseException | None = None) -> BaseException:
    """Return redis-py's error as raised while the system's error is handled."""
    raised = error or exceptions.ConnectionError("Error connecting")
    raised.__context__ = cause
    return raised


BOTH_REFUSED = OSError(
    "Multiple exceptions: [Errno 111] Connect call failed ('::1', 1, 0, 0),"
    " [Errno 111] Connect call failed ('127.0.0.1', 1)"
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (caused(ConnectionRefusedError(errno.ECONNREFUSED, "refused")), "refused"),
        (caused(OSError(errno.ECONNREFUSED, "refused")), "refused"),
        (caused(BOTH_REFUSED), "refused"),
        (caused(socket.gaierror(socket.EAI_NONAME, "unknown")), "unreachable"),
        (caused(UnicodeError("label too long")), "unreachable"),
        (caused(OSError(errno.EHOSTUNREACH, "no route")), "unreachable"),
        (caused(TimeoutError(), exceptions.TimeoutError("Timeout connecting")), "timeout"),
        (exceptions.TimeoutError("Timeout reading"), "timeout"),
        (exceptions.AuthenticationError("WRONGPASS"), "auth"),
        (exceptions.NoPermissionError("NOPERM"), "auth"),
        (caused(ssl.SSLCertVerificationError("self-signed")), "tls"),
        (caused(PermissionError(errno.EPERM, "packet filter")), "unreachable"),
        (exceptions.BusyLoadingError("LOADING"), "loading"),
        (caused(ConnectionResetError(errno.ECONNRESET, "reset")), "lost"),
        (exceptions.ConnectionError("Connection closed by server."), "lost"),
        (exceptions.ConnectionError("max number of clients reached"), "too_many_connections"),
        (exceptions.ReadOnlyError("READONLY"), "read_only"),
        (caused(exceptions.ReadOnlyError("READONLY"), DemotedError("now a replica")), "lost"),
        (exceptions.OutOfMemoryError("command not allowed"), "memory_full"),
        (exceptions.ResponseError("MISCONF Redis is configured to save"), "writes_refused"),
        (exceptions.ResponseError("NOREPLICAS Not enough good replicas"), "writes_refused"),
        (
            exceptions.ResponseError(
                "Command # 1 (SET a b) of pipeline caused error: ('MISCONF x',)"
            ),
            "writes_refused",
        ),
        (exceptions.ResponseError("ERR wrong MISCONF "), "error"),
        (exceptions.ClusterDownError("The cluster is down"), "cluster"),
        (exceptions.MovedError("1 127.0.0.1:7000"), "cluster"),
        (WrongServerError(RedisProblem.SENTINEL), "sentinel"),
        (IdleConnectionError("no answer"), "timeout"),
        (caused(OSError(errno.ENOENT, "no socket")), "unreachable"),
        (caused(CredentialsError("callable"), exceptions.AuthenticationError()), "auth"),
        (exceptions.MaxConnectionsError("Too many connections"), "pool_exhausted"),
        (exceptions.ResponseError("WRONGTYPE"), "error"),
        (exceptions.WatchError("changed"), "error"),
        (caused(exceptions.ConnectionError("closed"), exceptions.WatchError("watching")), "error"),
        (KeyError("bug"), "error"),
    ],
)
def test_each_error_has_a_code(error: BaseException, code: str) -> None:
    """Causes in the context count; unknown errors have the code ``error``."""
    assert (str(problem_of(error)), bool(MESSAGES[RedisProblem(code)])) == (code, True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.ConnectionError("lost"), (True, True)),
        (exceptions.TimeoutError("slow"), (True, True)),
        (exceptions.BusyLoadingError("LOADING"), (True, True)),
        (exceptions.ReadOnlyError("READONLY"), (False, False)),
        (exceptions.OutOfMemoryError("full"), (False, False)),
        (DemotedError("now a replica"), (True, True)),
        (IdleConnectionError("no answer"), (True, True)),
        (WrongServerError(RedisProblem.CLUSTER), (True, False)),
        (exceptions.AuthenticationError("WRONGPASS"), (True, False)),
        (exceptions.NoPermissionError("NOPERM"), (False, False)),
        (exceptions.ResponseError("WRONGTYPE"), (False, False)),
        (exceptions.MaxConnectionsError("Too many connections"), (False, False)),
        (exceptions.DataError("Invalid input"), (False, False)),
        # Not redis-py's: other errors of an operation belong to the caller.
        (ConnectionRefusedError(), (False, False)),
        (TimeoutError(), (False, False)),
        (KeyError("bug"), (False, False)),
    ],
)
def test_unavailability_and_transience(error: Exception, expected: tuple[bool, bool]) -> None:
    """Permanent problems need an operator and are not retried."""
    assert (is_unavailable(error), is_transient(error)) == expected


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            WrongServerError(RedisProblem.UNKNOWN_PRIMARY, "no primary named 'x'"),
            "no primary named 'x'",
        ),
        (
            caused(CredentialsError("f: raised OSError"), exceptions.AuthenticationError("hush")),
            "There are no credentials for Redis; f: raised OSError",
        ),
        (exceptions.AuthenticationError("hush"), "Redis refuses the credentials"),
    ],
    ids=["wrong server", "credentials", "other"],
)
def test_messages_say_what_to_do(error: BaseException, text: str) -> None:
    """Without the text of other errors, which may hold secrets."""
    assert message_of(error) == text


def test_refused_writes_are_not_an_outage() -> None:
    """Reads work."""
    refused = [exceptions.ReadOnlyError(), exceptions.OutOfMemoryError()]

    assert [refuses_writes(error) for error in refused] == [True, True]
    assert not refuses_writes(exceptions.ResponseError("WRONGTYPE"))
    assert not refuses_writes(KeyError("bug"))


async def test_first_retry_after_an_idle_connection_is_at_once() -> None:
    """The wait for its reply was long already."""
    failures: list[Exception] = [IdleConnectionError("dropped")]

    async def do() -> str:
        if failures:
            raise failures.pop()
        return "done"

    async def fail(error: Exception) -> None:
        assert isinstance(error, IdleConnectionError)

    patient = RequestRetry(retry_policy(base=3600.0, cap=3600.0))

    assert await patient.call_with_retry(do, fail) == "done"


def test_cyclic_causes_are_handled() -> None:
    """Libraries may build such chains."""
    one, two = exceptions.ConnectionError("one"), exceptions.ConnectionError("two")
    one.__cause__, two.__cause__ = two, one

    assert problem_of(one) is RedisProblem.LOST


def test_policy_waits_half_a_second_one_and_two() -> None:
    """Three retries; then it gives up."""
    policy, error = retry_policy(), exceptions.ConnectionError()

    assert [policy.next_delay(n, error) for n in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, None]


def test_policy_never_waits_longer_than_three_seconds() -> None:
    """For any number of attempts."""
    policy = retry_policy(attempts=10)

    assert policy.next_delay(9, exceptions.ConnectionError()) == 3.0


async def test_requests_follow_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has the attempts and waits of the policy; each failure closes its connection."""
    waits: list[float] = []
    failures: list[Exception] = []
    error = exceptions.ConnectionError()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def do() -> None:
        raise error

    async def fail(error: Exception) -> None:
        failures.append(error)

    monkeypatch.setattr("asyncio.sleep", sleep)
    with pytest.raises(exceptions.ConnectionError):
        await RequestRetry(retry_policy()).call_with_retry(do, fail)

    assert waits == [0.5, 1.0, 2.0]
    assert failures == [error] * 4


async def test_requests_are_not_retried_after_a_permanent_error() -> None:
    """The server would refuse a wrong password again."""
    calls: list[None] = []

    async def do() -> None:
        calls.append(None)
        raise exceptions.AuthenticationError

    async def fail(error: Exception) -> None:
        raise AssertionError(error)

    with pytest.raises(exceptions.AuthenticationError):
        await RequestRetry(retry_policy()).call_with_retry(do, fail)

    assert len(calls) == 1


def test_no_secret_is_shown() -> None:
    """The settings mask their secrets."""
    settings = RedisSettings(password=Secret("hush"), sentinel_password=Secret("watch"))

    assert "hush" not in repr(settings)
    assert "watch" not in repr(settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("connect_timeout", 0.0),
        ("socket_timeout", float("inf")),
        ("degrade_after", -1.0),
        ("attempts", 0),
        ("pool_size", 0),
    ],
)
def test_invalid_limits_are_refused(field: str, value: float) -> None:
    """The error names the field."""
    with pytest.raises(ValueError, match=field):
        RedisLimits(**{field: value})  # type: ignore[arg-type]
