"""Signatures of webhooks, as defined by the Standard Webhooks specification, and their keys."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from viralfx.domain.webhooks.url import Destination, WebhookRefusedError, parse_destination

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


def show_key(key: bytes) -> str:
    """Return a key in the form that :func:`parse_secrets` parses."""
    return PREFIX + base64.b64encode(key).decode()


Keys = tuple[bytes, ...]


def parse_receiver_keys(text: str) -> dict[str, Keys]:
    """Parse ``RECEIVER=whsec_...`` entries, separated by commas or spaces, by origin.

    A receiver is ``hooks.example.com``, with a port or a scheme as in the allow list. Several keys
    of one receiver all sign. Raises ``ValueError``; the message contains no part of an entry.
    """
    keys: dict[str, Keys] = {}
    for number, entry in enumerate(text.replace(",", " ").split(), start=1):
        receiver, equals, secret = entry.partition("=")
        url = receiver if "://" in receiver else f"https://{receiver}"
        try:
            destination = parse_destination(url)
        except WebhookRefusedError:
            destination = None
        if not equals or destination is None or "/" in url.partition("://")[2] or "?" in url:
            raise ValueError(
                f"entry {number} is not RECEIVER=whsec_..., where RECEIVER is host, host:port or"
                " http://host"
            )
        try:
            (key,) = parse_secrets(secret)
        except ValueError:
            raise ValueError(f"entry {number} has a key that is not {_FORMAT}") from None
        keys[destination.origin] = (*keys.get(destination.origin, ()), key)
    return keys


_WEBHOOK, _ALERT, _PROOF = "webhook", "alert", "alert proof"


def derived_key(secret: bytes, purpose: str, origin: str) -> bytes:
    """Return the key of one receiver for one purpose; it reveals nothing about other keys.

    It is HMAC-SHA256 of the secret over ``viralfx PURPOSE key 1``, a line feed and the origin.
    """
    return hmac.digest(secret, f"viralfx {purpose} key 1\n{origin}".encode(), hashlib.sha256)


class WebhookKeys:
    """The signing keys: one for each receiver, and others for alerts.

    A receiver can forge no webhook for another receiver and no alert. A client that submits jobs,
    or writes to the ledger, gets no signature of an alert: an alert needs a proof for its job,
    which only a process with the secret makes.
    """

    def __init__(
        self,
        secrets: Iterable[bytes] = (),
        *,
        own: Mapping[str, Keys] = MappingProxyType({}),
        alerts: Iterable[bytes] = (),
        shared: Iterable[bytes] = (),
    ) -> None:
        """Derive keys from ``secrets``; several sign at once, so that one can be replaced.

        ``own``: keys of single receivers by origin, in place of derived ones. ``alerts``: keys of
        alerts, in place of derived ones. ``shared``: keys that sign everything in addition, for
        receivers that do not have a key of their own yet.
        """
        self._secrets = tuple(secrets)
        self._own = own
        self._alerts = tuple(alerts)
        self._shared = tuple(shared)
        roots = self._alerts or self._secrets
        self._proving = tuple(derived_key(each, _PROOF, "") for each in roots)

    def of_receiver(self, destination: Destination) -> Keys:
        """Return the keys that the receiver verifies webhooks by; empty: there is none."""
        return self._own.get(destination.origin) or self._derived(_WEBHOOK, destination)

    def of_alerts(self, destination: Destination) -> Keys:
        """Return the keys that the receiver verifies alerts by; empty: there is none."""
        return self._alerts or self._derived(_ALERT, destination)

    def webhook_signer(self, destination: Destination) -> "Signer | None":
        """Return the signer of a webhook; None if there is no key."""
        return _signer(*self.of_receiver(destination), *self._shared)

    def alert_signer(self, destination: Destination, *, proven: bool) -> "Signer | None":
        """Return the signer of an alert; None if there is no key for it.

        An alert without a proof gets at most the signature that all receivers can make.
        """
        return _signer(*(self.of_alerts(destination) if proven else ()), *self._shared)

    def prove(self, job_id: str, kind: str, data: Mapping[str, Any]) -> str | None:
        """Return the proof that this service made an alert; None without a secret."""
        return " ".join(self._proofs(job_id, kind, data)) or None

    def proves(self, proof: str | None, job_id: str, kind: str, data: Mapping[str, Any]) -> bool:
        """Return True for the proof of this alert in this job, by any of the secrets."""
        given = (proof or "").encode().split()
        made = [each.encode() for each in self._proofs(job_id, kind, data)]
        return any(hmac.compare_digest(one, other) for one in given for other in made)

    def _derived(self, purpose: str, destination: Destination) -> Keys:
        return tuple(derived_key(each, purpose, destination.origin) for each in self._secrets)

    def _proofs(self, job_id: str, kind: str, data: Mapping[str, Any]) -> list[str]:
        content = json.dumps([job_id, kind, data], sort_keys=True).encode()
        return [hmac.new(key, content, hashlib.sha256).hexdigest() for key in self._proving]


def _signer(*keys: bytes) -> "Signer | None":
    return Signer(keys) if keys else None


class Signer:
    """Signs with every key, so that keys can be replaced without downtime."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """``secrets`` are keys as of :func:`parse_secrets`. Raises ``ValueError`` if empty."""
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
