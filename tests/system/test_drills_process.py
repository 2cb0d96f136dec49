"""Drills of the runbook's procedures for a process: its memory runs out, its loop is blocked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.system.control_group import ControlGroup, control_group
from tests.system.drills.cluster import BACKEND, Cluster
from tests.system.drills.drill import QUICK, Drill, clients
from tests.system.service import Service

# The first one may have to fetch promtool.
pytestmark = [pytest.mark.timeout(240)]

APP = ("--app", "tests.system.drills.app:app")
LIMIT = 512
"""Mebibytes."""
SHARE = 0.82
"""How much of that is in use in the end."""


@pytest.fixture
def limited() -> Iterator[ControlGroup]:
    """Return a group of processes whose memory the kernel limits."""
    with control_group() as group:
        group.limit(LIMIT)
        yield group


def test_memory_runs_out(limited: ControlGroup, tmp_path: Path) -> None:
    """Of what nobody lets go: a new process is well, and then has more."""
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
    """By a release that computes on it; the release before is well."""
    with Cluster(tmp_path, QUICK) as cluster:
        cluster.deploy(BACKEND, *APP)
        cluster.update(BACKEND, RELEASE="2")
        drill = Drill("ViralFXEventLoopBlocked", cluster, ROUTE="/login")
        with clients(cluster.instance, "/login", 3):
            drill.show_symptom()
            drill.diagnose()
            drill.remedy()
            drill.end()
