"""A container whose memory fills up: the check warns before the kernel ends the process."""

from pathlib import Path
from typing import Any

import pytest
from tests.deploy.engine import IN_MEMORY, Container, container

pytestmark = [pytest.mark.image, pytest.mark.timeout(180)]

LIMIT = 256
FIRST, STEP = 80, 4
"""Mebibytes. The first ones leave the memory below the threshold of the warning."""
APP = Path(__file__).with_name("filling.py")
OPTIONS = (
    *IN_MEMORY,
    f"--memory={LIMIT}m",
    f"--memory-swap={LIMIT}m",
    f"--volume={APP}:/app/filling.py:ro",
    "--env=HEALTH_CHECK_INTERVAL=100",
    "--env=HEALTH_DETAILS=always",
)


def test_the_memory_check_warns_before_the_kernel_kills(image: str) -> None:
    """Filled step by step: pass, warn, fail, and only then is it killed, with 137."""
    seen: dict[str, dict[str, Any]] = {}
    with container(image, "serve", "--app", "filling:app", options=OPTIONS) as service:
        service.wait_healthy()
        kept = 0
        while fill(service, more := STEP if kept else FIRST):
            kept += more
            if "fail" in seen:
                continue
            detailed = health_after_checks(service)
            if detailed is None:
                break
            memory = detailed["checks"]["memory"]
            reading = {"kept": kept, "overall": detailed["status"], **memory["details"]}
            seen.setdefault(memory["status"], reading)
        end = service.wait_ended()
    for status, reading in seen.items():
        print(status, reading)
    print(f"killed with {kept} MiB kept: {end['ExitCode']}, OOMKilled {end['OOMKilled']}")

    assert (end["ExitCode"], end["OOMKilled"]) == (137, True)
    assert list(seen) == ["pass", "warn", "fail"]
    assert {reading["heapTotal"] for reading in seen.values()} == {f"{LIMIT}MB"}
    assert [reading["overall"] for reading in seen.values()] == ["healthy", "degraded", "unhealthy"]
    assert 75 <= percent(seen["warn"]) < 90
    assert percent(seen["fail"]) >= 90
    assert seen["warn"]["kept"] < seen["fail"]["kept"] < kept + STEP


def fill(service: Container, mebibytes: int) -> bool:
    """Allocate more memory; return whether the process survives."""
    try:
        return service.get(f"/fill/{mebibytes}", method="POST").status == 201
    except OSError:
        return False


def health_after_checks(service: Container) -> dict[str, Any] | None:
    """Return its health after as many checks as a change of status needs.

    None if the process has ended.
    """
    rounds: set[str] = set()
    newest: dict[str, Any] = {}

    def poll() -> bool:
        reply = service.answers("/health/detailed")
        if reply is None:
            return True
        newest.update(reply.json())
        rounds.add(newest["checks"]["memory"]["checkedAt"])
        return len(rounds) > 3

    service.wait(poll, "more checks of its memory")
    return newest if len(rounds) > 3 else None


def percent(details: dict[str, Any]) -> float:
    """Return the used share of the limit."""
    return float(details["usagePercent"].removesuffix("%"))
