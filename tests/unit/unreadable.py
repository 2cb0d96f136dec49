"""Errors and retry policies whose own code fails while the worker settles their job."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

from viralfx.jobs.tasks import Snooze


class Bare(Snooze):
    """Has no seconds."""

    def __init__(self) -> None:
        Exception.__init__(self, "later")


class Later(Snooze):
    """Has seconds that no check has seen."""

    def __init__(self, seconds: Any) -> None:
        Exception.__init__(self, "later")
        self.seconds = seconds


class MuteError(Exception):
    """Exits when its text is read."""

    def __str__(self) -> str:
        raise SystemExit(9)


class MuteExit(BaseException):
    """The same for an error that a task does not have, usually."""

    def __str__(self) -> str:
        raise KeyboardInterrupt


class _Text(str):
    __slots__ = ()

    def __getitem__(self, _: Any, /) -> str:
        raise RuntimeError("planted: no part")

    def replace(self, *_: Any) -> str:
        """Raise an error."""
        raise RuntimeError("planted: no other text")

    def rstrip(self, *_: Any) -> str:
        """Raise an error."""
        raise RuntimeError("planted: no other text")


class TextedError(Exception):
    """Its text is of a class with methods of its own."""

    def __str__(self) -> str:
        return _Text("a text of its own")


class NotedError(Exception):
    """Exits when its notes are read."""

    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        raise SystemExit(4)


class HintedError(Exception):
    """Exits when its hint for a retry is read."""

    @property
    def retry_after(self) -> float:
        """Exit."""
        raise SystemExit(1)


class DisguisedError(Exception):
    """Raises when its class is asked for."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("planted: no class")


class DisguisedExit(BaseException):
    """Exits when its class is asked for."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise SystemExit(2)


class _Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise SystemExit(3)


class NamelessError(Exception, metaclass=_Nameless):
    """Exits when the name of its type is read, and has no text."""


class NamelessExit(BaseException, metaclass=_Nameless):
    """The same for an error that a task does not have, usually."""


class DelegatingError(Exception):
    """Looks for all attributes in one that it does not have."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.response, name)


class Repeated(asyncio.CancelledError):
    """Raises itself when its text is read."""

    def __str__(self) -> str:
        raise self


ERRORS: dict[str, Callable[[], BaseException]] = {
    "snooze without seconds": Bare,
    "snooze of a timedelta": lambda: Later(timedelta(seconds=1)),
    "snooze of a text": lambda: Later("1"),
    "snooze of not a number": lambda: Later(float("nan")),
    "snooze without end": lambda: Later(float("inf")),
    "snooze into the past": lambda: Later(-1.0),
    "text": MuteError,
    "text of an exit": MuteExit,
    "class of the text": TextedError,
    "notes": NotedError,
    "hint": HintedError,
    "class": DisguisedError,
    "class of an exit": DisguisedExit,
    "name": NamelessError,
    "name of an exit": NamelessExit,
    "attributes": DelegatingError,
    "itself": Repeated,
}


class Answers:
    """A policy that answers with anything."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def next_delay(self, _attempt: int, _error: Exception) -> Any:
        """Return the answer."""
        return self.answer


class Asynchronous:
    """A policy whose answer has to be awaited."""

    async def next_delay(self, _attempt: int, _error: Exception) -> float:
        """Return a second."""
        return 1.0


class Exits:
    """A policy that exits."""

    def next_delay(self, _attempt: int, _error: Exception) -> float:
        """Exit."""
        raise SystemExit(3)


class NamelessPolicy(Exits, metaclass=_Nameless):
    """A policy that exits, also when the name of its type is read."""


class DisguisedPolicy(Exits):
    """A policy that exits, also when its class is asked for."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise SystemExit(2)


POLICIES: dict[str, Any] = {
    "a timedelta": Answers(timedelta(seconds=1)),
    "a text": Answers("1"),
    "not a number": Answers(float("nan")),
    "a decimal that is not a number": Answers(Decimal("nan")),
    "a coroutine": Asynchronous(),
    "an exit": Exits(),
    "an exit without a name": NamelessPolicy(),
    "an exit in disguise": DisguisedPolicy(),
}
"""They answer with no number of seconds."""
