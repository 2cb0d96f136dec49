"""``viralfx.testing``: the contracts of an application's checks and stages, and the readiness."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient, TestClient

from viralfx import (
    CheckConfig,
    ConfigurationError,
    DiskCheck,
    Observation,
    OperationsConfig,
    OperationsPlugin,
    Status,
)
from viralfx.settings import Settings
from viralfx.testing import check_contract, stage_contract, wait_until_ready

PASSED = Observation(status=Status.PASS, message="well", details={"n": 1})


class Asynchronous:
    """An object with both, as an application has them."""

    async def check(self) -> Observation:
        """Pass, after a turn of the event loop."""
        await asyncio.sleep(0)
        return PASSED

    async def run(self, budget: float) -> None:
        """Have nothing to do."""
        del budget
        await asyncio.sleep(0)


def plain() -> bool:
    """Check without ``async``."""
    return True


class Plain:
    """An object whose check has no ``async``."""

    def check(self) -> Observation:
        """Pass."""
        return PASSED


def giving(**fields: Any) -> Callable[[], Any]:
    """Return a check that gives an observation."""

    async def check() -> Observation:
        return Observation(**{"status": Status.PASS, "message": "well", **fields})

    return check


@pytest.mark.parametrize(
    "check",
    [
        Asynchronous(),
        Plain(),
        plain,
        DiskCheck("/", 0.000001),
        CheckConfig(plain, interval=60.0),
        giving(status="warn", code="low", details=[1, {"a": None}]),
    ],
)
async def test_checks_that_keep_their_contract(check: Any) -> None:
    """In each form."""
    assert (await check_contract(check)).status is not Status.FAIL


async def _returns_text() -> Any:
    return "well"


class Text:
    """A check that returns no observation."""

    check = staticmethod(_returns_text)


class Changing:
    """A check that changes its earlier details."""

    def __init__(self) -> None:
        self.details: dict[str, object] = {"count": 0}

    async def check(self) -> Observation:
        """Count in the details that were returned before."""
        self.details["count"] = int(str(self.details["count"])) + 1
        return Observation(status=Status.PASS, message="well", details=self.details)


class Leaking:
    """A check that leaves tasks behind."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    async def check(self) -> Observation:
        """Begin a task that outlives the attempt."""
        self.tasks.append(asyncio.create_task(asyncio.sleep(30)))
        return PASSED


class Slow:
    """A check that takes too long."""

    async def check(self) -> Observation:
        """Wait."""
        await asyncio.Event().wait()
        return PASSED


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        (giving(status="fail", code="gone", message="It is gone"), r"it fails \(gone\): It is"),
        (giving(message=" "), "its message is empty"),
        (giving(message="a\nb"), "its message is more than one line"),
        (giving(code="fine"), "it passes, and has the code 'fine'"),
        (giving(status="warn"), "it has the status warn, and no code"),
        (giving(status="warn", code="Too low"), "its code is not small letters and _: 'Too low'"),
        (giving(details={"at": object()}), "its details are not JSON"),
        (giving(details={"n": float("nan")}), "its details are not JSON: Out of range"),
        (giving(details={1: 2}), "its details change as JSON"),
        (Text(), "it returns a str, not an Observation"),
        (Changing(), "a later attempt changed the details of an earlier one"),
        (Leaking(), "attempts left 20 tasks behind"),
        (Slow(), "an attempt takes longer than 0.05 s"),
    ],
)
async def test_a_check_that_breaks_its_contract(check: Any, problem: str) -> None:
    """The message says which part."""
    with pytest.raises(AssertionError, match=problem):
        await check_contract(check, seconds=0.05 if isinstance(check, Slow) else 5.0)


async def test_a_value_that_is_no_check_is_a_configuration_error() -> None:
    """As when the application is created."""
    with pytest.raises(ConfigurationError, match="Plain is a class"):
        await check_contract(Plain)  # type: ignore[arg-type]


async def waits(budget: float) -> None:
    """End well before the budget does."""
    await asyncio.sleep(min(budget / 100, 0.01))


async def gives_up(budget: float) -> None:
    """Raise if there is no time."""
    if budget <= 0:
        raise TimeoutError


@pytest.mark.parametrize("stage", [waits, gives_up, Asynchronous()])
async def test_stages_that_keep_their_contract(stage: Any) -> None:
    """In both forms."""
    await stage_contract(stage)


class Once:
    """A stage that fails when it runs again."""

    def __init__(self) -> None:
        self.ran = False

    async def run(self, budget: float) -> None:
        """Fail the second time."""
        del budget
        if self.ran:
            raise RuntimeError("planted: it ran already")
        self.ran = True


async def never(budget: float) -> None:
    """Ignore the budget."""
    del budget
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (Once(), "planted: it ran already"),
        (never, "it does not end within its budget of 0.05 s"),
        (5, "a int has no method run"),
    ],
)
async def test_a_stage_that_breaks_its_contract(stage: Any, problem: str) -> None:
    """The message says which part, or is the error of the stage."""
    with pytest.raises((AssertionError, RuntimeError), match=problem):
        await stage_contract(stage, budget=0.05)


def application(path: str = "/health", **checks: Any) -> Litestar:
    """Make an application whose readiness depends on its check."""
    settings = Settings(readiness_requires=tuple(checks))
    config = OperationsConfig(settings=settings, checks=checks, path=path)
    return Litestar(plugins=[OperationsPlugin(config)], logging_config=None)


async def test_waiting_for_readiness() -> None:
    """With clients of both kinds, at another path, and with a reason if it does not come."""
    async with AsyncTestClient(application("/operations", shop=plain)) as client:
        waiting = wait_until_ready(client, path="/operations")
        assert waiting is not None
        await waiting
        assert (await client.get("/operations/ready")).status_code == 200

    def refuses() -> bool:
        return False

    async with AsyncTestClient(application(shop=refuses)) as client:
        waiting = wait_until_ready(client, seconds=0.05)
        assert waiting is not None
        with pytest.raises(AssertionError, match=r'does not become ready: .*"shop":false'):
            await waiting


def test_waiting_for_readiness_in_a_plain_test() -> None:
    """Nothing has to be awaited."""
    with TestClient(application(shop=plain)) as client:
        assert wait_until_ready(client) is None
        assert client.get("/health/ready").status_code == 200
