"""The codec of jobs, by msgspec: strict, and with one decoder for each type."""

from typing import Any

import msgspec

from viralfx.domain.jobs.codec import PayloadError, ResultError
from viralfx.domain.jobs.nesting import MOST, is_too_deep


class MsgspecCodec:
    """Implements :class:`viralfx.domain.jobs.codec.Codec`.

    Strict: a number that came as text is none. A message names the place as a path, ``$`` being
    the payload.
    """

    def __init__(self) -> None:
        self._decoders: dict[object, msgspec.json.Decoder[Any]] = {}
        self._encode = msgspec.json.Encoder().encode

    def learn(self, type_: Any) -> None:
        """Prepare for a type. Raises ``TypeError`` for one that no JSON can be decoded into."""
        self._decoder(type_)

    def decode(self, payload: bytes, type_: Any) -> Any:
        """Decode a payload. Raises :class:`PayloadError`."""
        if is_too_deep(payload):
            raise PayloadError(f"it is nested more than {MOST} levels deep")
        try:
            if not payload.isascii():
                payload.decode()  # what the type has no place for is not looked at by the decoder
            return self._decoder(type_).decode(payload)
        except msgspec.MsgspecError as error:
            raise PayloadError(str(error)) from None
        except UnicodeDecodeError:
            raise PayloadError("it is not UTF-8 text") from None
        except RecursionError:
            raise PayloadError("it is nested too deep for its type") from None

    def encode(self, result: object) -> bytes:
        """Encode a result. Raises :class:`ResultError`."""
        try:
            return self._encode(result)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ResultError(f"{type(result).__name__} has no JSON: {error}") from None

    def _decoder(self, type_: Any) -> "msgspec.json.Decoder[Any]":
        try:
            found = self._decoders.get(type_)
        except TypeError:  # an annotation that cannot be hashed
            return msgspec.json.Decoder(type_)
        if found is None:
            found = self._decoders[type_] = msgspec.json.Decoder(type_)
        return found
