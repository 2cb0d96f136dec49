"""A name server that does not answer."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

MANY = 64
"""More lookups than an event loop has threads for them."""


@contextmanager
def silent_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answer to no name that ends with ``silent.test`` until the block ends."""
    resolve, over = socket.getaddrinfo, threading.Event()

    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        if str(host).endswith("silent.test"):
            over.wait(60.0)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return resolve(host, *more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", getaddrinfo)
        try:
            yield
        finally:
            over.set()
