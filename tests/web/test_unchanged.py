"""The plugin changes no answer of its application, and leaves the state to it."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from litestar import Litestar
from litestar.config.app import AppConfig
from litestar.datastructures import State
from litestar.plugins import InitPlugin
from litestar.testing import AsyncTestClient, TestClient
from tests.web.observing import Build
from tests.web.sample import CASES

from viralfx import OperationsConfig, OperationsPlugin, task
from viralfx.settings import Settings
from viralfx.web.plugin import plugin_of

SETTINGS = Settings()
JOB = {"task": "count", "payload": 1}


@task("count")
async def count(payload: int) -> int:
    """Return the payload."""
    return payload


def plugin(**options: Any) -> OperationsPlugin:
    """Return a plugin; ``options`` are those of ``OperationsConfig``."""
    return OperationsPlugin(OperationsConfig(settings=SETTINGS, **options))


def observed(name: str, plugins: Sequence[OperationsPlugin], *, lifespan: bool) -> list[object]:
    """Return everything that clients and parts of an application observe."""
    build = Build(plugins)
    app, asks = CASES[name](build)
    client = TestClient(app, raise_server_exceptions=False)
    if lifespan:
        with client:
            answers = [ask(client) for ask in asks]
    else:
        answers = [ask(client) for ask in asks]
    return [*answers, *build.noted]


@pytest.mark.each_python
@pytest.mark.parametrize("lifespan", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_an_application_answers_as_without_the_plugin(name: str, *, lifespan: bool) -> None:
    """Status, headers without the correlation id, body, order of hooks, and errors.

    With a lifespan the gate is around the application, without one it is not.
    """
    expected = observed(name, [], lifespan=lifespan)

    assert observed(name, [plugin(include_in_schema=False)], lifespan=lifespan) == expected


# -- the state -------------------------------------------------------------------------------------


def with_jobs(*plugins: Any, **options: Any) -> Litestar:
    """Return an application with the jobs API; ``options`` are those of ``Litestar``."""
    added = plugin(tasks=[count], jobs_api=True)
    return Litestar(plugins=[added, *plugins], logging_config=None, **options)


async def answers(app: Litestar) -> list[int]:
    """Return the statuses of an endpoint, and of a job that is accepted and read."""
    async with AsyncTestClient(app) as client:
        accepted = await client.post("/api/v1/jobs", json=JOB)
        job = await client.get(accepted.json()["links"]["self"])
        return [
            (await client.get("/health/live")).status_code,
            accepted.status_code,
            job.status_code,
        ]


async def test_the_state_has_only_what_the_application_puts_there() -> None:
    """At construction, while it runs, and afterwards; so it can be copied and pickled."""
    given = {"operations": 1, "jobs_api": 2, "operations_endpoints": 3}
    app = with_jobs(state=State(dict(given)))
    at_first = dict(app.state.dict())
    async with AsyncTestClient(app):
        app.state.operations = 4
        running = dict(app.state.dict())
        frozen = app.state.immutable_copy().dict()
        unpickled = pickle.loads(pickle.dumps(running))  # noqa: S301 - its own

    assert at_first == given
    assert running == app.state.dict() == {**given, "operations": 4}
    assert frozen == unpickled == running


class Replaces(InitPlugin):
    """Replaces the state, as a plugin of an application may."""

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Replace the state."""
        app_config.state = State({"own": 1})
        return app_config


async def test_the_layer_serves_with_any_state() -> None:
    """Another plugin, or the application itself, may replace the whole state."""
    app = with_jobs(Replaces())
    app.state = State({"operations": None, "jobs_api": None})

    assert await answers(app) == [200, 202, 200]
    assert app.state.dict() == {"operations": None, "jobs_api": None}


async def test_applications_with_one_state_have_their_own_jobs() -> None:
    """The state is shared, and the layers of the applications are not."""
    state = State({"own": 1})
    first, second = with_jobs(state=state), with_jobs(state=state)
    async with AsyncTestClient(first) as one, AsyncTestClient(second) as other:
        link = (await one.post("/api/v1/jobs", json=JOB)).json()["links"]["self"]
        statuses = [(await client.get(link)).status_code for client in (one, other)]

    assert statuses == [200, 404]
    assert first.state is second.state
    assert state.dict() == {"own": 1}


async def test_one_plugin_in_two_applications_one_after_the_other() -> None:
    """Each is served by the services of its own lifespan, and the first one again."""
    added = plugin(tasks=[count], jobs_api=True)
    apps = [Litestar(plugins=[added], logging_config=None) for _ in range(2)]

    assert [await answers(app) for app in (*apps, apps[0])] == [[200, 202, 200]] * 3


async def test_an_application_that_gets_the_plugin_later_keeps_its_state() -> None:
    """As under ``viralfx serve --app``."""
    app = Litestar(state=State({"operations": 1}), logging_config=None)
    _, added = plugin_of(app, SETTINGS)

    assert added
    assert app.state.dict() == {"operations": 1}
    assert TestClient(app).get("/health/live").status_code == 200


def test_a_copy_of_a_plugin_is_the_plugin() -> None:
    """Litestar copies routers with their options, in which the routes find their layer."""
    added = plugin()

    assert copy.deepcopy({"options": [added]})["options"][0] is added
