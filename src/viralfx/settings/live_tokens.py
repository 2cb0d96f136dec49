"""The tokens of the moment: those in files are read again while the process runs."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from viralfx.domain.access import Principal
from viralfx.settings.groups import Secret
from viralfx.settings.model import Settings
from viralfx.settings.rotation import READ_INTERVAL_SECONDS, mask, rotating_path
from viralfx.settings.strength import equal_tokens, weakness
from viralfx.settings.tokens import MAX_SECRETS, Token, TokenBook

_logger = logging.getLogger("viralfx.credentials")

MANAGEMENT_TOKEN = "MANAGEMENT_TOKEN"
API_TOKEN = "API_TOKEN"


@dataclass(slots=True)
class _Source:
    """A variable whose value may change, since a file holds it."""

    variable: str
    path: Path
    failing: bool = False


class LiveTokens:
    """MANAGEMENT_TOKEN and API_TOKEN, each with one value, or with two during a rotation.

    A value that came from a file is read again, at most once a second and when a request needs it.
    A file that cannot be read, is empty, or holds a value that the start would refuse, is logged as
    an error once, and the last values stay in use. New values are masked in the log.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._strict = settings.environment == "production"
        self._values: dict[str, Secret] = {
            variable: secret
            for variable, secret in (
                (MANAGEMENT_TOKEN, settings.management_token),
                (API_TOKEN, settings.api_token),
            )
            if secret is not None and secret.value.strip()
        }
        self._sources = [
            _Source(variable, path)
            for variable, secret in self._values.items()
            if (path := rotating_path(secret)) is not None
        ]
        self._clock = clock
        self._read_at = clock()
        self._book = self._made()

    @property
    def book(self) -> TokenBook:
        """The tokens of now."""
        if self._sources and self._clock() - self._read_at >= READ_INTERVAL_SECONDS:
            self._read_at = self._clock()
            # Each one is read: `any` would end at the first that has changed.
            if sum(self._read(source) for source in self._sources):
                self._book = self._made()
        return self._book

    def identify(self, secret: bytes) -> Principal | None:
        """Return the holder of a secret; None for an unknown one."""
        return self.book.identify(secret)

    def find(self, name: str) -> Token | None:
        """Return the token of a name; None if there is none."""
        return self.book.find(name)

    def _made(self) -> TokenBook:
        values = self._values
        return TokenBook.of(
            None, management=values.get(MANAGEMENT_TOKEN), api=values.get(API_TOKEN)
        )

    def _read(self, source: _Source) -> bool:
        """Read a file; return True if it holds other tokens than before."""
        try:
            text = source.path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            return self._keep(source, f"cannot read {source.path}: {reason}")
        before = self._values[source.variable]
        if text == before.value:
            source.failing = False
            return False
        if problem := self._problem(source.variable, text):
            return self._keep(source, f"{source.path} {problem}")
        source.failing = False
        for secret in text.split():
            mask(secret)
        self._values[source.variable] = Secret(text, file=before.file)
        _logger.info("Secret changed", extra={"variable": f"{source.variable}_FILE"})
        return True

    def _problem(self, variable: str, text: str) -> str | None:
        """Return why the start would refuse a value, as a predicate."""
        secrets = text.split()
        if not secrets:
            return "is empty"
        if len(secrets) > MAX_SECRETS:
            return f"holds {len(secrets)} tokens; keep at most {MAX_SECRETS}"
        if not self._strict:
            return None
        if weak := next(filter(None, map(weakness, secrets)), None):
            return f"holds a token that {weak}"
        values = {name: secret.value for name, secret in self._values.items()} | {variable: text}
        return "holds the token of another name" if any(equal_tokens(values)) else None

    def _keep(self, source: _Source, reason: str) -> bool:
        if not source.failing:
            _logger.error(
                "Token file is not usable; the last tokens stay in use",
                extra={"variable": f"{source.variable}_FILE", "reason": reason},
            )
        source.failing = True
        return False
