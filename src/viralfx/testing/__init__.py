"""Tests of an application: its jobs without servers, and the contracts of its checks and stages.

The functions work in plain tests, in coroutines, and beside test clients.
"""

import asyncio
import inspect
import json
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any, Protocol

from viralfx.core.clock import ignore_error
from viralfx.core.errors import ConfigurationError
from viralfx.domain.health.check_runner import AnyCheck, InThread, prepare_checks
from viralfx.domain.health.model import Observation, Status
from viralfx.domain.shutdown import AnyStage
from viralfx.testing.jobs import (
    Jobs,
    JobsOfTest,
    SubmittedJob,
    assert_submitted,
    run_pending,
    submitted,
)

__all__ = [
    "Jobs",
    "JobsOfTest",
    "SubmittedJob",
    "assert_submitted",
    "check_contract",
    "run_pending",
    "stage_contract",
    "submitted",
    "wait_until_ready",
]

_CODE = re.compile(r"[a-z][a-z_]*").fullmatch
_TURNS = (0, 1, 2, 5)
"""Turns of the event loop after which an attempt is cancelled."""
_REPETITIONS = 20
_SOON_SECONDS = 5.0
_POLL_SECONDS = 0.01


async def check_contract(check: AnyCheck, *, seconds: float = _SOON_SECONDS) -> Observation:
    """Assert that a check keeps its contract; return its last observation.

    The check must not fail at the moment: its dependency has to work. Each attempt ends within
    ``seconds``. Its message is one line. Its code is a word that is there unless it passes. Its
    details are JSON and do not change afterwards. Attempts at the same time are safe, a cancelled
    one ends soon, and none leaves a task behind.

    Raises ``AssertionError``, and :class:`ConfigurationError` for a value that is no check.
    """
    attempt = _attempt_of(check, seconds)
    first = await attempt()
    _assert_complete(first)
    copy = deepcopy(first.details)
    for turns in _TURNS:
        await _cancel_after(turns, attempt())
    before = asyncio.all_tasks()
    for _ in range(_REPETITIONS):
        await attempt()
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    _require(not left, f"attempts left {len(left)} tasks behind, such as {left and left.pop()}")
    async with asyncio.TaskGroup() as group:
        together = [group.create_task(attempt()) for _ in range(5)]
    for task in together:
        _assert_complete(task.result())
    _require(first.details == copy, "a later attempt changed the details of an earlier one")
    return together[-1].result()


def _attempt_of(check: AnyCheck, seconds: float) -> Callable[[], Coroutine[Any, Any, Observation]]:
    ready, problems = prepare_checks({"check": check})
    if problems:
        raise ConfigurationError(problems)
    method: Any = ready["check"][0].check
    call = method if inspect.iscoroutinefunction(method) else InThread("check", method)

    async def attempt() -> Observation:
        try:
            async with asyncio.timeout(seconds):
                result = await call()
        except TimeoutError:
            raise AssertionError(f"an attempt takes longer than {seconds:g} s") from None
        if not isinstance(result, Observation):
            raise AssertionError(f"it returns a {type(result).__name__}, not an Observation")  # noqa: TRY004
        return result

    return attempt


def _assert_complete(seen: Observation) -> None:
    _require(seen.status is not Status.FAIL, f"it fails ({seen.code}): {seen.message}")
    _require(bool(seen.message.strip()), "its message is empty")
    _require("\n" not in seen.message, f"its message is more than one line: {seen.message!r}")
    if seen.status is Status.PASS:
        _require(seen.code is None, f"it passes, and has the code {seen.code!r}")
    else:
        _require(seen.code is not None, f"it has the status {seen.status}, and no code")
    if seen.code is not None:
        _require(bool(_CODE(seen.code)), f"its code is not small letters and _: {seen.code!r}")
    try:
        same = json.loads(json.dumps(seen.details, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"its details are not JSON: {error}") from None
    given = {**seen.details} if isinstance(seen.details, Mapping) else [*seen.details]
    _require(same == given, f"its details change as JSON: {seen.details!r}")


async def stage_contract(stage: AnyStage, *, budget: float = _SOON_SECONDS) -> None:
    """Assert that a shutdown stage keeps its contract: it runs several times.

    It ends within ``budget`` seconds, also when it runs a second time; at once with a budget of
    zero, where it may raise; and soon after it is cancelled. Pass a stage whose work is harmless in
    a test. Raises ``AssertionError``, or the error of the stage.
    """
    run = getattr(stage, "run", stage)
    if not callable(run):
        raise AssertionError(f"a {type(stage).__name__} has no method run")  # noqa: TRY004
    for turns in _TURNS:
        await _cancel_after(turns, run(budget))
    for _ in range(2):
        task = asyncio.ensure_future(run(budget))
        await _ended(task, budget, f"it does not end within its budget of {budget:g} s")
        task.result()
    task = asyncio.ensure_future(run(0.0))
    await _ended(task, _SOON_SECONDS, "it does not end at once with a budget of 0")
    ignore_error(task)  # it may have to give up


async def _cancel_after(turns: int, work: Coroutine[Any, Any, object]) -> None:
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await _ended(task, _SOON_SECONDS, "it does not end after it is cancelled")
    ignore_error(task)


async def _ended(task: "asyncio.Future[Any]", seconds: float, problem: str) -> None:
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        task.cancel()
        raise AssertionError(problem)


def _require(fact: bool, problem: str) -> None:  # noqa: FBT001 - an assertion
    if not fact:
        raise AssertionError(problem)


class _Client(Protocol):
    def get(self, url: str) -> Any: ...


def wait_until_ready(
    client: _Client, *, path: str = "/health", seconds: float = 10.0
) -> Awaitable[None] | None:
    """Wait until the readiness probe passes; raise ``AssertionError`` after ``seconds``.

    ``client`` is a test client, of httpx or of a framework; await the result if the client is
    asynchronous. ``path`` is that of the configuration.
    """
    deadline = time.monotonic() + seconds
    probe = client.get(f"{path}/ready")
    if inspect.isawaitable(probe):
        return _wait(client, path, deadline, probe)
    while not _is_ready(probe, deadline):
        client.get(f"{path}/detailed?fresh=1")
        probe = client.get(f"{path}/ready")
    return None


async def _wait(client: _Client, path: str, deadline: float, probe: Any) -> None:
    while not _is_ready(await probe, deadline):
        await client.get(f"{path}/detailed?fresh=1")
        await asyncio.sleep(_POLL_SECONDS)
        probe = client.get(f"{path}/ready")


def _is_ready(response: Any, deadline: float) -> bool:
    ready = bool(response.status_code == 200)  # noqa: PLR2004 - the status of a probe that passes
    if not ready and time.monotonic() > deadline:
        raise AssertionError(f"the application does not become ready: {response.text}")
    return ready


with suppress(ImportError):  # without pytest there is no fixture
    from viralfx.testing.jobs import viralfx_jobs as viralfx_jobs
