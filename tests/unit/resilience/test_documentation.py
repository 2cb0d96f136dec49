"""docs/resilience.md: its examples run, and its tables match the code."""

import ast
import asyncio
import inspect
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.virtual_time import run_in_virtual_time

from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError, circuit_breaker
from viralfx.resilience.breaker_states import RollingWindow
from viralfx.resilience.bulkhead import Bulkhead
from viralfx.resilience.deadline import Deadline
from viralfx.resilience.fallback import with_fallback
from viralfx.resilience.policy import Backoff, Jitter, RetryBudget
from viralfx.resilience.retry import retry

CHAPTER = (Path(__file__).parents[3] / "docs/resilience.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", CHAPTER, re.DOTALL)
NAMES: dict[str, Any] = {
    name.__name__: name
    for name in (
        Backoff,
        Bulkhead,
        CircuitBreaker,
        CircuitOpenError,
        Deadline,
        Jitter,
        RetryBudget,
        RollingWindow,
        circuit_breaker,
        retry,
        with_fallback,
    )
}


async def http_get(path: str) -> str:
    """Stand in for an HTTP client."""
    return path


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_example_runs(number: int) -> None:
    """As printed; its waits take no time."""
    code = compile(
        EXAMPLES[number], f"example {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    names = {**NAMES, "http_get": http_get, "sleep": asyncio.sleep}

    async def main() -> None:
        result: Coroutine[Any, Any, None] | None = eval(code, names)  # noqa: S307 - our own text
        if result is not None:
            await result

    run_in_virtual_time(main())


@pytest.mark.parametrize(
    ("call", "delays"), re.findall(r"\| `(Backoff\(.*?\)\.delays\(\d\))` \| (.*?) \|", CHAPTER)
)
def test_the_table_of_delays(call: str, delays: str) -> None:
    """Each row is the result of the call."""
    computed = eval(call, {**NAMES})  # noqa: S307 - our own text
    assert [f"{delay:g}" for delay in computed] == delays.split(", ")


@pytest.mark.parametrize(
    ("owner", "argument", "default"),
    re.findall(r"\| `(\w+)\((\w+)\)` \| `?(.*?)`? \|", CHAPTER),
)
def test_the_table_of_defaults(owner: str, argument: str, default: str) -> None:
    """Each row is the default of the argument; ``retry`` resolves its own when it is called."""
    resolved = {"base_delay": "1.0", "retry_on": "Exception"}
    if owner == "retry" and argument in resolved:
        assert default == resolved[argument]
        return
    assert repr(inspect.signature(NAMES[owner]).parameters[argument].default) == default


def test_the_tables_are_found() -> None:
    """A changed layout must not leave these tests without rows."""
    assert len(EXAMPLES) == 7
    assert len(re.findall(r"\| `(\w+)\((\w+)\)` \|", CHAPTER)) == 24
