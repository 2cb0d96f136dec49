"""A client of the jobs API of a running service."""

from typing import Any

from tests.servers.waiting import wait_until
from tests.system.service import Service

JOBS = "/api/v1/jobs"


def accept(service: Service, task: str, payload: object, **headers: str) -> str:
    """Submit a job and return its id."""
    body = {"task": task, "payload": payload}
    reply = service.get(JOBS, method="POST", json_body=body, headers=headers)
    assert reply.status == 202, reply
    return str(reply.json()["id"])


def job(service: Service, job_id: str) -> dict[str, Any]:
    """Return the current state of a job."""
    shown: dict[str, Any] = service.get(f"{JOBS}/{job_id}").json()
    return shown


def until(service: Service, job_id: str, state: str, *, seconds: float = 20.0) -> dict[str, Any]:
    """Return a job once it is in a state."""

    def in_state() -> dict[str, Any] | None:
        shown = job(service, job_id)
        return shown if shown["state"] == state else None

    found = wait_until(in_state, seconds=seconds, what=f"job {job_id} {state}")
    assert found is not None
    return found
