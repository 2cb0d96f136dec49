"""Calls in threads of their own, and lookups of names in them."""

import asyncio
import socket
import threading
from typing import Any

import pytest
from tests.virtual_time import run_in_virtual_time

from viralfx.core.threads import NameLookups, in_thread


async def test_in_thread_returns_the_result_of_a_daemon_thread() -> None:
    """The thread does not delay the end of the process."""
    thread = await in_thread(threading.current_thread, "asked")

    assert (thread.name, thread.daemon) == ("asked", True)


async def test_in_thread_raises_the_error_of_the_function() -> None:
    """As a direct call does."""
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0, "asked")


async def test_cancelled_call_in_a_thread_leaves_the_thread() -> None:
    """Its result is dropped."""
    go_on = threading.Event()
    call = asyncio.create_task(in_thread(lambda: go_on.wait(60.0), "asked"))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait({call})
    [left] = [thread for thread in threading.enumerate() if thread.name == "asked"]
    go_on.set()
    await in_thread(left.join, "joins")
    await asyncio.sleep(0)

    assert call.cancelled()


class Answers:
    """Counts the lookups, and fails those of one name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, port: int, **_: Any) -> Any:
        """Return two addresses, one of them twice."""
        self.count += 1
        if host == "unknown.test":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        addresses = ("192.0.2.1", "192.0.2.2", "192.0.2.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses]


async def test_lookups_at_a_time_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one asks again, because the addresses of a name change."""
    answers, names = Answers(monkeypatch), NameLookups()
    found = await asyncio.gather(*(names.places("db.test", 1) for _ in range(20)))
    at_a_time = answers.count
    await names.places("db.test", 1)

    assert found == [(("192.0.2.1", 1), ("192.0.2.2", 1))] * 20
    assert (at_a_time, answers.count) == (1, 2)


async def test_an_address_needs_no_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either kind."""
    answers, names = Answers(monkeypatch), NameLookups()
    found = [await names.places(address, 2) for address in ("192.0.2.7", "::1")]

    assert found == [(("192.0.2.7", 2),), (("::1", 2),)]
    assert answers.count == 0


async def test_an_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each call, and no longer than that."""
    answers, names = Answers(monkeypatch), NameLookups()
    for _ in range(2):
        with pytest.raises(socket.gaierror):
            await names.places("unknown.test", 1)

    assert answers.count == 2


def test_lookups_that_hang_take_ever_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one adds a second to the time until the next: 14 threads in 100 s, and not 100."""
    answered, asked = threading.Event(), []

    def getaddrinfo(host: str, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        answered.wait(60.0)
        return []

    async def main() -> None:
        names, loop = NameLookups(), asyncio.get_running_loop()
        ends_at = loop.time() + 100.0
        while loop.time() < ends_at:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.25):
                    await names.places("db.test", 1)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        run_in_virtual_time(main())
    finally:
        answered.set()
    for thread in threading.enumerate():
        if thread.name == "name-lookup":
            thread.join()

    assert len(asked) == 14
