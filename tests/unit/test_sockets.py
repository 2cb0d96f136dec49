"""Listening sockets: what they are set to, and one clear line for each that cannot be."""

import os
import socket
from pathlib import Path

import pytest
from tests.servers.ports import free_port

from viralfx.domain.errors import StartupError
from viralfx.runner.sockets import listen


def test_listens_without_blocking_and_says_tcp() -> None:
    """The socket is ready for an event loop, and the loop will set TCP_NODELAY on what it gets."""
    with listen("PORT", "127.0.0.1", 0) as listener:
        assert not listener.getblocking()
        assert listener.proto == socket.IPPROTO_TCP
        with socket.create_connection(listener.getsockname()):
            pass


def test_port_in_use_is_one_clear_line() -> None:
    """The variable, the port and what to do."""
    with listen("PORT", "127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(StartupError) as caught:
            listen("MANAGEMENT_PORT", "127.0.0.1", port)

    assert (
        f"MANAGEMENT_PORT: port {port} on 127.0.0.1 is in use; stop who has it, or set another"
        == str(caught.value)
    )


def test_port_is_free_again_at_once() -> None:
    """A restart is not held up by connections of the process before."""
    address = "127.0.0.1", free_port()
    with (
        listen("PORT", *address) as first,
        socket.create_connection(address),
        first,
    ):
        pass
    listen("PORT", *address).close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "", "256.256.256.256"])
def test_host_that_is_unknown_is_one_clear_line(host: str) -> None:
    """A name that does not resolve is blamed on HOST."""
    with pytest.raises(StartupError, match=rf"^HOST: cannot resolve '{host}': .+"):
        listen("PORT", host, 0)


def test_address_of_another_machine_is_one_clear_line() -> None:
    """An address this machine does not have is blamed on HOST too."""
    with pytest.raises(StartupError) as caught:
        listen("PORT", "192.0.2.1", 0)

    assert (
        str(caught.value)
        == "HOST: 192.0.2.1 is no address of this machine; set HOST to one that is"
    )


def test_privileged_port_is_one_clear_line_unless_allowed() -> None:
    """Who lacks the right to port 2 is told which ports are free for all."""
    said = None
    try:
        listen("PORT", "127.0.0.1", 2).close()  # where no other test expects nobody
    except StartupError as error:
        said = str(error)
    limit = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    allowed = os.geteuid() == 0 or limit <= 2
    refusal = "PORT: no permission for port 2 on 127.0.0.1; choose one above 1023"

    assert said == (None if allowed else refusal)


def test_failed_attempt_leaves_no_socket_open() -> None:
    """A hundred failures cost no file descriptor."""
    folder = Path("/proc/self/fd")
    before = len(list(folder.iterdir()))
    with listen("PORT", "127.0.0.1", 0) as first:
        for _ in range(100):
            with pytest.raises(StartupError):
                listen("PORT", "127.0.0.1", first.getsockname()[1])

    assert before == len(list(folder.iterdir()))


@pytest.mark.parametrize("host", ["a..b", f"{'x' * 64}.test"])
def test_name_that_cannot_be_a_host_is_one_clear_line(host: str) -> None:
    """Names that no resolver takes are refused in the same way."""
    with pytest.raises(StartupError, match="HOST: cannot resolve"):
        listen("PORT", host, 0)
