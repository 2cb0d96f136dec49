"""Declarations of tasks: the limits over all workers, the arguments and the signature.

The ranges of the attempts and of the time that a job may ask for are here, too.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints, is_typeddict

from viralfx.core.errors import require_positive
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.model import Unique, check_priority, in_utc

MAX_CONCURRENCY: Final = 100_000
MAX_STARTS: Final = 1_000_000
"""The most jobs that a rate limit may let start in its period."""
MAX_KEY_CHARACTERS: Final = 255
MAX_ATTEMPTS: Final = 10_000
"""The most attempts that a job may ask for."""
FIRST_RUN_AT: Final = datetime(1, 1, 2, tzinfo=UTC)
LAST_RUN_AT: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""The times that a job may ask for, as in the SQL function ``enqueue``. A driver sends the first
and the last time of Python as the infinities of Postgres."""

_RATE = re.compile(r"([0-9]{1,9})\s*/\s*([smhd])")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Rate:
    """At most ``count`` starts within any ``period`` seconds."""

    count: int
    period: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The limits of a task; all workers together keep them."""

    concurrency: int | None = None
    """Its jobs that run at once; None: not limited."""
    rate: Rate | None = None
    """Its jobs that start in a period; None: not limited."""
    keyed: bool = False
    """True if the limits hold for each concurrency key, not for all of its jobs together. Jobs
    without a key, or with an empty one, share them as if they had the same key."""


def parse_rate(text: str) -> Rate:
    """Parse a rate such as ``100/m``; the units are s, m, h and d. Raises ``ValueError``."""
    if (found := _RATE.fullmatch(text.strip())) is None:
        raise ValueError(
            f"{text!r} is not a rate; write starts and unit, as in '10/s', '100/m', '5/h' or '1/d'"
        )
    count = int(found[1])
    if not 1 <= count <= MAX_STARTS:
        raise ValueError(f"{text!r}: the number of starts must be from 1 to {MAX_STARTS}")
    return Rate(count, _UNITS[found[2]])


def check_max_attempts(attempts: Any) -> int:
    """Return the most attempts of a job.

    Raises ``ValueError`` for another type or a number out of range.
    """
    whole = isinstance(attempts, int) and not isinstance(attempts, bool)
    if not whole or not 1 <= attempts <= MAX_ATTEMPTS:
        raise ValueError(
            f"max_attempts must be a whole number from 1 to {MAX_ATTEMPTS}: {attempts!r}"
        )
    return int(attempts)


def check_run_at(moment: object) -> datetime | None:
    """Return the time that a job asks for in UTC.

    Raises ``ValueError`` for a value without a time zone or a time out of range.
    """
    run_at = in_utc(moment, "run_at")
    if run_at is not None and not FIRST_RUN_AT <= run_at <= LAST_RUN_AT:
        raise ValueError(
            f"run_at must be from {FIRST_RUN_AT.date()} to {LAST_RUN_AT.date()}: {moment!r}"
        )
    return run_at


def limit_of(
    concurrency: int | None,
    concurrency_key: str | Callable[[Any], str] | None,
    rate_limit: str | None,
) -> Limit | None:
    """Return the limit of a declaration; None without one.

    Raises ``TypeError`` for a value of another type and ``ValueError`` for one out of range, both
    with the name of the parameter.
    """
    _check_concurrency(concurrency)
    _check_rate(rate_limit)
    try:
        rate = None if rate_limit is None else parse_rate(rate_limit)
    except ValueError as error:
        raise ValueError(f"rate_limit: {error}") from None
    if concurrency_key is not None:
        _check_key(concurrency_key, limited=not (concurrency is None and rate is None))
    if concurrency is None and rate is None:
        return None
    return Limit(concurrency=concurrency, rate=rate, keyed=concurrency_key is not None)


def _check_concurrency(concurrency: object) -> None:
    if concurrency is None:
        return
    if not isinstance(concurrency, int) or isinstance(concurrency, bool):
        raise TypeError(f"concurrency must be a whole number: {concurrency!r}")
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise ValueError(f"concurrency must be from 1 to {MAX_CONCURRENCY}: {concurrency}")


def _check_rate(rate_limit: object) -> None:
    if rate_limit is not None and not isinstance(rate_limit, str):
        raise TypeError(f"rate_limit must be a text such as '100/m': {rate_limit!r}")


def _check_key(concurrency_key: object, *, limited: bool) -> None:
    if not isinstance(concurrency_key, str) and not callable(concurrency_key):
        raise TypeError(
            "concurrency_key must be the name of a field of the payload, or a function of the"
            f" payload: {concurrency_key!r}"
        )
    if not concurrency_key:
        raise ValueError("concurrency_key is empty; name a field of the payload")
    if not limited:
        raise ValueError(
            "concurrency_key has no limit to keep apart; add concurrency=1 or rate_limit='10/s'"
        )


def check_declaration(
    name: object, retry: object, timeout: object, priority: object, unique: str | None
) -> Unique | None:
    """Return ``unique``; raise an error for an argument of ``@task`` that cannot be right."""
    if not isinstance(name, str) or not name:
        wrong = ValueError if name == "" else TypeError
        raise wrong("@task needs a name in parentheses, as in @task('orders.ship')")
    if retry is not None and not _is_policy(retry):
        raise TypeError(
            f"@task({name!r}): retry must be a policy, such as BackoffPolicy(attempts=5), or an"
            f" object with its method next_delay: {retry!r}"
        )
    if timeout is not None:
        require_positive(f"@task({name!r}): timeout", timeout)
    try:
        check_priority(priority)
        return None if unique is None else Unique.parse(unique)
    except ValueError as error:
        raise ValueError(f"@task({name!r}): {error}") from None


def _is_policy(retry: Any) -> bool:
    try:
        inspect.signature(retry.next_delay).bind(1, Exception())
    except (AttributeError, TypeError):
        return False
    return True


def require_field(concurrency_key: object, payload_type: Any) -> None:
    """Raise ``TypeError`` if a payload type is known not to have the field of a key."""
    fields = getattr(payload_type, "__struct_fields__", None)
    if fields is None:
        fields = getattr(payload_type, "__dataclass_fields__", None)
    if fields is None:
        fields = getattr(payload_type, "model_fields", None)  # of Pydantic
    if fields is None and is_typeddict(payload_type):
        fields = payload_type.__annotations__
    if fields is not None and isinstance(concurrency_key, str) and concurrency_key not in fields:
        raise TypeError(
            f"concurrency_key: {payload_type.__name__} has no field {concurrency_key!r}; it has"
            f" {', '.join(fields)}"
        )


def concurrency_key_of(
    concurrency_key: str | Callable[[Any], str] | None, payload: Any
) -> str | None:
    """Return the concurrency key of a decoded payload; None if its task has none.

    It is empty for a payload without a key: its job is served in turn with the keys, and shares the
    limits with others without a key.

    Raises :class:`PayloadError` if the payload has no such field, the function fails, or the key is
    too long.
    """
    if concurrency_key is None:
        return None
    if isinstance(concurrency_key, str):
        try:
            found = (
                payload[concurrency_key]
                if isinstance(payload, Mapping)
                else getattr(payload, concurrency_key)
            )
        except (KeyError, AttributeError):
            raise PayloadError(
                f"the payload has no field {concurrency_key!r}, which is the concurrency key"
            ) from None
    else:
        try:
            found = concurrency_key(payload)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise PayloadError(
                f"the function for the concurrency key failed with {problem}"
            ) from error
    if len(key := "" if found is None else str(found)) > MAX_KEY_CHARACTERS:
        raise PayloadError(
            f"the concurrency key has {len(key)} characters; at most {MAX_KEY_CHARACTERS} are"
            " allowed"
        )
    return key


def scheduled_key_of(concurrency_key: str | Callable[[Any], str] | None) -> str | None:
    """Return the concurrency key of a job of a schedule, whose payload is null.

    It is empty if null has no key; None if the task has none.
    """
    try:
        return concurrency_key_of(concurrency_key, None)
    except PayloadError:
        return ""


def read_signature(
    name: str, function: Callable[..., Any], context_type: type
) -> tuple[tuple[Any, Any], int | str | None, Mapping[str, bool]]:
    """Return the types of payload and result, how the context is passed, and the dependencies.

    Raises ``TypeError`` for a function that cannot be a task.
    """
    if not inspect.isroutine(function):
        raise TypeError(
            f"@task({name!r}): {function!r} is not a function; declare async def f(payload), or"
            " def f(payload) for code that blocks"
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"@task({name!r}): {function.__qualname__} is a generator; a task returns its result,"
            " it cannot yield"
        )
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"@task({name!r}): a type of {function.__qualname__} cannot be resolved: {error};"
            " declare it at the module's top, before the task"
        ) from None
    parameters = [
        each
        for each in inspect.signature(function).parameters.values()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    context = _context_of(parameters, hints, context_type)
    further = [each for each in parameters if each is not context]
    if (
        not further
        or further[0].kind is inspect.Parameter.KEYWORD_ONLY
        or any(each.kind is inspect.Parameter.POSITIONAL_ONLY for each in parameters[2:])
    ):
        raise TypeError(
            f"@task({name!r}): {function.__qualname__} must take a payload and, optionally, a"
            " context and dependencies: [async] def f(payload: T, context: JobContext) -> R;"
            " a task that needs no payload declares _: None"
        )
    payload, *others = further
    context_as: int | str | None = None
    if context is not None:
        first_two = context in parameters[:2] and context.kind is not context.KEYWORD_ONLY
        context_as = parameters.index(context) if first_two else context.name
    dependencies = {each.name: each.default is each.empty for each in others}
    types = hints.get(payload.name, Any), hints.get("return", Any)
    return types, context_as, dependencies


def _context_of(
    parameters: Sequence[inspect.Parameter], hints: Mapping[str, Any], context_type: type
) -> inspect.Parameter | None:
    for each in parameters:
        hint = hints.get(each.name)
        choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if context_type in choices:
            return each
    for each in parameters[1:2]:
        if each.name == "context" and hints.get(each.name, Any) in (Any, object):
            return each
    return None
