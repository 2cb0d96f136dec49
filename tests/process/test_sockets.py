"""Listening sockets: their options, and one-line errors."""

import os
import socket
from pathlib import Path

import pytest
from tests.servers.ports import free_port

from viralfx.core.errors import StartupError
from viralfx.server.http_server import listen


def test_the_listener_is_non_blocking_with_protocol_tcp() -> None:
    """The event loop can use the socket, and sets TCP_NODELAY on accepted connections."""
    with listen("PORT", "127.0.0.1", 0) as listener:
        assert not listener.getblocking()
        assert listener.proto == socket.IPPROTO_TCP
        with socket.create_connection(listener.getsockname()):
            pass


def test_a_port_in_use_is_a_one_line_error() -> None:
    """The error has the variable, the port and the remedy."""
    with listen("PORT", "127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(StartupError) as caught:
            listen("MANAGEMENT_PORT", "127.0.0.1", port)

    assert (
        f"MANAGEMENT_PORT: port {port} on 127.0.0.1 is in use;"
        " stop its process, or set another port" == str(caught.value)
    )


def test_a_port_can_be_reused_immediately() -> None:
    """Connections of the previous process do not delay a restart."""
    address = "127.0.0.1", free_port()
    with (
        listen("PORT", *address) as first,
        socket.create_connection(address),
        first,
    ):
        pass
    listen("PORT", *address).close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "", "256.256.256.256"])
def test_an_unknown_host_is_a_one_line_error(host: str) -> None:
    """The error names HOST."""
    with pytest.raises(StartupError, match=rf"^HOST: cannot resolve '{host}': .+"):
        listen("PORT", host, 0)


def test_an_address_of_another_machine_is_a_one_line_error() -> None:
    """The error names HOST."""
    with pytest.raises(StartupError) as caught:
        listen("PORT", "192.0.2.1", 0)

    assert (
        str(caught.value)
        == "HOST: 192.0.2.1 is not an address of this machine; set HOST to one of its addresses"
    )


def test_a_privileged_port_is_a_one_line_error() -> None:
    """Without the privilege for port 2, the error names the unprivileged ports."""
    message = None
    try:
        listen("PORT", "127.0.0.1", 2).close()  # no other test uses this port
    except StartupError as error:
        message = str(error)
    limit = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    allowed = os.geteuid() == 0 or limit <= 2
    expected = "PORT: no permission for port 2 on 127.0.0.1; choose one above 1023"

    assert message == (None if allowed else expected)


def test_a_failed_attempt_leaves_no_socket_open() -> None:
    """A hundred failures leak no file descriptor."""
    folder = Path("/proc/self/fd")
    before = len(list(folder.iterdir()))
    with listen("PORT", "127.0.0.1", 0) as first:
        for _ in range(100):
            with pytest.raises(StartupError):
                listen("PORT", "127.0.0.1", first.getsockname()[1])

    assert before == len(list(folder.iterdir()))


@pytest.mark.parametrize("host", ["a..b", f"{'x' * 64}.test"])
def test_an_invalid_host_name_is_a_one_line_error(host: str) -> None:
    """Names that a resolver rejects as invalid have the same error."""
    with pytest.raises(StartupError, match="HOST: cannot resolve"):
        listen("PORT", host, 0)
