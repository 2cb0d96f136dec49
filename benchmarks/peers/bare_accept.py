"""A Litestar application that decodes a job, answers 202 as the API does, and stores nothing."""

import uuid
from datetime import datetime

import msgspec
from litestar import Litestar, post


class Draft(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The request."""

    task: str
    payload: object
    run_at: datetime | None = None


class Accepted(msgspec.Struct, frozen=True):
    """The response."""

    id: str
    queue: str
    state: str
    links: dict[str, str]


@post("/api/v1/jobs", status_code=202)
async def accept(data: Draft) -> Accepted:  # noqa: ARG001 - that it was decoded is the point
    """Answer, and discard the job."""
    job = str(uuid.uuid4())
    return Accepted(job, "default", "waiting", {"self": f"/api/v1/jobs/{job}"})


app = Litestar([accept], logging_config=None)
