"""The system of deploy/compose.yaml, running under a name and on a port of its own."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.deploy.engine import ROOT, Container, attempt, docker
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.system.service import Reply, request

FILE = ROOT / "deploy/compose.yaml"
JOBS = "/api/v1/jobs"

Composed = Mapping[str, Any]


class Trial:
    """The trial, driven by ``docker compose``."""

    def __init__(self, image: str, more: Path) -> None:
        """``more`` is a second compose file that is laid over the first."""
        self.port = free_port()
        self.project = f"viralfx-tests-{os.getpid()}"
        self._files = (f"--file={FILE}", f"--file={more}")
        self._environment = {"VIRALFX_IMAGE": image, "VIRALFX_PORT": str(self.port)}
        self._token = ""

    def compose(self, *arguments: str, seconds: float = 90) -> str:
        """Run ``docker compose`` and return what it prints."""
        project = f"--project-name={self.project}"
        return docker(
            "compose", project, *self._files, *arguments, seconds=seconds, **self._environment
        )

    def up(self, *arguments: str) -> None:
        """Start what is not running, and wait until all of it is healthy."""
        self.compose("up", "--wait", "--wait-timeout=200", *arguments, seconds=240)
        self._token = self.secret("tokens/api")

    def secret(self, name: str) -> str:
        """Return one of the secrets that it made."""
        return self.compose("exec", "-T", "backend", "cat", f"/run/secrets/{name}")

    def down(self) -> None:
        """Remove all of it, volumes and what was run beside it included."""
        for name in docker("ps", "-aq", f"--filter=label={self._label}").split():
            docker("rm", "--force", name)
        self.compose("--profile=*", "down", "--volumes", "--remove-orphans", "--timeout=5")

    @property
    def _label(self) -> str:
        return f"com.docker.compose.project={self.project}"

    def containers(self, service: str) -> list[Container]:
        """Return the containers of a service, in the order of their numbers."""
        lines = self.compose("ps", "--all", "--format=json", service).splitlines()
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [Container(each["Name"], self.port) for each in sorted(found, key=_by_number)]

    def ask(self, path: str, **more: Any) -> Reply:
        """Ask the API with its token."""
        headers = {"Authorization": f"Bearer {self._token}", **more.pop("headers", {})}
        return request(self.port, path, headers=headers, **more)

    def healthy(self) -> dict[str, Any] | None:
        """Return the details of health if all checks pass, else None."""
        detailed: dict[str, Any] = self.ask("/health/detailed").json()
        return detailed if detailed["status"] == "healthy" else None

    def not_passing(self) -> dict[str, str]:
        """Return the messages of the checks that do not pass."""
        checks = self.ask("/health/detailed").json()["checks"]
        return {
            name: check["message"] for name, check in checks.items() if check["status"] != "pass"
        }

    def accept(self, seconds: float) -> str:
        """Have a job accepted that takes so long, and return its id."""
        body = {"task": "trial.work", "payload": {"seconds": seconds}}
        reply = self.ask(JOBS, method="POST", json_body=body)
        assert reply.status == 202, reply
        return str(reply.json()["id"])

    def jobs(self, state: str) -> list[dict[str, Any]]:
        """Return all jobs of the trial's task that are in a state."""
        found: list[dict[str, Any]] = []
        further = ""
        while True:
            page = self.ask(f"{JOBS}?queue=default&state={state}&limit=100{further}").json()
            found += [job for job in page["items"] if job["task"] == "trial.work"]
            if page["nextCursor"] is None:
                return found
            further = f"&cursor={page['nextCursor']}"

    def job(self, job_id: str) -> dict[str, Any]:
        """Return one job as it is now."""
        found: dict[str, Any] = self.ask(f"{JOBS}/{job_id}").json()
        return found

    def completed(self, ids: list[str], *, seconds: float = 60) -> list[dict[str, Any]]:
        """Return the jobs once all of them are completed, one after another."""
        done = []
        for each in ids:
            wait_until(
                lambda each=each: self.job(each)["state"] == "completed",  # type: ignore[misc]
                seconds=seconds,
                what=lambda each=each: f"{each} of {len(ids)} completed: {self.job(each)}",  # type: ignore[misc]
            )
            done.append(self.job(each))
        return done

    @contextmanager
    def beside(self, command: str, **environment: str) -> Iterator[Container]:
        """Run another container of the service ``backend``, with other variables."""
        quick = {"DB_HEALTH_CHECK_INTERVAL": "500", "HEALTH_CHECK_INTERVAL": "500"}
        given = {**quick, **environment}
        variables = [f"--env={name}={value}" for name, value in given.items()]
        name = self.compose("run", "--detach", "--no-deps", *variables, "backend", command)
        try:
            yield Container(name.splitlines()[-1], self.port)
        finally:
            attempt("rm", "--force", name.splitlines()[-1])

    def sql(self, statement: str, *, database: str = "viralfx") -> str:
        """Ask Postgres, as its owner."""
        client = (
            "psql",
            "--username=viralfx",
            f"--dbname={database}",
            "--tuples-only",
            "--no-align",
        )
        return self.compose("exec", "-T", "postgres", *client, "--command", statement)


def _by_number(container: Composed) -> int:
    return int(str(container["Name"]).rpartition("-")[2])


@contextmanager
def trial(image: str, folder: Path) -> Iterator[Trial]:
    """Prepare the trial with a task for tests and quick leases; it is gone afterwards."""
    tasks = {
        "environment": {
            "TASK_MODULES": "trial_tasks",
            "JOB_LEASE": "3000",
            "JOB_SWEEP_INTERVAL": "500",
        },
        "volumes": [f"{Path(__file__).with_name('trial_tasks.py')}:/app/trial_tasks.py:ro"],
    }
    more = folder / "more.json"
    more.write_text(json.dumps({"services": {"backend": tasks, "worker": tasks}}))
    made = Trial(image, more)
    try:
        yield made
    finally:
        made.down()
