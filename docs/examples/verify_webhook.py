"""Verifies the signature of a webhook, as a receiver must before using its content."""

import base64
import hashlib
import hmac
from collections.abc import Mapping

TOLERANCE = 5 * 60


def verify(headers: Mapping[str, str], body: bytes, secret: str, now: float) -> str:
    """Return the id of the message; handle each id once. Raises ``ValueError`` for a forgery.

    The names of ``headers`` are lower case, ``body`` is unchanged, ``now`` is the Unix time.
    """
    message_id, seconds = headers["webhook-id"], headers["webhook-timestamp"]
    if abs(now - int(seconds)) > TOLERANCE:
        raise ValueError("the webhook is too old: it may be a replay")
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{message_id}.{seconds}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    signatures = headers["webhook-signature"].split(" ")
    if not any(hmac.compare_digest(f"v1,{expected}", each) for each in signatures):
        raise ValueError("the webhook is not signed with this secret")
    return message_id
