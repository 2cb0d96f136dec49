"""Signatures as the Standard Webhooks specification has them, so that any receiver can verify."""

import base64
import hashlib
import hmac
from collections.abc import Iterable, Mapping

PREFIX = "whsec_"
_LEAST, _MOST = 24, 64


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """Read secrets like ``whsec_<base64 of 24 to 64 bytes>``, separated by commas or spaces.

    Raises ``ValueError`` for any other; its message holds nothing of a secret.
    """
    written = text.replace(",", " ").split()
    if not written:
        raise ValueError(
            f"there is no secret; one is {PREFIX} and the base64 of {_LEAST} to {_MOST} bytes"
        )
    return tuple(_key(number, secret) for number, secret in enumerate(written, start=1))


def _key(number: int, secret: str) -> bytes:
    prefix, encoded = secret[: len(PREFIX)], secret[len(PREFIX) :]
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        key = b""
    if prefix != PREFIX or not _LEAST <= len(key) <= _MOST:
        raise ValueError(
            f"secret {number} is not {PREFIX} followed by the base64 of {_LEAST} to {_MOST} bytes"
        )
    return key


class Signer:
    """Signs with every one of its secrets, so that receivers may change theirs in their own time.

    Put the new secret beside the old one, have the receivers change, take the old one away.
    """

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """Take keys as :func:`parse_secrets` gives them; raises ``ValueError`` for none."""
        self._keys = tuple(secrets)
        if not self._keys:
            raise ValueError("a signer needs at least one secret")

    def sign(self, message_id: str, seconds: int, body: bytes) -> str:
        """Return the value of ``webhook-signature``: one ``v1,<base64>`` for each secret."""
        signed = b"%s.%d.%s" % (message_id.encode(), seconds, body)
        digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in self._keys)
        return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def webhook_headers(
    signer: Signer | None, message_id: str, seconds: int, body: bytes
) -> Mapping[str, str]:
    """Return what tells a receiver which message this is, when it was sent and by whom.

    ``seconds`` is the Unix time of this attempt; ``message_id`` is the same in every attempt.
    Without a signer it is not said by whom.
    """
    headers = {"webhook-id": message_id, "webhook-timestamp": str(seconds)}
    if signer is not None:
        headers["webhook-signature"] = signer.sign(message_id, seconds, body)
    return headers
