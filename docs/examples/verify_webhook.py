"""What a receiver does with a webhook of ours: verify it before believing a word of it."""

import base64
import hashlib
import hmac
from collections.abc import Mapping

TOLERANCE = 5 * 60


def verify(headers: Mapping[str, str], body: bytes, secret: str, now: float) -> str:
    """Return the id of the message, to be handled once. Raises ``ValueError`` for a forgery.

    ``headers`` have small letters, ``body`` is as it came, ``now`` is the Unix time.
    """
    message_id, seconds = headers["webhook-id"], headers["webhook-timestamp"]
    if abs(now - int(seconds)) > TOLERANCE:
        raise ValueError("the webhook is too old: it may have been recorded")
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{message_id}.{seconds}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    signatures = headers["webhook-signature"].split(" ")
    if not any(hmac.compare_digest(f"v1,{expected}", each) for each in signatures):
        raise ValueError("the webhook is signed by somebody else")
    return message_id
