"""The names of the checks, and how each of them is run."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from viralfx.domain.health import CheckPolicy
from viralfx.domain.resilience.retry import Retrier
from viralfx.settings import Settings

BUILT_IN = ("database", "redis", "memory", "queues", "circuits")

# Losing one of these is losing it for every instance at once.
_SHARED = frozenset({"database", "redis", "queues"})

# One question to the database answers both.
_FOLLOWS = {"queues": "database"}

_CHECK_NAME = re.compile(r"[a-z][a-z0-9_-]*").fullmatch
# These are paths below /health already.
_RESERVED = frozenset({"live", "ready", "startup", "detailed", "shutdown", "loggers"})


def problems_with_names(own: Collection[str], settings: Settings) -> Iterator[str]:
    """Yield what is wrong with the names of an application's checks, and with settings of some."""
    for name in BUILT_IN:
        if name in own:
            yield f"OperationsConfig.checks: {name!r} is a built-in check; choose another name"
    for name in own:
        if name in _RESERVED or not _CHECK_NAME(name):
            yield (
                f"OperationsConfig.checks: {name!r} cannot be a check's name; use small letters,"
                f" digits, - and _, and none of {', '.join(sorted(_RESERVED))}"
            )
    every_check = (*own, *BUILT_IN)
    yield from _unknown_checks("HEALTH_CRITICAL", settings.health_critical, every_check)
    yield from _unknown_checks("READINESS_REQUIRES", settings.readiness_requires, every_check)


def problems_with_retriers(own: Sequence[Retrier]) -> Iterator[str]:
    """Yield what keeps an application's retriers from being told apart."""
    names = [retrier.name for retrier in own]
    if None in names:
        yield 'OperationsConfig.retriers: one has no name; make it with retry(name="...")'
    for name in sorted({name for name in names if name is not None and names.count(name) > 1}):
        yield f"OperationsConfig.retriers: a retrier named {name!r} is registered already"


def policy_of(name: str, settings: Settings) -> CheckPolicy:
    """Return how a check is run."""
    interval = settings.health_check_interval / 1000
    # Memory comes and goes with every burst: one sample over the line is no change yet.
    least = 2 if name == "memory" else 1
    return CheckPolicy(
        interval=settings.db.health_check_interval / 1000 if name == "database" else interval,
        retry_interval=interval,
        timeout=settings.health_check_timeout / 1000,
        failure_threshold=max(least, settings.health_failure_threshold),
        recovery_threshold=max(least, settings.health_recovery_threshold),
        critical=name in settings.health_critical,
        gates_readiness=name in settings.readiness_requires,
        shared=name in _SHARED,
        follows=_FOLLOWS.get(name),
    )


def _unknown_checks(variable: str, names: Iterable[str], checks: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in checks:
            close = difflib.get_close_matches(name, checks, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(checks)}"
            yield f"{variable}: there is no check named {name!r}; {hint}"
