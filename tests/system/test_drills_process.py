"""Drills of the runbook's procedures for a process without memory or with a blocked loop."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.system.control_group import ControlGroup, control_group
from tests.system.drills.cluster import BACKEND, Cluster
from tests.system.drills.drill import QUICK, Drill, clients
from tests.system.service import Service

# The first drill may have to fetch promtool.
pytestmark = [pytest.mark.timeout(240)]

APP = ("--app", "tests.system.drills.app:app")
LIMIT = 1024
"""Mebibytes: the rest must be enough for the child that writes the heap report."""
SHARE = 0.82
"""The share of the limit that is in use at the end."""


@pytest.fixture
def limited() -> Iterator[ControlGroup]:
    """Return a group of processes whose memory the kernel limits."""
    with control_group() as group:
        group.limit(LIMIT)
        yield group


def test_memory_runs_out(limited: ControlGroup, tmp_path: Path) -> None:
    """A leak fills the memory: a restart helps for a while, more memory for longer."""
    with Cluster(tmp_path, {**QUICK, "HEAP_SNAPSHOT_DIR": str(tmp_path)}) as cluster:
        cluster.joined, cluster.limited = limited.add, limited.limit
        cluster.deploy(BACKEND, *APP)
        drill = Drill("ViralFXMemoryHigh", cluster)
        (backend,) = cluster.processes(BACKEND)
        assert _details(backend)["heapTotal"] == f"{LIMIT}MB"
        used = int(_details(backend)["rss"].removesuffix("MB"))
        leak = round(LIMIT * SHARE) - used
        assert backend.get(f"/uploads/{leak}", method="POST").status == 201
        drill.show_symptom()
        drill.diagnose()
        drill.remedy()
        drill.end()
        (backend,) = cluster.processes(BACKEND)
        assert _details(backend)["heapTotal"] == "2048MB"


def _details(service: Service) -> dict[str, str]:
    details: dict[str, str] = service.get("/health/memory").json()["details"]
    return details


def test_the_event_loop_is_blocked(tmp_path: Path) -> None:
    """A release computes on the event loop; the rollback is the remedy."""
    with Cluster(tmp_path, QUICK) as cluster:
        cluster.deploy(BACKEND, *APP)
        cluster.update(BACKEND, RELEASE="2")
        drill = Drill("ViralFXEventLoopBlocked", cluster, ROUTE="/login")
        with clients(cluster.instance, "/login", 3):
            drill.show_symptom()
            drill.diagnose()
            drill.remedy()
            drill.end()
