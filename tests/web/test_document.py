"""The OpenAPI document: reproducible, matching the settings, with valid examples."""

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
import pytest
from litestar import Litestar
from litestar.openapi import OpenAPIConfig
from litestar.testing import AsyncTestClient
from tests.soak import cycles
from tests.system.service import ROOT, clean_environment

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app
from viralfx.web.jobs import schemas as views

JOBS = "/api/v1/jobs"
API = Settings(api_token=Secret("api"))
MANAGEMENT = Settings(management_token=Secret("management"))
BOTH = Settings(
    api_token=Secret("api"), management_token=Secret("management"), health_details="authorized"
)
PRINT = """
import asyncio, sys
from httpx import ASGITransport, AsyncClient
from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app

async def main():
    app = create_app(Settings(task_modules=("tests.job_tasks",), api_token=Secret("api")))
    async with AsyncClient(transport=ASGITransport(app=app), base_url="http://test") as client:
        sys.stdout.write((await client.get("/api/docs/openapi.json")).text)

asyncio.run(main())
"""


@cache
def document(settings: Settings) -> dict[str, Any]:
    """Return the document of the service with these settings."""
    schema: dict[str, Any] = create_app(settings).openapi_schema.to_schema()
    return schema


@pytest.mark.soak
def test_each_process_makes_the_same_bytes() -> None:
    """The hash seed, and so the order of sets, does not matter."""
    made = set()
    for seed in cycles(6, usual=2):
        environment = {**clean_environment(), "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
        made.add(
            subprocess.run(
                [sys.executable, "-c", PRINT],
                env=environment,
                capture_output=True,
                check=True,
                timeout=60,
            ).stdout
        )

    (only,) = made
    assert '"parcels.ship"' in only.decode()


def test_a_second_document_of_one_application_is_the_same() -> None:
    """Completing a document twice changes nothing."""
    app = create_app(Settings())
    first, second = app.openapi_schema.to_schema(), app.openapi_schema.to_schema()

    assert first == second


@pytest.mark.parametrize(
    ("settings", "schemes"),
    [
        (Settings(), set()),
        (API, {"apiToken"}),
        (MANAGEMENT, {"managementToken"}),
        (BOTH, {"apiToken", "managementToken"}),
    ],
)
def test_security_is_declared_for_configured_tokens(settings: Settings, schemes: set[str]) -> None:
    """Exactly the operations that need a token require its scheme."""
    made = document(settings)
    found = made["components"].get("securitySchemes", {})
    needed: dict[str, set[str]] = {}
    for operation in _operations(made):
        for requirement in operation.get("security", []):
            needed.setdefault(next(iter(requirement)), set()).add(operation["operationId"])

    assert set(found) == set(needed) == schemes
    assert all((each["type"], each["scheme"]) == ("http", "bearer") for each in found.values())
    if "apiToken" in schemes:
        assert needed["apiToken"] == {
            "job",
            "jobAccept",
            "jobAcceptBatch",
            "jobCancel",
            "jobCancelAll",
            "jobCancelWaiting",
            "jobEvents",
            "jobList",
            "jobRetry",
            "jobRetryAll",
            "jobRun",
            "queueList",
            "queuePause",
            "queueResume",
            "scheduleList",
            "schedulePause",
            "scheduleResume",
            "scheduleRun",
        }
    if "managementToken" in schemes:
        details = {"healthDetailed", "healthInfo", "healthCheck", "loggers", "logger"}
        always = {"healthShutdown", "healthShutdownStatus", "healthTasks", "loggerChange"}
        more = details if settings.health_details == "authorized" else set()
        assert needed["managementToken"] == always | more


def _operations(made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for item in made["paths"].values():
        yield from item.values()


def test_the_plugin_declares_the_management_token() -> None:
    """The application's OpenAPI configuration is not changed."""
    config = OpenAPIConfig(title="Shop", version="1")
    plugin = OperationsPlugin(OperationsConfig(settings=MANAGEMENT))
    made = Litestar(plugins=[plugin], openapi_config=config).openapi_schema.to_schema()

    assert set(made["components"]["securitySchemes"]) == {"managementToken"}
    assert made["paths"]["/health/shutdown"]["post"]["security"] == [{"managementToken": []}]
    assert not isinstance(config.components, list)
    assert config.components.security_schemes is None


def test_known_values_are_enumerations_and_formats() -> None:
    """Tasks, queues and states are enumerations; ids are UUIDs; streams are event streams."""
    settings = Settings(
        task_modules=("tests.job_tasks",),
        queues=("b", "default", "a", "analytics", "notifications"),
    )
    paths = document(settings)["paths"]
    listed = {each["name"]: each["schema"] for each in paths[JOBS]["get"]["parameters"]}
    body = paths[JOBS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    variants = {each["title"]: each["properties"]["payload"] for each in body["oneOf"]}
    events = paths[f"{JOBS}/{{job_id}}/events"]["get"]["responses"]["200"]["content"]

    assert listed["queue"]["enum"] == ["a", "analytics", "b", "default", "notifications"]
    assert listed["state"]["enum"] == ["waiting", "active", "completed", "failed", "cancelled"]
    assert listed["cursor"] == {"type": "string", "format": "uuid"}
    assert {"parcels.echo", "parcels.ship"} < set(body["properties"]["task"]["enum"])
    assert body["properties"]["task"]["enum"] == sorted(variants)
    assert variants["parcels.ship"] == {"$ref": "#/components/schemas/Payload.Parcel"}
    assert variants["parcels.echo"] == {"description": "Any JSON"}
    assert set(events) == {"text/event-stream"}
    for path, item in paths.items():
        for operation in item.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "job_id":
                    assert parameter["schema"] == {"type": "string", "format": "uuid"}, path


@pytest.mark.parametrize("modules", [(), ("tests.offered_tasks",)])
def test_the_document_lists_the_tasks_that_clients_may_submit(modules: tuple[str, ...]) -> None:
    """The built-in tasks and one with ``api=False`` are not there; a choice is never empty."""
    made = document(Settings(task_modules=modules))
    bodies = [
        made["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for path in (JOBS, f"{JOBS}/batch")
    ]
    single, several = (each["schema"] for each in bodies)
    offered = ["offered.nothing", "offered.order", "offered.webhook"]
    for job in (single, several["properties"]["jobs"]["items"]):
        name = job["properties"]["task"]
        assert name.get("enum") == (offered if modules else None)
        assert [each["title"] for each in job.get("oneOf", ())] == (offered if modules else [])
        assert ("takes jobs of clients" in name.get("description", "")) is not bool(modules)
    assert [len(each.get("examples", ())) for each in bodies] == ([2, 1] if modules else [0, 0])


async def test_every_example_of_a_request_is_accepted() -> None:
    """The examples are sent unchanged, with and without a time."""
    app = create_app(Settings(task_modules=("tests.offered_tasks",)))
    async with AsyncTestClient(app) as client:
        made = (await client.get("/api/docs/openapi.json")).json()
        examples = [
            (path, method, example["value"])
            for path, item in made["paths"].items()
            for method, operation in item.items()
            for content in operation.get("requestBody", {}).get("content", {}).values()
            for example in content.get("examples", {}).values()
        ]
        replies = [
            await client.request(method, path, json=value) for path, method, value in examples
        ]

    assert len(replies) >= 2
    assert {reply.status_code for reply in replies} <= {200, 202}


def test_every_example_of_a_response_has_its_type() -> None:
    """The examples include null fields."""
    paths = document(Settings())["paths"]

    def examples(path: str, method: str, status: str) -> list[Any]:
        content = paths[path][method]["responses"][status]["content"]["application/json"]
        return [example["value"] for example in content["examples"].values()]

    for kind, values in (
        (views.JobAccepted, examples(JOBS, "post", "202")),
        (views.JobPage, examples(JOBS, "get", "200")),
        (views.JobView, examples(f"{JOBS}/{{job_id}}", "get", "200")),
    ):
        assert values
        for value in values:
            msgspec.convert(value, kind)
