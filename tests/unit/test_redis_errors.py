"""Errors told apart, and what follows for retries; no server is needed."""

import errno
import socket
import ssl

import pytest
from redis import exceptions

from viralfx.adapters.redis import (
    MESSAGES,
    RedisConfig,
    RedisRetryPolicy,
    RedisTls,
    Trouble,
    is_away,
    is_transient,
    trouble,
)
from viralfx.adapters.redis.retry import request_retry


def caused(cause: BaseException, error: BaseException | None = None) -> BaseException:
    """Return redis-py's error as it is raised while the system's is handled."""
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
        (exceptions.ReadOnlyError("READONLY"), "lost"),
        (exceptions.MaxConnectionsError("Too many connections"), "pool_exhausted"),
        (exceptions.ResponseError("WRONGTYPE"), "error"),
        (exceptions.WatchError("changed"), "error"),
        (caused(exceptions.ConnectionError("closed"), exceptions.WatchError("watching")), "error"),
        (KeyError("bug"), "error"),
    ],
)
def test_an_error_has_a_code(error: BaseException, code: str) -> None:
    """What redis-py hides in the context counts; what cannot be told is an error."""
    assert (str(trouble(error)), bool(MESSAGES[Trouble(code)])) == (code, True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.ConnectionError("lost"), (True, True)),
        (exceptions.TimeoutError("slow"), (True, True)),
        (exceptions.BusyLoadingError("LOADING"), (True, True)),
        (exceptions.ReadOnlyError("READONLY"), (True, True)),
        (exceptions.AuthenticationError("WRONGPASS"), (True, False)),
        (exceptions.NoPermissionError("NOPERM"), (False, False)),
        (exceptions.ResponseError("WRONGTYPE"), (False, False)),
        (exceptions.MaxConnectionsError("Too many connections"), (False, False)),
        (exceptions.DataError("Invalid input"), (False, False)),
        # Not redis-py's: whatever the operation does besides is its own business.
        (ConnectionRefusedError(), (False, False)),
        (TimeoutError(), (False, False)),
        (KeyError("bug"), (False, False)),
    ],
)
def test_only_redis_being_away_is_taken_for_it(
    error: Exception, expected: tuple[bool, bool]
) -> None:
    """And a retry is worth it only where nobody has to mend anything first."""
    assert (is_away(error), is_transient(error)) == expected


def test_a_chain_of_causes_that_bites_its_tail_ends() -> None:
    """Errors are other people's objects."""
    one, two = exceptions.ConnectionError("one"), exceptions.ConnectionError("two")
    one.__cause__, two.__cause__ = two, one

    assert trouble(one) is Trouble.LOST


def test_the_policy_waits_half_a_second_one_and_two() -> None:
    """Three retries; then it gives up."""
    policy, error = RedisRetryPolicy(), exceptions.ConnectionError()

    assert [policy.next_delay(n, error) for n in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, None]


def test_the_policy_never_waits_longer_than_three_seconds() -> None:
    """However many attempts it may make."""
    policy = RedisRetryPolicy(attempts=10)

    assert policy.next_delay(9, exceptions.ConnectionError()) == 3.0


def test_requests_have_the_same_delays() -> None:
    """As redis-py computes them from the base and the cap."""
    retry = request_retry(3, 0.25, 3.0)

    assert [retry._backoff.compute(n) for n in (1, 2, 3, 4, 9)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert retry.get_retries() == 3


def test_no_secret_is_shown() -> None:
    """Not by the configuration either."""
    config = RedisConfig(password="hush", sentinel_password="watch", tls=RedisTls())

    assert "hush" not in repr(config)
    assert "watch" not in repr(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("connect_timeout", 0.0),
        ("socket_timeout", float("inf")),
        ("degrade_after", -1.0),
        ("retries", -1),
        ("pool_size", 0),
    ],
)
def test_what_could_never_work_is_refused(field: str, value: float) -> None:
    """The error names the field."""
    with pytest.raises(ValueError, match=field):
        RedisConfig(**{field: value})  # type: ignore[arg-type]
