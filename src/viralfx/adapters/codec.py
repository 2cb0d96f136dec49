"""The codec of job payloads and results, on msgspec."""

from typing import Any

import msgspec

from viralfx.domain.errors import text_of
from viralfx.domain.jobs.codec import MAX_NESTING_LEVELS, PayloadError, ResultError, is_too_deep


class MsgspecCodec:
    """Implements :class:`viralfx.domain.jobs.codec.Codec`.

    Decoding is strict: text is not accepted as a number. Error messages name the position as a
    path that starts with ``$``, the payload. Each type has one decoder.
    """

    def __init__(self) -> None:
        self._decoders: dict[object, msgspec.json.Decoder[Any]] = {}
        self._encode = msgspec.json.Encoder().encode

    def learn(self, type_: Any) -> None:
        """Prepare the decoder of a type. Raises ``TypeError`` for an unsupported type."""
        self._decoder(type_)

    def decode(self, payload: bytes, type_: Any) -> Any:
        """Decode a payload. Raises :class:`PayloadError`."""
        if is_too_deep(payload):
            raise PayloadError(f"it is nested more than {MAX_NESTING_LEVELS} levels deep")
        try:
            if not payload.isascii():
                payload.decode()  # the decoder skips unknown fields without checking their encoding
            return self._decoder(type_).decode(payload)
        except msgspec.MsgspecError as error:
            raise PayloadError(str(error)) from None
        except UnicodeDecodeError:
            raise PayloadError("it is not UTF-8 text") from None
        except RecursionError:
            raise PayloadError("it is nested too deep for its type") from None
        except Exception:
            raise
        except BaseException as error:
            # From the code of the type: such an exception would end the process.
            raise PayloadError(f"its type raised {type(error).__name__}") from error

    def encode(self, result: object) -> bytes:
        """Encode a result. Raises :class:`ResultError` for any error of the objects in it."""
        try:
            document = self._encode(result)
            if isinstance(result, msgspec.Raw):
                self.decode(document, msgspec.Raw)  # the encoder does not look into it
        except BaseException as error:  # noqa: BLE001 - an object's own code may raise anything
            raise ResultError(f"{type(result).__name__} has no JSON: {text_of(error)}") from None
        if is_too_deep(document):
            raise ResultError(
                f"{type(result).__name__} has more than {MAX_NESTING_LEVELS} levels of JSON"
            )
        return document

    def _decoder(self, type_: Any) -> "msgspec.json.Decoder[Any]":
        try:
            found = self._decoders.get(type_)
        except TypeError:  # an annotation that cannot be hashed
            return msgspec.json.Decoder(type_)
        if found is None:
            found = self._decoders[type_] = msgspec.json.Decoder(type_)
        return found
