"""The codec port: between the JSON of a job and the values of a task."""

from typing import Any, Protocol


class PayloadError(ValueError):
    """A payload does not fit the task's type; the message says where and why."""


class ResultError(ValueError):
    """A task's result has no JSON."""


class Codec(Protocol):
    """Port: decodes payloads by type and encodes results."""

    def decode(self, payload: bytes, type_: Any) -> Any:
        """Decode a payload. Raises :class:`PayloadError`."""
        ...

    def encode(self, result: object) -> bytes:
        """Encode a result. Raises :class:`ResultError`."""
        ...
