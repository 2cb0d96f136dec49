"""Client connections to a service."""

import socket

from tests.system.service import Service


def begun(service: Service, head: bytes) -> socket.socket:
    """Send a request; return the connection once the response has begun."""
    connection = send(service, head)
    assert connection.recv(65536)
    return connection


def send(service: Service, head: bytes) -> socket.socket:
    """Send a request and return the connection."""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
    connection.sendall(head)
    return connection
