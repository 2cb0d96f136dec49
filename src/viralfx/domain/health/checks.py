"""The checks of an application: an object, a function, or one of these with limits of its own."""

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias, cast

from viralfx.domain.errors import require_count, require_positive
from viralfx.domain.health.check_runner import InThread
from viralfx.domain.health.model import AnyHealthCheck, Observation, Status

CheckFunction: TypeAlias = Callable[
    [], Observation | bool | Awaitable[Observation | bool | None] | None
]
"""A check without a class. It returns an :class:`Observation`, or None or True for ``pass`` and
False for ``fail``; an exception is a ``fail``, too. A plain function runs in a thread."""


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """A check with limits of its own, in place of those of the settings. Durations are seconds."""

    check: AnyHealthCheck | CheckFunction
    _: KW_ONLY
    interval: float | None = None
    """From the end of one attempt to the start of the next; None: HEALTH_CHECK_INTERVAL. While the
    check does not pass, HEALTH_CHECK_INTERVAL shortens a longer one."""
    timeout: float | None = None
    """Limit of one attempt; None: HEALTH_CHECK_TIMEOUT."""
    failure_threshold: int | None = None
    """Number of consecutive worse results that make the status worse; None:
    HEALTH_FAILURE_THRESHOLD."""
    recovery_threshold: int | None = None
    """Number of consecutive better results that make it better; None:
    HEALTH_RECOVERY_THRESHOLD."""
    shared: bool = False
    """True if all instances lose the dependency together: READINESS_FAIL_OPEN_AFTER then applies
    to it."""

    def problems(self) -> Iterator[str]:
        """Yield the limits that no check can have."""
        for name in ("interval", "timeout", "failure_threshold", "recovery_threshold"):
            value: object = getattr(self, name)
            require = require_positive if name in {"interval", "timeout"} else require_count
            try:
                if value is not None:
                    require(name, value)
            except (TypeError, ValueError) as error:
                yield str(error)


AnyCheck: TypeAlias = AnyHealthCheck | CheckFunction | CheckConfig
"""A check in each form that ``OperationsConfig(checks=...)`` takes."""


class FunctionCheck:
    """The check that a function is."""

    def __init__(self, name: str, function: CheckFunction) -> None:
        self._name = name
        self._call: Callable[[], object] = (
            function
            if inspect.iscoroutinefunction(function)
            else InThread(f"health-check-{name}", function)
        )

    async def check(self) -> Observation:
        """Call the function; a ``TypeError`` if it returns anything else than a result."""
        result = self._call()
        if inspect.isawaitable(result):
            result = await result
        if isinstance(result, Observation):
            return result
        if result is None or result is True:
            return Observation(status=Status.PASS, message=f"{self._name} works")
        if result is False:
            message = f"{self._name} does not work"
            return Observation(status=Status.FAIL, message=message, code="failed")
        kind = type(result).__name__
        raise TypeError(f"a check must return an Observation, a bool or None, got {kind}")


def prepare_checks(
    given: Mapping[str, AnyCheck],
) -> tuple[dict[str, tuple[AnyHealthCheck, CheckConfig]], list[str]]:
    """Return each check with its limits, and the problems of those that cannot be checks."""
    ready: dict[str, tuple[AnyHealthCheck, CheckConfig]] = {}
    problems: list[str] = []
    for name, value in given.items():
        config = value if isinstance(value, CheckConfig) else CheckConfig(value)
        found = [*_faults(config.check), *config.problems()]
        problems += [f"OperationsConfig.checks: {name!r}: {fault}" for fault in found]
        if found:
            continue
        if hasattr(config.check, "check"):
            ready[name] = (cast("AnyHealthCheck", config.check), config)
        else:
            ready[name] = (FunctionCheck(name, config.check), config)
    return ready, problems


def _faults(check: object) -> Iterator[str]:
    """Yield the reasons why a value is no check; all of them would fail each attempt."""
    if isinstance(check, type):
        yield f"{check.__name__} is a class; pass an instance, such as {check.__name__}()"
        return
    if getattr(check, "__name__", "") == "<lambda>":
        yield "a lambda has no name for log lines; pass a function made with def"
        return
    method = getattr(check, "check", check)
    if isinstance(check, CheckConfig) or not callable(method):
        kind = type(check).__name__
        yield f"{kind} has no method check; pass an object that has one, or a function"
        return
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        yield "it yields; return the result instead"
        return
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # a builtin does not describe its arguments
        return
    try:
        signature.bind()
    except TypeError as error:
        yield f"it is called without arguments, and has a {error}"
