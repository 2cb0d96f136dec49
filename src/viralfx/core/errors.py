"""Base classes of the package's errors, text and origin of any error, and checks of arguments."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeGuard, TypeVar

T = TypeVar("T")


class ViralFXError(Exception):
    """Base class of every error that this package defines."""


class Problem(NamedTuple):  # not a dataclass: a probe must stay cheap, and that imports inspect
    """A problem of the configuration, and its remedy."""

    variable: str
    """The variable, option or part that has the problem; empty if the text names it itself."""
    what: str
    remedy: str = ""
    """Empty: the text says it."""

    @classmethod
    def of_text(cls, variable: str, text: str) -> "Problem":
        """Return the problem that a parser's text states, with its remedy after the last ``;``."""
        what, _, remedy = text.rpartition("; ")
        return cls(variable, what, remedy) if what and remedy else cls(variable, text)

    @classmethod
    def of_line(cls, line: str) -> "Problem":
        """Return the problem whose line this is: ``str`` of it is the line again."""
        variable, colon, text = line.partition(": ")
        return cls.of_text(variable, text) if colon and text else cls.of_text("", line)

    @property
    def found(self) -> str:
        """The line without the remedy."""
        return f"{self.variable}: {self.what}" if self.variable else self.what

    def __str__(self) -> str:
        """Return the line that a person reads."""
        return f"{self.found}; {self.remedy}" if self.remedy else self.found


class ConfigurationError(ViralFXError):
    """The configuration is invalid; ``problems`` lists every problem, not only the first."""

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        self.details = tuple(
            each if isinstance(each, Problem) else Problem.of_line(each) for each in problems
        )
        """The problems as values."""
        self.problems = tuple(map(str, self.details))
        """One line for each problem, with the remedy."""
        super().__init__("; ".join(self.problems))


class StartupError(ViralFXError):
    """The configuration is valid but the process cannot start, for example if a port is in use."""


class WorkLostError(ViralFXError):
    """A shutdown stage ran out of budget before its work was finished."""


class LedgerUnavailableError(ViralFXError):
    """The ledger did not answer in time; the operation may have taken effect."""

    def __init__(self, message: str, code: str | None = None) -> None:
        self.code = code
        """The problem, named as the health check ``database`` does, such as ``tls``."""
        super().__init__(message)


class LedgerLimitError(LedgerUnavailableError):
    """The ledger ended the call at a limit of time, memory or locks.

    Either it fails every call, or this one asks for too much or waits for a lock.
    """


class LedgerFullError(LedgerUnavailableError):
    """The ledger is full of unfinished jobs; nothing was accepted."""


class UnstorableError(ViralFXError):
    """The ledger answers, but refuses the content of a call; it stored nothing of the call.

    One item may be the cause: a call without it can succeed.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        self.code = code
        """The ledger's own code of the error, such as a SQLSTATE."""
        super().__init__(message)


class NotMigratedError(LedgerUnavailableError):
    """The ledger's tables are missing: ``viralfx migrate`` has not been run."""


class TransactionError(ViralFXError):
    """A job cannot be accepted in the transaction of this connection."""


def unusable_certificates(variable: str, path: str | None, error: OSError) -> ConfigurationError:
    """Return the error for a CA file that holds no certificates."""
    reason = error.strerror or str(error)
    return ConfigurationError([f"{variable}: {path} holds no certificates: {reason}"])


def is_a(value: object, kind: type[T]) -> TypeGuard[T]:
    """Return True for an instance of ``kind``, without code of the value: it may fake its class."""
    return issubclass(type(value), kind)


def type_name(value: object) -> str:
    """Return the name of a value's type; no code of the type runs, such as a metaclass's."""
    name: str = type.__dict__["__name__"].__get__(type(value))
    return name


def text_of(error: BaseException) -> str:
    """Return an error's message; without one, or if its own code raises, the name of its type."""
    try:
        # The text may be of a subclass, whose methods are the error's own code, too.
        return str.__str__(str(error)) or type_name(error)
    except BaseException:  # noqa: BLE001 - __str__ may be the code of an application
        return type_name(error)


def origin_of(error: BaseException, packages: Collection[str] = ()) -> tuple[BaseException, str]:
    """Return the error that code of the application raised, and where: ``file:line``.

    Code of the application is in no installed package, except those of ``packages``, the names of
    its own. The error may be a member of ``error``, or its cause. Without such code the result is
    ``error`` and the last line of its traceback, or an empty text.
    """
    for each in _with_causes(error):
        if isinstance(each, SyntaxError) and each.filename and not _is_installed(each.filename):
            return each, f"{each.filename}:{each.lineno}"
        for file, line, module in reversed([*_frames(each.__traceback__)]):
            if module.partition(".")[0] in packages or not _is_installed(file):
                return each, f"{file}:{line}"
    frames = [*_frames(error.__traceback__)]
    return error, "{}:{}".format(*frames[-1]) if frames else ""


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the members of a group before itself, and the causes of an error after it."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, BaseExceptionGroup):
            for member in found.exceptions:
                yield from _with_causes(member)
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, int, str]]:
    """Yield file, line and module, the innermost frame last."""
    while traceback is not None:
        code = traceback.tb_frame
        yield code.f_code.co_filename, traceback.tb_lineno, str(code.f_globals.get("__name__"))
        traceback = traceback.tb_next


def _is_installed(file: str) -> bool:
    """Return True for a file of an installed package, this one included, and of the interpreter."""
    import sysconfig  # noqa: PLC0415 - as difflib

    if file.startswith("<"):
        return True
    path, own = Path(file).resolve(), str(Path(__file__).parents[1])
    folders = (own, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or any(
        path.is_relative_to(Path(folder).resolve()) for folder in folders
    )


def line_of(function: Callable[..., object]) -> str:
    """Return where a function is declared, as ``file:line``; an empty text if it has no code."""
    import inspect  # noqa: PLC0415 - as difflib

    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""


def located(problem: str, place: str) -> str:
    """Return the line of a problem with its place, which may be unknown."""
    return f"{problem} ({place})" if place else problem


def suggest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``did you mean X?`` for the known name closest to ``name``, or an empty string.

    ``cutoff`` is the similarity, from 0 to 1, below which a known name is not suggested.
    """
    import difflib  # noqa: PLC0415 - only errors need it, and every import of viralfx loads this

    close = difflib.get_close_matches(name, tuple(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""


def edits(one: str, other: str, *, limit: int) -> int:
    """Return the number of insertions, deletions and replacements that make ``one`` the other.

    More than ``limit`` are not counted: the result is ``limit + 1``.
    """
    if abs(len(one) - len(other)) > limit:
        return limit + 1
    # Of so many pieces, the edits leave one whole. This is quick, and excludes most names.
    size = len(other) // (limit + 1)
    starts = [size * place for place in range(limit + 1)]
    ends = [*starts[1:], len(other)]
    if not any(other[start:end] in one for start, end in zip(starts, ends, strict=True)):
        return limit + 1
    row = list(range(len(other) + 1))
    for i, mine in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, its in enumerate(other, 1):
            cheapest = min(row[j] + 1, row[j - 1] + 1, diagonal + (mine != its))
            diagonal, row[j] = row[j], cheapest
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)


def require_count(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a whole number, ``ValueError`` if it is below one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def require_not_negative(name: str, value: object) -> None:
    """Raise ``TypeError`` unless it is a number, ``ValueError`` unless zero or more and finite."""
    if not 0 <= _number(name, value) < math.inf:
        raise ValueError(f"{name} must be zero or more and finite, got {value!r}")


def require_positive(name: str, value: object) -> None:
    """Raise ``TypeError`` unless it is a number, ``ValueError`` unless above zero and finite."""
    if not 0 < _number(name, value) < math.inf:
        raise ValueError(f"{name} must be more than zero and finite, got {value!r}")


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def printable(text: str, *, kept: str = "") -> str:
    """Return a text for a terminal or a line; escape all but printable characters and ``kept``.

    Clients choose some texts, and a terminal obeys control characters.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )
