"""The API against its own OpenAPI document: Schemathesis finds no deviation.

It runs as a command against the real process, in all its phases and with all its checks except
``use_after_free``: a cancelled job can still be read. VIRALFX_SCHEMATHESIS_EXAMPLES sets a higher
number of examples, which then differ in each run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.servers.postgres import Database
from tests.soak import SOAK, only_in_soak
from tests.system.service import ROOT, Service, running

DOCUMENT = "/api/docs/openapi.json"
TOKENS = {
    "API_TOKEN": "planted-api-9f3c7a1e5b8d2046",
    "MANAGEMENT_TOKEN": "planted-management-4b7e1d9c6a02f853",
    "HEALTH_DETAILS": "authorized",
}
# A requested shutdown leaves the service up for the duration of the test.
LINGER = {"SHUTDOWN_READINESS_DELAY": "3000000", "SHUTDOWN_FORCE_TIMEOUT": "3600000"}
STOP = "healthShutdown"
FEW = 16 if SOAK else 10
"""Examples of an operation without VIRALFX_SCHEMATHESIS_EXAMPLES."""
TOKENS_ARE_SET = [False, True] if SOAK else [True]
"""A usual run has the larger set of operations, in memory: all adapters keep the same contract."""
# The stream of a waiting job has one event and does not end.
STREAMS = "max-stream-events = 1\n"
CREDENTIALS = f"""
[auth.openapi.apiToken]
bearer = "{TOKENS["API_TOKEN"]}"

[auth.openapi.managementToken]
bearer = "{TOKENS["MANAGEMENT_TOKEN"]}"
"""


def schemathesis(service: Service, folder: Path, *options: str, tokens: bool) -> None:
    """Run all checks against a service; fail with the report if a check finds an error."""
    configuration = folder / "schemathesis.toml"
    configuration.write_text(STREAMS + (CREDENTIALS if tokens else ""))
    examples = os.environ.get("VIRALFX_SCHEMATHESIS_EXAMPLES")
    fixed = () if examples else ("--seed", "1")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration)),
            *("run", f"http://127.0.0.1:{service.port}{DOCUMENT}"),
            *("--checks", "all", "--exclude-checks", "use_after_free"),
            *("--max-examples", examples or str(FEW), *fixed),
            *("--continue-on-failure", "--suppress-health-check", "all", "--warnings", "off"),
            *("--request-timeout", "10", "--generation-database", "none", "--no-color"),
            *options,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert service.process.poll() is None, "the service ended"


def check_all(environment: dict[str, str], folder: Path, *arguments: str, tokens: bool) -> None:
    """Check every operation of a service, and in a soak run the shutdown at last."""
    more = {**TOKENS, **LINGER} if tokens else {}
    tasks = {"TASK_MODULES": "tests.offered_tasks"}
    with running(*arguments, environment={**environment, **tasks, **more}) as service:
        service.wait_ready()
        if not tokens:
            schemathesis(service, folder, tokens=False)
            return
        schemathesis(service, folder, "--exclude-operation-id", STOP, tokens=True)
        assert service.get("/health/ready").status == 200, "something stopped it already"
        if not SOAK:
            return
        schemathesis(service, folder, "--include-operation-id", STOP, tokens=True)
        assert service.get("/health/ready").status == 503, "the operation was never reached"


TIME = pytest.mark.timeout(3600 if "VIRALFX_SCHEMATHESIS_EXAMPLES" in os.environ else 240)


@pytest.mark.soak
@TIME
@pytest.mark.parametrize("tokens", TOKENS_ARE_SET)
def test_no_deviation_in_memory(tmp_path: Path, *, tokens: bool) -> None:
    """Without tokens, which forbids the shutdown, and with both tokens."""
    check_all({}, tmp_path, tokens=tokens)


@only_in_soak
@TIME
@pytest.mark.parametrize("tokens", [False, True])
def test_no_deviation_with_postgres(
    migrated_database: Database, tmp_path: Path, *, tokens: bool
) -> None:
    """With a separate worker, so that jobs reach every state."""
    environment = {"DATABASE_URL": migrated_database.url}

    check_all(environment, tmp_path, "--worker", tokens=tokens)
