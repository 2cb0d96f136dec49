"""The rendered manifests as pods of ``podman kube play``, with the image, Postgres and Redis."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from tests.deploy import engine
from tests.deploy.manifests import Resource, render
from tests.deploy.podman import Podman, adapted, podman
from tests.servers.fixtures import or_skip
from tests.servers.waiting import wait_until
from tests.soak import Record

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]

POSTGRES, REDIS = "postgres:17", "redis:8"
TOKEN = "planted-api-9f3c7a1e5b8d2046"
SECRETS = {
    "DATABASE_URL": "postgresql://viralfx:planted-database@postgres:5432/viralfx",
    "REDIS_PASSWORD": "planted-redis",
    "API_TOKEN": TOKEN,
    "MANAGEMENT_TOKEN": "planted-management-4b7e1d9c6a02f853",
}
SETTINGS = {
    "base": {"REDIS_HOST": "redis"},
    # The stand-ins for the servers of production have no certificates.
    "production": {
        "REDIS_HOST": "redis",
        "REDIS_TLS_ENABLED": "false",
        "DB_TLS_MODE": "disable",
    },
}
BACKEND = "viralfx-backend-pod-backend"
SERVICES = {
    "base": [BACKEND, "viralfx-backend-pod-queue-worker"],
    "production": [
        BACKEND,
        "viralfx-backend-pod-queue-worker",
        "viralfx-worker-pod-queue-worker",
    ],
}
MIGRATION = "viralfx-migrate-pod-migrate"


def server(name: str, image: str, **more: Any) -> Resource:
    """Return a pod with one server; the others reach it by its name."""
    container = {"name": "server", "image": f"localhost/{image}", **more}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"containers": [container]},
    }


PEERS: list[Resource] = [
    {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "viralfx-secrets"},
        "stringData": SECRETS,
    },
    server(
        "postgres",
        POSTGRES,
        env=[
            {"name": "POSTGRES_USER", "value": "viralfx"},
            {"name": "POSTGRES_PASSWORD", "value": "planted-database"},
        ],
    ),
    server("redis", REDIS, args=["redis-server", "--requirepass", "planted-redis"]),
]


@dataclass(frozen=True)
class Pods:
    """The pods of a base or an overlay, and when they were started, by the monotonic clock."""

    name: str
    podman: Podman
    since: float

    def ask(self, path: str, *, method: str = "GET", body: object = None) -> httpx.Response:
        """Send a request to the API, with its token."""
        url = f"http://{self.podman.address('viralfx-backend-pod')}:3000{path}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.request(method, url, json=body, headers=headers, timeout=10)

    def is_ready(self) -> bool:
        """Return whether the API is ready and each worker's own probe passes."""
        try:
            ready = self.ask("/health/ready").is_success
        except httpx.TransportError:
            return False
        probe = ("viralfx", "probe", "ready", "--worker")
        workers = [name for name in SERVICES[self.name] if name != BACKEND]
        return ready and all(
            self.podman.attempt("exec", name, *probe).returncode == 0 for name in workers
        )

    def wait_ready(self) -> None:
        """Return once the pods are ready."""
        wait_until(self.is_ready, seconds=90, what=lambda: self.podman.log(BACKEND))


@pytest.fixture(scope="module")
def machine(image: str) -> Iterator[Podman]:
    """Return a podman with the images."""
    with or_skip():
        engine.require(POSTGRES, REDIS)
        with podman(image, POSTGRES, REDIS) as made:
            yield made


@pytest.fixture(scope="module", params=SETTINGS)
def pods(request: pytest.FixtureRequest, machine: Podman, image: str) -> Iterator[Pods]:
    """Return the pods of the base and of production, with new servers."""
    name = request.param
    with or_skip():  # without kubectl and kustomize
        resources = list(adapted(render(name), image, SETTINGS[name]))
    machine.play(PEERS)
    since = time.monotonic()
    machine.play(resources)
    yield Pods(name, machine, since)
    machine.clear()


def test_the_migration_runs_and_all_pods_are_ready(pods: Pods, record_property: Record) -> None:
    """They start together; the pods wait for the schema."""
    pods.wait_ready()

    record_property("versions", "; ".join(pods.podman.versions()))
    record_property(f"{pods.name}: containers", len(SERVICES[pods.name]))
    record_property(f"{pods.name}: ready after", f"{time.monotonic() - pods.since:.1f} s")
    assert pods.podman.inspect(MIGRATION)["State"]["ExitCode"] == 0
    assert "is current at" in pods.podman.log(MIGRATION)
    assert pods.ask("/health/ready").json()["checks"] == {"database": True, "redis": True}
    assert pods.ask("/health").json()["environment"] == "production"


def test_the_rights_are_those_of_the_manifests(pods: Pods) -> None:
    """Another user than root, no capability, no write access, and the limit of memory."""
    for name in (*SERVICES[pods.name], MIGRATION):
        found = pods.podman.inspect(name)
        host = found["HostConfig"]

        assert found["Config"]["User"] == "10001:10001"
        assert not found["EffectiveCaps"]
        assert host["ReadonlyRootfs"]
        assert "no-new-privileges" in host["SecurityOpt"]
        assert host["Memory"] >= 512 * 2**20
        if name != MIGRATION:
            assert found["Config"]["StopTimeout"] == 75


def test_a_job_runs_in_a_pod(pods: Pods, record_property: Record) -> None:
    """The API accepts it, and a worker records its result."""
    accepted = pods.ask("/api/v1/schedules/analytics.rollup_health/run", method="POST", body={})
    assert accepted.status_code == 202
    link = accepted.json()["links"]["self"]
    done = wait_until(
        lambda: job if (job := pods.ask(link).json())["state"] == "completed" else None,
        seconds=60,
        what=lambda: pods.ask(link).text,
    )

    record_property(f"{pods.name}: job", done["state"])
    assert done["attempts"] == 1
    assert done["result"]["health"] in {"healthy", "degraded"}


def test_a_process_that_hangs_is_restarted(pods: Pods, record_property: Record) -> None:
    """Its liveness probe passes, fails three times in a row, and podman starts it again."""
    name = SERVICES[pods.name][-1]
    machine = pods.podman
    assert machine.run("healthcheck", "run", name) == ""
    before = machine.inspect(name)
    hanging = machine.service_of(name)
    hanging.suspend()
    with ThreadPoolExecutor(1) as pool:
        # Podman times probes by systemd, which containers and test machines lack.
        probes = pool.submit(_probe_until_restart, machine, name, before["State"]["StartedAt"])
        wait_until(
            lambda: machine.inspect(name)["State"]["Status"] == "stopping",
            seconds=60,
            what="podman stops it",
        )
        # It would be killed after 75 s; nothing more would be proved by the wait.
        os.kill(hanging.pid, signal.SIGKILL)
        failed = probes.result(timeout=60)
    pods.wait_ready()

    record_property(f"{pods.name}: failures of `podman healthcheck run` until a restart", failed)
    # Podman counts the failures; a probe can run once more while it starts the container.
    assert before["Config"]["Healthcheck"]["Retries"] == 3
    assert failed >= 3
    assert machine.inspect(name)["RestartCount"] == 1


def _probe_until_restart(machine: Podman, name: str, started: str) -> int:
    """Run the liveness probe until a failure restarts the container; return the failures."""
    failures = 0
    while machine.inspect(name)["State"]["StartedAt"] == started:
        failures += machine.attempt("healthcheck", "run", name).returncode != 0
    return failures


def test_all_processes_stop_within_their_grace_period(pods: Pods, record_property: Record) -> None:
    """Each ends with 0 in answer to SIGTERM; podman would kill it after 75 s, with 137."""
    # One after another: podman ends a pod's network when one container has ended and none runs that
    # is not stopping. A kubelet keeps it until the last one has ended.
    for name in reversed(SERVICES[pods.name]):
        began = time.monotonic()
        pods.podman.run("stop", name)
        took, code = time.monotonic() - began, pods.podman.inspect(name)["State"]["ExitCode"]
        record_property(f"{pods.name}: stop of {name}", f"exit code {code} after {took:.1f} s")

    for name in SERVICES[pods.name]:
        assert pods.podman.inspect(name)["State"]["ExitCode"] == 0, pods.podman.log(name)
        assert '"message":"Process ends","exitCode":0,"reason":"SIGTERM"' in pods.podman.log(name)
