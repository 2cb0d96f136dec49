"""The tokens of the moment: those in files are read again while the process runs."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from viralfx.domain.access import Principal
from viralfx.settings.groups import Secret
from viralfx.settings.model import Settings
from viralfx.settings.rotation import READ_INTERVAL_SECONDS, mask, rotating_path
from viralfx.settings.strength import weaknesses
from viralfx.settings.tokens import MAX_SECRETS, Token, TokenBook, place_of

_logger = logging.getLogger("viralfx.credentials")

_VARIABLES = ("MANAGEMENT_TOKEN", "API_TOKEN", "TOKENS")


@dataclass(slots=True)
class _Source:
    """A variable whose value may change, since a file holds it."""

    variable: str
    path: Path
    failing: bool = False


class LiveTokens:
    """The tokens of MANAGEMENT_TOKEN, API_TOKEN and TOKENS.

    A value that came from a file is read again, at most once a second and when a request needs it.
    A file that cannot be read, is empty, or holds a value that the start would refuse, is logged as
    an error once, and the last values stay in use. New values are masked in the log.

    Raises ``ValueError`` if TOKENS is invalid.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._strict = settings.in_production
        given = (settings.management_token, settings.api_token, settings.tokens)
        self._values: dict[str, Secret] = {
            variable: secret
            for variable, secret in zip(_VARIABLES, given, strict=True)
            if secret is not None and secret.value.strip()
        }
        self._sources = [
            _Source(variable, path)
            for variable, secret in self._values.items()
            if (path := rotating_path(secret)) is not None
        ]
        self._clock = clock
        self._read_at = clock()
        self._book = _book(self._values)

    @property
    def book(self) -> TokenBook:
        """The tokens of now."""
        if self._sources and self._clock() - self._read_at >= READ_INTERVAL_SECONDS:
            self._read_at = self._clock()
            self._read()
        return self._book

    def identify(self, secret: bytes) -> Principal | None:
        """Return the holder of a secret; None for an unknown one."""
        return self.book.identify(secret)

    def find(self, name: str) -> Token | None:
        """Return the token of a name; None if there is none."""
        return self.book.find(name)

    def _read(self) -> None:
        """Read the files, and use the tokens in them if they are others than before."""
        changed = [
            (source, text)
            for source in self._sources
            if (text := self._changed_text(source)) is not None
        ]
        # Together first: a secret that moves to another variable is in both for a moment.
        if len(changed) > 1 and self._use(changed) is None:
            return
        for source, text in changed:
            if (problem := self._use([(source, text)])) is not None:
                self._keep(source, f"{source.path} {problem}")

    def _changed_text(self, source: _Source) -> str | None:
        """Return the content of a file; None if it is as before, or cannot be read."""
        try:
            text = source.path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            self._keep(source, f"cannot read {source.path}: {reason}")
            return None
        if text != self._values[source.variable].value:
            return text
        source.failing = False
        return None

    def _use(self, changed: Sequence[tuple[_Source, str]]) -> str | None:
        """Use the contents of files; return the reason, as a predicate, if they are refused."""
        values = dict(self._values)
        for source, text in changed:
            values[source.variable] = Secret(text, file=values[source.variable].file)
        try:
            for source, _ in changed:
                _require_tokens(values, source.variable)
            book = self._checked(values)
        except ValueError as error:
            return str(error)
        for token in book.tokens:
            for secret in token.secrets:
                mask(secret.decode("utf-8", "surrogateescape"))
        self._values, self._book = values, book
        for source, _ in changed:
            source.failing = False
            _logger.info("Secret changed", extra={"variable": f"{source.variable}_FILE"})
        return None

    def _checked(self, values: Mapping[str, Secret]) -> TokenBook:
        """Return a book. Raises ``ValueError`` with the reason, as a predicate, to refuse it."""
        try:
            book = _book(values)
        except ValueError as error:
            raise ValueError(f"is not valid: {str(error).replace(chr(10), '; ')}") from None
        if self._strict:
            for name, problem in weaknesses(book.tokens):
                raise ValueError(f"is refused: {place_of(name)} {problem}")
        return book

    def _keep(self, source: _Source, reason: str) -> None:
        if not source.failing:
            _logger.error(
                "Token file is not usable; the last tokens stay in use",
                extra={"variable": f"{source.variable}_FILE", "reason": reason},
            )
        source.failing = True


def _require_tokens(values: Mapping[str, Secret], variable: str) -> None:
    """Raise ``ValueError`` with the reason, as a predicate, for no token and for too many."""
    words = values[variable].value.split()
    if not words:
        raise ValueError("is empty")
    if variable != "TOKENS" and len(words) > MAX_SECRETS:
        raise ValueError(f"holds {len(words)} tokens; keep at most {MAX_SECRETS}")


def _book(values: Mapping[str, Secret]) -> TokenBook:
    return TokenBook.of(
        values.get("TOKENS"), management=values.get("MANAGEMENT_TOKEN"), api=values.get("API_TOKEN")
    )
