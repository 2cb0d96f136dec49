"""How hard the unit tests try, and what several of them need."""

import os
from collections.abc import AsyncIterator
from typing import Protocol

import pytest
from hypothesis import HealthCheck, settings
from tests.manual_clock import ManualClock

from viralfx.settings import fields

settings.register_profile(
    "default",
    max_examples=50,
    stateful_step_count=30,
    derandomize=True,  # a failure repeats; `just fuzz` tries others
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    parent=settings.get_profile("default"),
    max_examples=2000,
    stateful_step_count=60,
    derandomize=False,
)
settings.register_profile(
    "soak", parent=settings.get_profile("default"), max_examples=200, derandomize=False
)
settings.register_profile("fast", parent=settings.get_profile("default"), max_examples=10)
settings.load_profile(os.environ.get("VIRALFX_HYPOTHESIS", "default"))


class Releasable(Protocol):
    """A double that may hold on to its task until it is released."""

    def release(self) -> None:
        """Let go."""
        ...


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock that the test moves."""
    return ManualClock()


@pytest.fixture
async def held() -> AsyncIterator[list[Releasable]]:
    """Return a list for doubles that swallow cancellation, so that the loop can end at all."""
    doubles: list[Releasable] = []
    yield doubles
    for double in doubles:
        double.release()
    await ManualClock().settle()


@pytest.fixture
def plain_environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove every setting from the environment; return the patcher."""
    for field in fields():
        monkeypatch.delenv(field.variable, raising=False)
        monkeypatch.delenv(f"{field.variable}_FILE", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return monkeypatch
