"""docs/readiness.md: its example is run as it is shown, and its table is that of the endpoints."""

import json
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient
from tests.architecture.claims import ROOT, blocks
from tests.servers.waiting import wait_until
from tests.unit.conftest import plain_environ

from viralfx import CheckConfig, OperationsConfig, OperationsPlugin
from viralfx.settings import Settings
from viralfx.testing import wait_until_ready

__all__ = ["plain_environ"]
GUIDE = (ROOT / "docs/readiness.md").read_text(encoding="utf-8")
SOON = {"HEALTH_CHECK_INTERVAL": "50"}


@pytest.fixture
def example(plain_environ: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names that the example defines."""
    for name, value in SOON.items():
        plain_environ.setenv(name, value)
    (code,) = blocks(GUIDE, "python")
    names: dict[str, Any] = {"__name__": "shop"}
    exec(code, names)  # noqa: S102 - the text of this repository
    return names


def test_a_required_check_decides_about_readiness(example: dict[str, Any]) -> None:
    """The instance starts, is ready, and is not ready with the answer that the page shows."""
    (shown,) = blocks(GUIDE, "json")
    prices = example["price_list"].prices
    with TestClient(example["app"]) as client:
        wait_until(lambda: client.get("/health/prices").status_code == 503, what="it has run")
        starting = client.get("/health/ready")
        prices["tea"] = 7
        wait_until_ready(client)
        prices.clear()
        wait_until(lambda: client.get("/health/ready").status_code == 503, what="not ready")
        failing, live = client.get("/health/ready"), client.get("/health/live")
        detailed = client.get("/health/detailed")

    assert starting.json()["reason"] == "starting"
    assert failing.json() == json.loads(shown)
    assert (live.status_code, detailed.status_code) == (200, 200)
    assert detailed.json()["status"] == "degraded"


@pytest.mark.parametrize(
    ("required", "critical", "ready", "detailed"),
    [
        (True, False, 503, (200, "degraded")),
        (False, True, 200, (503, "unhealthy")),
        (False, False, 200, (200, "degraded")),
        (True, True, 503, (503, "unhealthy")),
    ],
)
def test_the_effects_of_a_failing_check(
    example: dict[str, Any],
    ready: int,
    detailed: tuple[int, str],
    *,
    required: bool,
    critical: bool,
) -> None:
    """It is required, critical, both or neither; no list of settings takes ``required`` back."""
    prices = example["price_list"]
    config = OperationsConfig(
        settings=Settings(
            health_check_interval=0.05,
            readiness_requires=(),
            health_critical=("prices",) if critical else (),
        ),
        checks={"prices": CheckConfig(prices, required=required)},
    )
    prices.prices["tea"] = 7
    with TestClient(Litestar(plugins=[OperationsPlugin(config)])) as client:
        wait_until_ready(client)
        prices.prices.clear()
        wait_until(lambda: client.get("/health/prices").status_code == 503, what="it fails")
        answers = client.get("/health/ready"), client.get("/health/detailed")

    assert answers[0].status_code == ready
    assert (answers[1].status_code, answers[1].json()["status"]) == detailed
