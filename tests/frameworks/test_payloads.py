"""Models of Pydantic as payloads and results of a FastAPI application's jobs."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import date
from typing import Annotated, Any, Literal, cast

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from litestar.testing import TestClient
from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator
from pydantic import v1 as pydantic1
from pydantic.alias_generators import to_camel

from viralfx import JobContext, OperationsConfig, PayloadError, PayloadTooLargeError, task
from viralfx.asgi import OperationsMiddleware
from viralfx.core.errors import ConfigurationError
from viralfx.settings import Settings
from viralfx.settings.groups import JobSettings
from viralfx.testing import assert_submitted, run_pending, submitted
from viralfx.web.app import create_app

JOBS = "/api/v1/jobs"


class Order(BaseModel):
    """A body of a request, a payload and a result."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    number: int = Field(gt=0)
    ship_on: date
    note: str = Field(default="", max_length=500)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def weekday(self) -> str:
        """The day of the week."""
        return f"{self.ship_on:%A}"


class Paid(BaseModel):
    """An event."""

    kind: Literal["paid"] = "paid"
    order: Order


class Lost(BaseModel):
    """Another event."""

    kind: Literal["lost"] = "lost"
    reason: str


class Moved(BaseModel):
    """Reads the objects of an earlier version, and nothing else than an object."""

    place: str

    @model_validator(mode="before")
    @classmethod
    def rename(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Accept the earlier name of the field."""
        return {"place": given.get("location"), **given}


Event = Annotated[Paid | Lost, Field(discriminator="kind")]


class Parcel(msgspec.Struct):
    """A payload of msgspec, for comparison."""

    number: int


@task("orders.pack", unique="unfinished", concurrency=1, concurrency_key="number")
async def pack(order: Order, context: JobContext) -> Order:
    """Return a copy that ships on the next day of its month."""
    assert type(order) is Order
    context.report(1, 1, f"order {order.number}")
    await context.submit(record, [Paid(order=order), Lost(reason="rain")])
    return order.model_copy(update={"ship_on": order.ship_on.replace(day=order.ship_on.day + 1)})


@task("events.record")
def record(events: list[Event]) -> dict[str, Event]:
    """Return the last event of each kind, in a thread."""
    return {event.kind: event for event in events}


@task("parcels.move")
async def move(moved: Moved) -> None:
    """Take a payload whose code raises an error for null."""


@task("parcels.send")
async def send(parcel: Parcel) -> None:
    """Send a parcel."""


api = FastAPI()


@api.post("/orders", status_code=202)
async def place(order: Order) -> dict[str, str]:
    """Submit the body."""
    return {"job": (await app.jobs.submit(pack, order)).job.id}


def create() -> OperationsMiddleware:
    """Return the application with empty queues."""
    settings = Settings(access_log=False, job=JobSettings(max_result_bytes=400))
    config = OperationsConfig(settings=settings, tasks=[pack, record, send], jobs_api=True)
    return OperationsMiddleware(api, config)


app = create()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient[Any]]:
    """Run the application; its jobs wait for :func:`run_pending`."""
    made = create()
    made.assembly.jobs.disable_worker()
    monkeypatch.setitem(globals(), "app", made)
    with TestClient(cast("Any", made)) as client:
        yield client


def test_the_body_of_a_request_is_a_payload(client: TestClient[Any]) -> None:
    """The task gets a model, the ledger JSON with its aliases, and the result has all fields."""
    body = {"number": 7, "shipOn": "2026-01-06"}
    first, again = (client.post("/orders", json=body).json()["job"] for _ in range(2))
    order = Order(number=7, ship_on=date(2026, 1, 6))
    (job,) = assert_submitted(app, pack, order, count=1)

    assert first == again == job.id, "an equal model is the same job"
    assert job.payload == {"number": 7, "shipOn": "2026-01-06", "note": ""}

    packed, recorded = run_pending(app, raise_errors=True)
    shown = client.get(f"{JOBS}/{packed.id}").json()
    assert shown["progress"] == {"current": 1, "total": 1, "message": "order 7"}
    assert shown["result"] == {**job.payload, "shipOn": "2026-01-07", "weekday": "Wednesday"}
    assert recorded.payload[0] == {"kind": "paid", "order": job.payload}
    assert recorded.result["lost"] == {"kind": "lost", "reason": "rain"}


def refused(client: TestClient[Any], **body: Any) -> httpx.Response:
    """Submit a job that is refused."""
    reply = client.post(JOBS, json=body)
    assert reply.status_code == 422
    return reply


def test_a_payload_that_does_not_fit_is_refused_over_http(client: TestClient[Any]) -> None:
    """By a problem of the same form as for other types, without the values of the request."""
    wrong = {"number": "top-secret", "shipOn": "2026-01-06"}
    found = refused(client, task="orders.pack", payload=wrong).json()
    other = refused(client, task="parcels.send", payload={"number": "top-secret"}).json()

    assert found.keys() == other.keys()
    assert {**found, "errors": None} == {**other, "errors": None, **correlation(found)}
    assert [each.keys() for each in found["errors"]] == [each.keys() for each in other["errors"]]
    assert found["errors"][0]["key"] == "payload"
    assert found["errors"][0]["message"].endswith("integer - at `$.number`")
    assert "top-secret" not in str(found)

    jobs = [
        {"task": "orders.pack", "payload": {"number": number, "shipOn": "2026-01-06"}}
        for number in (1, 0)
    ]
    batch = client.post(f"{JOBS}/batch", json={"jobs": jobs})
    (problem,) = batch.json()["errors"]
    assert problem["key"] == "jobs[1].payload"
    assert problem["message"].endswith("Input should be greater than 0 - at `$.number`")
    assert submitted(app) == []


def correlation(found: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that differ between two requests."""
    return {"correlationId": found["correlationId"]}


def test_a_repeated_key_compares_models_as_json(client: TestClient[Any]) -> None:
    """Another order of fields is the same job, and another value is a conflict."""
    headers = {"Idempotency-Key": "order-7"}
    bodies: list[dict[str, Any]] = [
        {"number": 7, "shipOn": "2026-01-06"},
        {"shipOn": "2026-01-06", "number": 7.0},
        {"shipOn": "2026-01-06", "number": 8},
    ]
    replies = [
        client.post(JOBS, json={"task": "orders.pack", "payload": body}, headers=headers)
        for body in bodies
    ]

    assert [reply.status_code for reply in replies] == [202, 200, 409]


async def test_a_payload_that_does_not_fit_is_refused_at_the_submission() -> None:
    """Also one that a model does not check itself, or that is too long."""
    made = create()
    wrong = Order.model_construct(number=-1, ship_on=date(2026, 1, 6), note="")
    with pytest.raises(PayloadError, match=r"greater than 0 - at `\$.number`"):
        await made.jobs.submit(pack, wrong)
    with pytest.raises(PayloadError, match="Input should be an object"):
        await made.jobs.submit("orders.pack", 3)
    with pytest.raises(PayloadError, match=r"Input tag 'kind' should be one of .* - at `\$\[0\]`"):
        await made.jobs.submit_many("events.record", [[], [{"kind": "top-secret"}]])
    with pytest.raises(PayloadTooLargeError, match="JOB_MAX_RESULT_BYTES=400"):
        await made.jobs.submit(pack, Order(number=1, ship_on=date(2026, 1, 6), note="x" * 400))
    assert await submitted(made) == []


def test_the_document_has_the_models() -> None:
    """The jobs API of the service shows the schema of each payload."""
    document = create_app(Settings(task_modules=(__name__,))).openapi_schema.to_schema()
    body = document["paths"][JOBS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    payloads = {each["title"]: each["properties"]["payload"] for each in body["oneOf"]}
    schemas = document["components"]["schemas"]

    assert payloads["orders.pack"] == {"$ref": "#/components/schemas/Payload.Model.Order"}
    assert payloads["parcels.move"] == {"$ref": "#/components/schemas/Payload.Model.Moved"}
    assert payloads["parcels.send"] == {"$ref": "#/components/schemas/Payload.Parcel"}
    assert payloads["events.record"]["items"]["discriminator"]["mapping"] == {
        kind: f"#/components/schemas/Payload.Model.{kind.title()}" for kind in ("lost", "paid")
    }
    assert schemas["Payload.Model.Order"]["required"] == ["number", "shipOn"]
    assert schemas["Payload.Model.Paid"]["properties"]["order"] == payloads["orders.pack"]


async def test_models_are_kept_in_the_cache() -> None:
    """Each caller gets a model of its own."""

    async def load() -> list[Event]:
        return [Paid(order=Order(number=1, ship_on=date(2026, 1, 6)))]

    cache = create().cache
    found = [await cache.get_or_load_value("events", 60.0, load, list[Event]) for _ in range(2)]

    assert found == [await load()] * 2
    assert found[0] is not found[1]


class Old(pydantic1.BaseModel):
    """A model of Pydantic 1."""


class Report:
    """Has no JSON."""


def unsupported() -> list[Callable[..., object]]:
    """Return tasks that no application can have."""

    @task("old.read")
    async def read(old: Old) -> None:
        """Take a model that is not supported."""

    @task("old.list")
    def list_all(_: None) -> dict[str, list[Old]]:
        """Return such models."""
        return {}

    @task("old.report")
    async def report(_: None) -> Report | None:
        """Return an object that has no JSON."""

    return [read, list_all, report]


async def as_text(
    call_next: Callable[[], Awaitable[Any]], context: JobContext, payload: object
) -> str:
    """Replace each result, as middleware."""
    return f"{context.id} {payload} {await call_next()}"


def test_types_that_cannot_work_are_errors_of_the_start() -> None:
    """All of them at once: not of a request, and not of a job whose work is done."""
    config = OperationsConfig(settings=Settings(), tasks=unsupported())
    with pytest.raises(ConfigurationError) as caught:
        OperationsMiddleware(api, config)

    old = "Old is a model of Pydantic 1; declare it as one of Pydantic 2"
    # Each ends with the file and the line of its task.
    assert [problem.rpartition(" (")[0] for problem in caught.value.problems] == [
        f"@task('old.read'): its payload has no JSON: {old}",
        f"@task('old.list'): its result has no JSON: {old}",
        (
            "@task('old.report'): its result has no JSON: msgspec encodes no Report; return a dict,"
            " a dataclass or a model"
        ),
    ]


def test_middleware_may_make_json_of_a_result() -> None:
    """So the annotation of the task does not say what its result will be."""
    report = unsupported()[-1]
    config = OperationsConfig(settings=Settings(), tasks=[report], task_middleware=[as_text])
    made = OperationsMiddleware(api, config)
    asyncio.run(made.jobs.submit(report, None))
    (job,) = run_pending(made, raise_errors=True)

    assert job.result == f"{job.id} None None"
