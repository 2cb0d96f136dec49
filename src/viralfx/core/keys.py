"""Idempotency keys: those of names, and all others, as a ledger stores them.

The two kinds never meet, and neither do the keys of two names.
"""

import hashlib
from dataclasses import dataclass
from urllib.parse import quote, unquote

_MARK, _GAP = "@", " "
_MAX_NAME_CHARACTERS = 128
"""Of an encoded name; a digest replaces a longer one."""
_DIGEST = "sha256:"
"""An encoded name has no colon."""


@dataclass(frozen=True, slots=True)
class NamedKey:
    """An idempotency key that belongs to a name: each name may use the same text."""

    name: str
    text: str

    @property
    def stored(self) -> str:
        """The key in a ledger, ``@NAME TEXT``. An encoded name has no space, so the first ends it.

        At most 130 characters longer than the text.
        """
        return f"{_MARK}{_encoded(self.name)}{_GAP}{self.text}"


def _encoded(name: str) -> str:
    encoded = quote(name, safe="", errors="surrogatepass")
    if len(encoded) <= _MAX_NAME_CHARACTERS:
        return encoded
    return f"{_DIGEST}{hashlib.sha256(encoded.encode()).hexdigest()}"


def stored_key(key: object) -> str | None:
    """Return a key as a ledger stores it: a text stays as it is.

    Raises ``ValueError`` for an empty text, and for one that has the form of a name's key.
    """
    if key is None:
        return None
    text = key.text if isinstance(key, NamedKey) else key
    if not isinstance(text, str) or not text:
        raise ValueError(f"key must be a text that is not empty: {text!r}")
    if isinstance(key, NamedKey):
        return key.stored
    if _is_named(text):
        raise ValueError(
            f"key must not begin with {_MARK!r} and have a space: {text!r} is the form of keys that"
            " belong to the names of TOKENS"
        )
    return text


def _is_named(stored: str) -> bool:
    return stored.startswith(_MARK) and _GAP in stored


def owner_and_text(stored: str | None) -> tuple[str | None, str | None]:
    """Return the name that owns a stored key, None if all others do, and the text of the key."""
    if stored is None or not _is_named(stored):
        return None, stored
    name, _, text = stored.removeprefix(_MARK).partition(_GAP)
    return unquote(name, errors="surrogatepass"), text
