"""Releases of other projects without the private parts that this one uses.

The process serves by their public parts, and logs one warning. A part is really gone for it, see
tests/system/without_parts.py.
"""

import signal
import threading

import pytest
from tests.soak import SOAK
from tests.system.jobs import accept, until
from tests.system.service import Reply, running

HTTPTOOLS = "uvicorn.protocols.http.httptools_impl"
SANSIO = "uvicorn.protocols.websockets.websockets_sansio_impl"
NO_PROTOCOL = "uvicorn lacks parts that the HTTP server uses: no limits, no fast probes"
WITHOUT = "tests.system.without_parts"


PARTS = [
    (f"{HTTPTOOLS}:HEADER_VALUE_RE", "cannot import name 'HEADER_VALUE_RE'"),
    (f"{HTTPTOOLS}:RequestResponseCycle.__init__", "RequestResponseCycle.__init__"),
    (f"{SANSIO}:WebSocketsSansIOProtocol.handle_text", "no answer to a message of a WebSocket"),
    ("uvicorn.server:ServerState", "cannot import name 'ServerState'"),
]
"""A usual run has one that an import misses, since one handler meets them all, and the others."""


@pytest.mark.soak
@pytest.mark.parametrize(("part", "named"), PARTS if SOAK else PARTS[:3])
def test_uvicorn_serves_by_itself(part: str, named: str) -> None:
    """Probes, requests, jobs and the management port work, and the stop has its order."""
    slow: list[Reply] = []
    environment = {"VIRALFX_TEST_WITHOUT": part, "SHUTDOWN_READINESS_DELAY": "1000"}
    application = ("--app", "tests.system.apps:plain")
    with running(*application, module=WITHOUT, management=True, environment=environment) as service:
        service.wait_ready()
        live, managed = service.get("/health/live"), service.manage("/health/ready")
        request = threading.Thread(
            target=lambda: slow.append(service.get("/slow?seconds=2", timeout=60))
        )
        request.start()
        service.signal(signal.SIGTERM)
        code = service.exit_code(seconds=60)
        request.join(60)

        assert [live.status, managed.status] == [200, 200]
        assert [(each.status, each.json()) for each in slow] == [(200, {"done": True})]
        assert code == 0
        (warning,) = service.logged(NO_PROTOCOL)
        assert named in warning["lacking"]
        assert service.logged("Process ends")[0]["reason"] == "SIGTERM"
        assert [line for line in service.output if '"level":"error"' in line] == []


def test_the_self_test_finds_nothing_missing() -> None:
    """The releases of the lock have all parts, so there is no warning."""
    with running(environment={"TASK_MODULES": "tests.job_tasks"}) as service:
        until(service, accept(service.wait_ready(), "parcels.echo", None), "completed")
        service.signal(signal.SIGTERM)

        assert service.exit_code() == 0
        assert [line for line in service.output if " lacks " in line] == []
