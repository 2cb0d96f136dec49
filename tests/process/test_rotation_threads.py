"""Credentials from a plain function, which runs in a thread."""

import threading

import pytest

from viralfx.settings import CredentialsError, RotatingSecret


async def test_blocking_callable_that_hangs_takes_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many connections ask; when it returns, it is called anew."""
    monkeypatch.setattr("viralfx.settings.rotation.CALL_SECONDS", 0.01)
    calls, end = [], threading.Event()

    def hang() -> str:
        calls.append(threading.current_thread())
        end.wait()
        return "token"

    secret = RotatingSecret("OperationsConfig.redis_credentials", None, hang)
    for _ in range(3):
        with pytest.raises(CredentialsError, match="no answer within"):
            await secret.current()
    assert len(calls) == 1
    end.set()
    calls[0].join()
    monkeypatch.setattr("viralfx.settings.rotation.CALL_SECONDS", 10.0)

    assert [await secret.current() for _ in range(2)] == ["token"] * 2
    assert len(calls) in {2, 3}
