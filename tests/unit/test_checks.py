"""The forms of an application's check, its own limits, and groups of checks."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.unit.doubles import ActingCheck

from viralfx import (
    CheckConfig,
    ConfigurationError,
    DiskCheck,
    HttpCheck,
    Observation,
    OperationsConfig,
    SqlAlchemyCheck,
    Status,
    TcpCheck,
)
from viralfx.bootstrap import assemble
from viralfx.domain.health.check_runner import FunctionCheck
from viralfx.domain.health.model import CheckPolicy
from viralfx.settings import Settings

PASSED = Observation(status=Status.PASS, message="")


def problems(*, groups: Any = None, **checks: Any) -> tuple[str, ...]:
    """Return the problems of the checks; empty if there are none."""
    try:
        assemble(Settings(), checks=checks, groups=groups)
    except ConfigurationError as error:
        return error.problems
    return ()


class Needy:
    """An object whose method cannot be called by the monitor."""

    async def check(self, order: str) -> Observation:
        """Take an argument, which no check gets."""
        raise AssertionError(order)


class Valued:
    """An object whose ``check`` is no method."""

    check = 5


def yielding() -> Iterator[Observation]:
    """Yield in place of returning."""
    yield PASSED


def needy(order: str) -> bool:
    """Take an argument, which no check gets."""
    raise AssertionError(order)


async def working() -> None:
    """Return nothing."""


async def a_coroutine() -> Any:
    """Return what a call without ``await`` returns."""
    coroutine = working()
    coroutine.close()
    return coroutine


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (ActingCheck, "ActingCheck is a class; pass an instance, such as ActingCheck()"),
        (lambda: True, "a lambda has no name for log lines; pass a function made with def"),
        (5, "int has no method check; pass an object that has one, or a function"),
        (None, "NoneType has no method check; pass an object that has one, or a function"),
        ("shop", "str has no method check; pass an object that has one, or a function"),
        (Valued(), "Valued has no method check; pass an object that has one, or a function"),
        (Needy(), "it is called without arguments, and has a missing a required argument: 'order'"),
        (needy, "it is called without arguments, and has a missing a required argument: 'order'"),
        (yielding, "it yields; return the result instead"),
        (CheckConfig(5), "int has no method check; pass an object that has one, or a function"),  # type: ignore[arg-type]
        (
            CheckConfig(CheckConfig(working)),  # type: ignore[arg-type]
            "CheckConfig has no method check; pass an object that has one, or a function",
        ),
        (CheckConfig(working, interval=0), "interval must be more than zero and finite, got 0"),
        (CheckConfig(working, timeout=float("nan")), "timeout must be more than zero and finite,"),
        (CheckConfig(working, failure_threshold=0), "failure_threshold must be at least 1, got 0"),
        (
            CheckConfig(working, recovery_threshold=1.5),  # type: ignore[arg-type]
            "recovery_threshold must be a whole number, got 1.5",
        ),
    ],
)
def test_a_value_that_is_no_check_is_a_problem_with_its_name(given: object, fault: str) -> None:
    """The application does not start with a check that could only fail."""
    (line,) = problems(shop=given)

    assert line.startswith(f"OperationsConfig.checks: 'shop': {fault}")


async def test_a_coroutine_is_no_check() -> None:
    """A call too many is an error at the start, too."""
    (line,) = problems(shop=await a_coroutine())

    assert line.startswith("OperationsConfig.checks: 'shop': coroutine has no method check; ")


def test_every_problem_is_reported_at_once() -> None:
    """Those of other checks and of groups are in the same error."""
    found = problems(one=5, two=ActingCheck, Three=ActingCheck(), groups={"edge": ["four"]})

    assert len(found) == 4


def returning(result: object) -> Callable[[], Any]:
    """Return a plain function that returns ``result``."""

    def function() -> object:
        return result

    return function


@pytest.mark.parametrize(
    ("result", "status", "code"),
    [
        (None, Status.PASS, None),
        (True, Status.PASS, None),
        (False, Status.FAIL, "failed"),
        (Observation(status=Status.WARN, message="", code="low"), Status.WARN, "low"),
        (PASSED, Status.PASS, None),
    ],
)
async def test_results_of_a_function(result: object, status: Status, code: str | None) -> None:
    """No result is a pass, and True and False are what they say; in both forms of a function."""

    async def asynchronous() -> Any:
        return result

    for function in (returning(result), asynchronous, functools.partial(asynchronous)):
        observation = await FunctionCheck("shop", function).check()

        assert (observation.status, observation.code) == (status, code)


@pytest.mark.parametrize("result", [0, 1, "", "ok", [], object()])
async def test_another_result_of_a_function_is_an_error(result: object) -> None:
    """A truth value is not guessed from it."""
    with pytest.raises(TypeError, match="must return an Observation, a bool or None, got"):
        await FunctionCheck("shop", returning(result)).check()


def test_limits_of_one_check() -> None:
    """Each comes before the setting; those that are not given are the setting's."""
    settings = Settings(
        health_check_interval=5.0,
        health_check_timeout=2.0,
        health_failure_threshold=3,
        health_recovery_threshold=2,
        health_critical=("database", "own"),
    )
    own = CheckConfig(
        working,
        interval=60.0,
        timeout=9.0,
        failure_threshold=1,
        recovery_threshold=4,
        shared=True,
    )
    monitor = assemble(
        settings, checks={"own": own, "often": CheckConfig(working, interval=0.5), "plain": working}
    ).operations.monitor

    assert monitor.policy("own") == CheckPolicy(
        interval=60.0,
        retry_interval=5.0,
        timeout=9.0,
        failure_threshold=1,
        recovery_threshold=4,
        critical=True,
        shared=True,
    )
    assert monitor.policy("often").interval_when_failing == 0.5
    assert monitor.policy("plain") == CheckPolicy(
        interval=5.0, retry_interval=5.0, timeout=2.0, failure_threshold=3, recovery_threshold=2
    )


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ({"Edge": ["shop"]}, "'Edge' cannot be a group's name; use small letters, digits, - and _"),
        ({"a/b": ["shop"]}, "'a/b' cannot be a group's name; use small letters, digits, - and _"),
        ({5: ["shop"]}, "5 cannot be a group's name; use small letters, digits, - and _"),
        ({"edge": "shop"}, "'edge' must be a list of at least one check"),
        ({"edge": []}, "'edge' must be a list of at least one check"),
        ({"edge": 5}, "'edge' must be a list of at least one check"),
        ({"edge": ["shpo"]}, "'edge': there is no check named 'shpo'; did you mean shop?"),
        ({"edge": [5]}, "'edge': there is no check named 5; there are shop, database,"),
    ],
)
def test_a_group_that_cannot_work_is_a_problem(groups: object, problem: str) -> None:
    """A typing error is found at the start, and not by the balancer."""
    (line,) = problems(shop=working, groups=groups)

    assert line.startswith(f"OperationsConfig.groups: {problem}")


@pytest.mark.parametrize("field", ["checks", "groups", "drain_stages", "close_stages"])
@pytest.mark.parametrize("given", [[working], working, None])
def test_a_list_in_place_of_a_mapping(field: str, given: object) -> None:
    """The names are a part of checks, groups and stages."""
    with pytest.raises(TypeError, match=rf"OperationsConfig\.{field} takes a mapping by name"):
        OperationsConfig(**{field: given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: HttpCheck("shop"), "HttpCheck: the URL must be https://host/path"),
        (lambda: HttpCheck("https://u:p@shop/"), "HttpCheck: the URL contains a user or a passw"),
        (lambda: HttpCheck("http://169.254.169.254/"), "HttpCheck: 169.254.169.254 has the addre"),
        (lambda: HttpCheck("http://[::ffff:169.254.169.254]/"), "HttpCheck: ::ffff:"),
        (lambda: HttpCheck("http://[2002:a9fe:a9fe::1]/"), "HttpCheck: 2002:a9fe:a9fe::1 has the"),
        (lambda: HttpCheck("http://shop/", timeout=0), "HttpCheck: timeout must be more than zero"),
        (lambda: HttpCheck("http://shop/", headers={"A": "b\r\nC: d"}), "HttpCheck: 'A' is not a "),
        (lambda: TcpCheck("", 80), "TcpCheck: '' is not a host"),
        (lambda: TcpCheck("shop", 0), "TcpCheck: port must be at least 1, got 0"),
        (lambda: TcpCheck("shop", "80"), "TcpCheck: port must be a whole number, got '80'"),  # type: ignore[arg-type]
        (lambda: TcpCheck("shop", 65536), "TcpCheck: port must be at most 65535, got 65536"),
        (lambda: TcpCheck("shop", 80, timeout=-1), "TcpCheck: timeout must be more than zero"),
        (lambda: DiskCheck("/", 0), "DiskCheck: least must be more than zero"),
        (
            lambda: DiskCheck("/", 10),
            "DiskCheck: least is a share below 1, or at least 1000000 ",
        ),
        (lambda: DiskCheck("/", 0.1, warn="2"), "DiskCheck: warn must be a number"),  # type: ignore[arg-type]
        (lambda: SqlAlchemyCheck("sqlite://"), "SqlAlchemyCheck takes an engine of SQLAlchemy, n"),  # type: ignore[arg-type]
    ],
)
def test_a_check_with_unusable_arguments(make: Callable[[], object], problem: str) -> None:
    """It is an error where the check is made."""
    with pytest.raises(ConfigurationError) as raised:
        make()

    assert raised.value.problems[0].startswith(problem)
