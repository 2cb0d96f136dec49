"""Who may do what: bearer tokens, compared in constant time."""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from viralfx.settings import Settings

Headers = Iterable[tuple[bytes, bytes]]
"""Request headers as ASGI gives them: names in lower case."""


class Verdict(Enum):
    """What to answer to who asks."""

    ALLOWED = auto()
    UNAUTHORIZED = auto()
    """401: no token came, or a wrong one."""
    FORBIDDEN = auto()
    """403: no token is configured, so nobody may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPolicy:
    """The rules of the operations endpoints."""

    token: bytes | None
    details_need_token: bool

    @classmethod
    def from_settings(cls, settings: Settings) -> "AccessPolicy":
        """Take the rules from MANAGEMENT_TOKEN and HEALTH_DETAILS."""
        secret = settings.management_token
        return cls(
            token=secret.value.strip().encode() if secret else None,
            details_need_token=settings.health_details == "authorized",
        )

    def to_details(self, headers: Headers) -> Verdict:
        """Judge a request for the details of checks."""
        return self.to_shutdown(headers) if self.details_need_token else Verdict.ALLOWED

    def to_shutdown(self, headers: Headers) -> Verdict:
        """Judge a request to see or begin the shutdown."""
        return judge_bearer(headers, self.token)

    def to_change(self, headers: Headers) -> Verdict:
        """Judge a request to change how the process runs, such as the level of a logger."""
        return judge_bearer(headers, self.token)


def judge_bearer(headers: Headers, expected: bytes | None) -> Verdict:
    """Compare the bearer token of a request with the one that is configured, if one is."""
    if expected is None:
        return Verdict.FORBIDDEN
    given = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    right = scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), expected)
    return Verdict.ALLOWED if right else Verdict.UNAUTHORIZED
