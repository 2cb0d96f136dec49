"""Wrong tokens wait, for each address and in all; memory and waiting responses are bounded."""

import asyncio

import pytest
from tests.manual_clock import ManualClock
from tests.servers.waiting import until

from viralfx.web.throttle import (
    MAX_ADDRESSES,
    MAX_WAITING,
    MAX_WAITING_OF_ADDRESS,
    OF_ADDRESS,
    OF_ALL,
    GuessBrake,
    network_of,
)


async def guess(brake: GuessBrake, address: str | None, times: int) -> None:
    """Guess, and expect no wait."""
    for _ in range(times):
        async with asyncio.timeout(0):
            assert await brake.hold(address, "jobs")


async def waits(brake: GuessBrake, address: str | None) -> bool:
    """Return whether a guess from an address waits; end its wait."""
    before = brake.waiting
    task = asyncio.ensure_future(brake.hold(address, "jobs"))
    await until(lambda: task.done() or brake.waiting > before)
    waiting = not task.done()
    task.cancel()
    await asyncio.wait([task])
    return waiting


async def test_an_address_has_some_guesses_and_then_waits() -> None:
    """Other addresses do not; time gives guesses back."""
    clock = ManualClock()
    brake = GuessBrake(clock)
    await guess(brake, "192.0.2.1", int(OF_ADDRESS.free))
    assert await waits(brake, "192.0.2.1")
    assert not await waits(brake, "192.0.2.2")
    await clock.advance(30)
    assert not await waits(brake, "192.0.2.1")


async def test_all_addresses_together_have_a_limit() -> None:
    """A guesser with many addresses waits, too; so does a client over a Unix socket."""
    brake = GuessBrake(ManualClock())
    for number in range(int(OF_ALL.free)):
        await guess(brake, f"198.51.100.{number}", 1)
    assert await waits(brake, "192.0.2.1")
    assert await waits(brake, None)


async def test_few_responses_wait_and_a_stop_ends_their_wait() -> None:
    """A guess beyond them is to cost a connection; a stop waits for no guesser."""
    brake = GuessBrake(ManualClock())
    await guess(brake, "192.0.2.1", int(OF_ADDRESS.free))
    one = [
        asyncio.ensure_future(brake.hold("192.0.2.1", "jobs"))
        for _ in range(MAX_WAITING_OF_ADDRESS)
    ]
    await until(lambda: brake.waiting == len(one))
    assert await brake.hold("192.0.2.1", "jobs") is False
    many = [
        asyncio.ensure_future(brake.hold(f"2001:db8:0:{number:x}::1", "jobs"))
        for number in range(2 * MAX_WAITING)
    ]
    await until(lambda: brake.waiting == MAX_WAITING)
    brake.release()
    results = [await each for each in (*one, *many)]
    assert results.count(True) >= MAX_WAITING
    assert results.count(False) > 0
    assert brake.waiting == 0
    assert await brake.hold("192.0.2.1", "jobs") is True


async def test_the_memory_for_addresses_is_bounded() -> None:
    """The address without a guess for the longest time is forgotten."""
    brake = GuessBrake(ManualClock())
    brake.release()
    for number in range(MAX_ADDRESSES + 100):
        await brake.hold(f"2001:db8:{number:x}::1", "jobs")
    assert brake.addresses == MAX_ADDRESSES


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("testclient", "other", False),
    ],
)
def test_a_client_has_64_bits_of_ipv6(one: str, other: str, *, same: bool) -> None:
    """It can use each address of its network."""
    assert (network_of(one) == network_of(other)) is same
