"""Bearer tokens: which secret belongs to which name, and the rights of that name."""

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from viralfx.core.errors import suggest
from viralfx.domain.access import ANONYMOUS, Principal, Right
from viralfx.settings.groups import Secret

MANAGEMENT = Principal(name="management", right=Right.ADMIN, shares_keys=True)
"""The holder of MANAGEMENT_TOKEN."""
API = Principal(name="api", submits=("*",), reads=("*",), operates=("*",), shares_keys=True)
"""The holder of API_TOKEN: every action of the jobs API."""
MAX_SECRETS = 2
"""Secrets of one name: during a rotation the new one and the old one."""

VARIABLES = {MANAGEMENT.name: "MANAGEMENT_TOKEN", API.name: "API_TOKEN"}
"""The variables of the names that are not in TOKENS."""

RESERVED = frozenset({*VARIABLES, ANONYMOUS.name})
"""Names that neither TOKENS nor an application gives."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}").fullmatch
_RIGHTS = {"read": Right.READ, "operate": Right.OPERATE, "admin": Right.ADMIN}
_SCOPES = ("submit", "read", "operate")
_SHAPE = "write NAME RIGHTS SECRET, with a second SECRET during a rotation"
_EXPECTED = "use read, operate, admin, submit:TASK, read:QUEUE and operate:QUEUE"
_MIN_FIELDS = 3


@dataclass(frozen=True, slots=True)
class Token:
    """A name with its rights, and the secrets that prove it."""

    principal: Principal
    secrets: tuple[bytes, ...] = field(repr=False)


class TokenBook:
    """All tokens of a process.

    The time of :meth:`identify` depends on the number of secrets alone.
    """

    __slots__ = ("_digests", "tokens")

    def __init__(self, tokens: Iterable[Token] = ()) -> None:
        self.tokens = tuple(tokens)
        """The tokens, each name once."""
        # Digests have one length, so a comparison does not tell the length of a secret.
        self._digests = tuple(
            (_digest(secret), token.principal) for token in self.tokens for secret in token.secrets
        )

    @classmethod
    def of(
        cls, tokens: Secret | None, *, management: Secret | None = None, api: Secret | None = None
    ) -> "TokenBook":
        """Return the book of TOKENS, MANAGEMENT_TOKEN and API_TOKEN.

        Raises ``ValueError`` with all problems of TOKENS, one line each, and no part of a secret.
        """
        found: list[Token] = []
        for principal, secret in ((MANAGEMENT, management), (API, api)):
            if secret is not None:
                found.append(Token(principal, secrets_of(secret)))
        return cls([*found, *parse_tokens("" if tokens is None else tokens.value)])

    def __bool__(self) -> bool:
        """Return True if there is a token."""
        return bool(self._digests)

    def identify(self, secret: bytes) -> Principal | None:
        """Return the holder of a secret; None for an unknown one.

        A secret of several names has the first name, and the rights of all.
        """
        given, found = _digest(secret), None
        for digest, principal in self._digests:
            # Every digest is compared, so that the time does not tell which one is equal.
            if hmac.compare_digest(given, digest):
                found = principal if found is None else found.joined(principal)
        return found

    def find(self, name: str) -> Token | None:
        """Return the token of a name; None if there is none."""
        return next((token for token in self.tokens if token.principal.name == name), None)


def secrets_of(secret: Secret) -> tuple[bytes, ...]:
    """Return the secrets in MANAGEMENT_TOKEN or API_TOKEN, which white space separates."""
    return tuple(part.encode("utf-8", "surrogateescape") for part in secret.value.split())


def parse_tokens(text: str) -> tuple[Token, ...]:
    """Return the tokens that the text of TOKENS describes.

    Each line, or part of one between ``;``, has the fields NAME RIGHTS SECRET [SECRET]. A line that
    begins with ``#`` is a comment. Raises ``ValueError`` with all problems, one line each. It names
    lines by their numbers, and shows no field: a missing one moves a secret to another place.
    """
    tokens: list[Token] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        for part in filter(str.strip, line.split(";")):
            try:
                token = _token(part.split())
                if any(token.principal.name == each.principal.name for each in tokens):
                    raise ValueError("the name is there already; choose another")  # noqa: TRY301
                tokens.append(token)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(tokens)


def _token(fields: list[str]) -> Token:
    if any(text.startswith("#") for text in fields[1:]):  # it would be a secret
        raise ValueError("has a comment behind its fields; write it on a line of its own")
    if not _MIN_FIELDS <= len(fields) <= _MIN_FIELDS - 1 + MAX_SECRETS:
        raise ValueError(f"has {len(fields)} fields; {_SHAPE}")
    name, rights, *secrets = fields
    if not _NAME(name):
        raise ValueError(
            "the first field is no name; a name has at most 64 letters, digits, '.', '_' and '-',"
            " and begins with a letter"
        )
    if name.lower() in RESERVED:
        raise ValueError(f"the name {name.lower()} is reserved; choose another")
    return Token(
        _principal(name, rights),
        tuple(secret.encode("utf-8", "surrogateescape") for secret in secrets),
    )


def _principal(name: str, rights: str) -> Principal:
    right = Right.NONE
    scopes: dict[str, list[str]] = {scope: [] for scope in _SCOPES}
    for text in rights.split(","):
        word, colon, pattern = text.partition(":")
        if not colon and word in _RIGHTS:
            right = max(right, _RIGHTS[word])
        elif word in scopes and pattern:
            scopes[word].append(pattern)
        else:
            close = suggest(word, dict.fromkeys((*_RIGHTS, *_SCOPES)))
            raise ValueError(f"the second field is no list of rights; {close or _EXPECTED}")
    return Principal(
        name=name,
        right=right,
        submits=tuple(scopes["submit"]),
        reads=tuple(scopes["read"]),
        operates=tuple(scopes["operate"]),
    )


def place_of(name: str) -> str:
    """Return where the token of a name is: its variable, or the name in TOKENS."""
    return VARIABLES.get(name) or f"{name} in TOKENS"


def describe(principal: Principal) -> Iterator[str]:
    """Yield the rights of a caller as TOKENS writes them."""
    if principal.right is not Right.NONE:
        yield principal.right.name.lower()
    for scope, patterns in (
        ("submit", principal.submits),
        ("read", principal.reads),
        ("operate", principal.operates),
    ):
        yield from (f"{scope}:{pattern}" for pattern in patterns)


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
