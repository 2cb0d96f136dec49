"""Applications without the plugin and with it, and everything that their clients observe."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from litestar import Litestar
from litestar.exceptions import WebSocketDisconnect
from litestar.testing import TestClient

from viralfx import OperationsPlugin

Ask: TypeAlias = Callable[[TestClient[Litestar]], object]
"""Sends requests, and returns everything that a client observes."""
LAYER_HEADERS = {"x-correlation-id"}
_OWN = re.compile(r"^(session|csrftoken)=[^;]+|(expires)=[^;]+")
"""Parts of cookies that differ between two equal applications."""


class Build:
    """Makes one application, without the plugin or with it, and keeps what its parts note."""

    def __init__(self, plugins: Sequence[OperationsPlugin] = ()) -> None:
        self._plugins = plugins
        self.noted: list[object] = []

    def __call__(self, *handlers: Any, **options: Any) -> Litestar:
        """Return an application; ``options`` are those of ``Litestar``."""
        plugins = [*options.pop("plugins", ()), *self._plugins]
        options = {"openapi_config": None, "logging_config": None} | options
        return Litestar(handlers, plugins=plugins, **options)

    def note(self, value: object) -> None:
        """Keep a value that is compared as the answers are."""
        self.noted.append(value)


Made: TypeAlias = tuple[Litestar, list[Ask]]
"""An application, and what its client asks it in this order."""
Case: TypeAlias = Callable[[Build], Made]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Add an application to the sample, by the name of its function."""
    CASES[function.__name__] = function
    return function


def _comparable(name: str, value: str) -> str:
    """Return a value without what differs between two equal applications."""
    if name == "allow":  # Litestar reads the methods from a set
        return ", ".join(sorted(value.split(", ")))
    return _OWN.sub(r"\1\2=", value)


def call(method: str, path: str, **options: Any) -> Ask:
    """Return a request; ``options`` are those of the client."""

    def ask(client: TestClient[Litestar]) -> object:
        response = client.request(method, path, follow_redirects=False, **options)
        headers = sorted(
            (name, _comparable(name, value))
            for name, value in response.headers.multi_items()
            if name not in LAYER_HEADERS
        )
        return response.status_code, headers, response.content

    return ask


def calls(*paths: str) -> list[Ask]:
    """Return requests with GET."""
    return [call("GET", path) for path in paths]


def talk(path: str, *messages: str, **options: Any) -> Ask:
    """Return a WebSocket that sends messages, and reads until the application closes it."""

    def ask(client: TestClient[Litestar]) -> object:
        received: list[object] = []
        try:
            with client.websocket_connect(path, **options) as socket:
                received.append(socket.accepted_subprotocol)
                extra = [
                    each
                    for each in socket.extra_headers or ()
                    if each[0].decode() not in LAYER_HEADERS
                ]
                received.append(extra)
                for message in messages:
                    socket.send_text(message)
                while True:
                    received.append(dict(socket.receive(timeout=20)))
        except WebSocketDisconnect as error:
            received.append((error.code, error.detail))
        except Exception as error:  # noqa: BLE001 - both have the same
            received.append((type(error), str(error)))
        return received

    return ask
