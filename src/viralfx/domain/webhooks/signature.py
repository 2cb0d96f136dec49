"""Signatures of webhooks, as defined by the Standard Webhooks specification."""

import base64
import hashlib
import hmac
from collections.abc import Iterable, Mapping

PREFIX = "whsec_"
MIN_KEY_BYTES, MAX_KEY_BYTES = 24, 64
_FORMAT = f"{PREFIX} followed by the base64 of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes"


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """Parse secrets like ``whsec_<base64 of 24 to 64 bytes>``, separated by commas or spaces.

    Raises ``ValueError`` for any other text; the message contains no part of a secret.
    """
    written = text.replace(",", " ").split()
    if not written:
        raise ValueError(f"there is no secret; a secret is {_FORMAT}")
    return tuple(_key(number, secret) for number, secret in enumerate(written, start=1))


def _key(number: int, secret: str) -> bytes:
    prefix, encoded = secret[: len(PREFIX)], secret[len(PREFIX) :]
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        key = b""
    if prefix != PREFIX or not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"secret {number} is not {_FORMAT}")
    return key


class Signer:
    """Signs with every configured secret, so that secrets can be rotated without downtime.

    To rotate: add the new secret, let the receivers switch to it, then remove the old secret.
    """

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """``secrets`` are keys from :func:`parse_secrets`. Raises ``ValueError`` if empty."""
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
    """Return the headers with the message id, the time of the attempt, and the signature.

    ``seconds`` is the Unix time of this attempt; ``message_id`` is the same in every attempt.
    Without a signer there is no signature.
    """
    headers = {"webhook-id": message_id, "webhook-timestamp": str(seconds)}
    if signer is not None:
        headers["webhook-signature"] = signer.sign(message_id, seconds, body)
    return headers
