"""Groups of checks, each with an endpoint."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx import Observation, OperationsConfig, OperationsPlugin, Status
from viralfx.settings import Secret, Settings


class Shop:
    """A check whose status the test sets."""

    status = Status.PASS

    async def check(self) -> Observation:
        """Return the status."""
        code = None if self.status is Status.PASS else "planted"
        return Observation(status=self.status, message="asked", code=code)


def application(shop: Shop, **settings: Any) -> Litestar:
    """Make an application with two groups."""
    config = OperationsConfig(
        settings=Settings(**settings),
        checks={"shop": shop},
        groups={"edge": ["shop", "memory", "shop"], "all-right": ["memory"]},
    )
    return Litestar(plugins=[OperationsPlugin(config)], logging_config=None)


@pytest.fixture
def shop() -> Shop:
    """Return the check that the groups contain."""
    return Shop()


@pytest.fixture
async def client(shop: Shop) -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Return a client of the application."""
    async with AsyncTestClient(application(shop)) as client:
        yield client


@pytest.mark.parametrize(
    ("status", "answer"), [(Status.PASS, 200), (Status.WARN, 200), (Status.FAIL, 503)]
)
async def test_a_group_has_the_worst_status_of_its_checks(
    client: AsyncTestClient[Litestar], shop: Shop, status: Status, answer: int
) -> None:
    """A failing check outside of the group does not matter to it."""
    shop.status = status
    async with asyncio.timeout(10):
        while (await client.get("/health/shop")).json()["status"] != status:
            await client.get("/health/detailed?fresh=1")
    found, other = (
        await client.get("/health/group/edge"),
        await client.get("/health/group/all-right"),
    )

    assert found.status_code == answer
    assert found.json()["name"] == "edge"
    assert found.json()["status"] == status
    assert list(found.json()["checks"]) == ["shop", "memory"]
    assert (
        found.json()["checks"]["shop"].items() <= (await client.get("/health/shop")).json().items()
    )
    assert ("retry-after" in found.headers) is (answer == 503)
    assert found.headers["cache-control"] == "no-store"
    assert (other.status_code, list(other.json()["checks"])) == (200, ["memory"])


async def test_paths_and_methods_of_groups(client: AsyncTestClient[Litestar]) -> None:
    """Unknown groups are problems that list the known ones; HEAD is answered as GET is."""
    unknown = await client.get("/health/group/other")
    head = await client.head("/health/group/edge")
    posted = await client.post("/health/group/edge")
    deeper = [(await client.get(f"/health/group{path}")).status_code for path in ("", "/", "/a/b")]

    assert unknown.status_code == 404
    assert unknown.json()["detail"].endswith("the groups are edge, all-right.")
    assert (head.status_code, head.content) == (200, b"")
    assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")
    assert deeper == [404, 404, 404]


async def test_groups_need_the_token_where_checks_do(shop: Shop) -> None:
    """HEALTH_DETAILS applies to them."""
    app = application(shop, management_token=Secret("planted"), health_details="authorized")
    async with AsyncTestClient(app) as client:
        denied = await client.get("/health/group/edge")
        allowed = await client.get(
            "/health/group/edge", headers={"Authorization": "Bearer planted"}
        )

    assert (denied.status_code, allowed.status_code) == (401, 200)


def test_the_document_has_groups_only_where_there_are_some(shop: Shop) -> None:
    """An application without groups does not offer them."""
    paths = application(shop).openapi_schema.to_schema()["paths"]
    bare = OperationsPlugin(OperationsConfig(settings=Settings()))
    without = Litestar(plugins=[bare], logging_config=None).openapi_schema.to_schema()["paths"]

    assert "/health/group/{group}" in paths
    assert "/health/group/{group}" not in without
