"""Tasks that the module of the application declares are known without being listed."""

import asyncio
import re
import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient
from tests.servers.waiting import wait_until

from viralfx.core.errors import ConfigurationError
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.tasks import UnknownTaskError
from viralfx.runner.applications import find_application
from viralfx.settings import Settings
from viralfx.testing import assert_submitted, run_pending

IMPORTS = """\
from litestar import Litestar
from starlette.applications import Starlette
from viralfx import OperationsConfig, OperationsPlugin, task
from viralfx.asgi import OperationsMiddleware
from viralfx.settings import Settings
from viralfx.web.layer import OperationsLayer

def config(**more):
    return OperationsConfig(settings=Settings(), **more)
"""
ABOVE = """
@task("own.above")
async def above(number: int) -> int:
    return number + 1
"""
BELOW = """
@task("own.below")
async def below(number: int) -> int:
    return number - 1
"""
PLUGIN = "\napp = Litestar(plugins=[OperationsPlugin(config(jobs_api=True))])\n"
MIDDLEWARE = "\napp = OperationsMiddleware(Starlette(), config(jobs_api=True))\n"
FACTORY = """
def create_app():
    return Litestar(plugins=[OperationsPlugin(config(jobs_api=True))])
"""
EXTENDED = """
class Ours(OperationsPlugin):
    def __init__(self, options):
        super().__init__(options)

app = Litestar(plugins=[Ours(config(jobs_api=True))])
"""
TWO = """
first = OperationsPlugin(config())
app = Litestar(plugins=[first], logging_config=None)
second = OperationsPlugin(config(path="/second"))
other = Litestar(plugins=[second], logging_config=None)
"""
MakeModule = Callable[..., ModuleType]


@pytest.fixture(name="module")
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeModule:
    """Return a function that makes a module of parts of code, and imports it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(*parts: str, name: str = "own_module") -> ModuleType:
        (tmp_path / f"{name}.py").write_text("".join([IMPORTS, *parts]), encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return import_module(name)

    return make


def completed(client: TestClient[Any], task: str) -> Any:
    """Submit a job of a task over HTTP, and return it when it has ended."""
    accepted = client.post("/api/v1/jobs", json={"task": task, "payload": 7})
    assert accepted.status_code == 202, accepted.text
    path = accepted.json()["links"]["self"]

    def ended() -> Any:
        job = client.get(path).json()
        return job if job["state"] == "completed" else None

    return wait_until(ended)


def known(app: Any) -> set[str]:
    """Return the tasks of an application that is about to start, without the built-in ones."""
    _, layer = find_application(Settings(), f"{app.__name__}:app")
    built_in = layer.assembly.jobs.calls.built_in
    return {task.name for task in layer.assembly.jobs.tasks} - built_in


@pytest.mark.each_python
@pytest.mark.parametrize("layer", [PLUGIN, MIDDLEWARE, FACTORY, EXTENDED])
def test_a_job_of_a_task_of_the_module(layer: str, module: MakeModule) -> None:
    """It is accepted and completes, wherever the module declares the task."""
    made = module(ABOVE, layer, BELOW)
    app = made.create_app() if layer is FACTORY else made.app
    with TestClient(app) as client:
        jobs = [completed(client, task) for task in ("own.above", "own.below")]

    assert [job["result"] for job in jobs] == [8, 6]


def test_the_document_has_the_tasks_below_the_plugin(module: MakeModule) -> None:
    """The enumeration of tasks is made when the document is, not with the plugin."""
    app = module(ABOVE, PLUGIN, BELOW).app
    body = app.openapi_schema.to_schema()["paths"]["/api/v1/jobs"]["post"]["requestBody"]
    task = body["content"]["application/json"]["schema"]["properties"]["task"]

    assert task["enum"] == ["own.above", "own.below"]


BARE = "\napp = Litestar()\n"
STARLETTE = "\napp = Starlette()\n"
DECORATED = """
import functools
from viralfx import retry

@task("own.decorated")
@retry(attempts=2)
async def decorated(number: int) -> int:
    return number

for each in "ab":
    @task(f"own.{each}")
    async def loop(number: int) -> int:
        return number
"""
ELSEWHERE = """
@task("own.elsewhere")
async def elsewhere(number: int) -> int:
    return number

def nested():
    @task("own.nested")
    async def inner(number: int) -> int:
        return number
    return inner
"""
IMPORTED = """
from own_other import elsewhere, nested
inner = nested()
"""


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ((BARE, ABOVE), {"own.above"}),
        ((STARLETTE, ABOVE), {"own.above"}),
        ((PLUGIN, DECORATED), {"own.decorated", "own.a", "own.b"}),
        ((PLUGIN, ABOVE, IMPORTED), {"own.above"}),
        ((ABOVE, BELOW, PLUGIN.replace("config(", "config(tasks=[below], ")), {"own.below"}),
        ((ABOVE, PLUGIN.replace("config(", "config(tasks=[], ")), set()),
        ((ABOVE, ABOVE, PLUGIN), {"own.above"}),
    ],
    ids=["added", "added to Starlette", "decorated", "imported", "named", "none", "again"],
)
def test_the_tasks_that_serve_knows(
    parts: tuple[str, ...], names: set[str], module: MakeModule
) -> None:
    """The functions at the top level of the module itself, unless the plugin names its tasks."""
    module(ELSEWHERE, name="own_other")

    assert known(module(*parts)) == names


def test_a_submission_before_the_start(module: MakeModule) -> None:
    """It knows the tasks of the module, and the test functions run them; others are refused."""
    made = module("\nlayer = OperationsLayer(config())\n", ABOVE, ELSEWHERE)
    asyncio.run(made.layer.jobs.submit(made.above, 7))
    asyncio.run(made.layer.jobs.submit("own.elsewhere", 7))
    with pytest.raises(UnknownTaskError, match=r"does not know the task 'own\.nested'"):
        asyncio.run(made.layer.jobs.submit(made.nested(), 7))
    with pytest.raises(PayloadError):
        asyncio.run(made.layer.jobs.submit(made.above, "seven"))
    assert_submitted(made.layer, made.above, 7)

    assert [job.result for job in run_pending(made.layer)] == [8, 7]


@pytest.mark.parametrize(
    ("task", "settings", "problem"),
    [
        ("@task('own.queued', queue='nowhere')", "", "there is no queue named 'nowhere'"),
        ("@task('own.above')", "", "there are two tasks named 'own.above'"),
        (
            "@task('own.lost')",
            'environment="production", console="off"',
            "DATABASE_URL: ENVIRONMENT=production refuses to keep jobs in memory",
        ),
    ],
)
def test_a_task_that_cannot_work(
    task: str, settings: str, problem: str, module: MakeModule
) -> None:
    """The start fails as for a listed task, and the log has the reason."""
    plugin = f"\nplugin = OperationsPlugin(OperationsConfig(settings=Settings({settings})))\n"
    wrong = f"\n{task}\nasync def wrong(number: int) -> int: ...\n"
    module(plugin, "app = Litestar(plugins=[plugin])\n", ABOVE, wrong)
    with pytest.raises(ConfigurationError, match=re.escape(problem)):
        find_application(Settings(), "own_module:app")


def fail_to_start(*apps: Litestar) -> None:
    """Expect that an application does not start."""
    for app in apps:
        with pytest.raises(ExceptionGroup), TestClient(app):
            pass


NAME_THEM = "name the tasks of each one with OperationsConfig"


@pytest.mark.parametrize("started", [find_application, None])
def test_two_plugins_of_a_module(
    started: Callable[..., object] | None, module: MakeModule, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither starts, under any server: each has to name its tasks."""
    made = module(TWO, ABOVE)
    if started is None:
        fail_to_start(made.app, made.other)
        problems = caplog.text
    else:
        with pytest.raises(ConfigurationError) as error:
            started(Settings(), "own_module:app")
        problems = str(error.value)

    assert "OperationsPlugin: the module own_module makes two" in problems
    assert "('own.above')" in problems
    assert NAME_THEM in problems


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ((TWO,), set()),
        ((TWO.replace('"/second"', '"/second", tasks=[]'), ABOVE), {"own.above"}),
        ((ABOVE, TWO.replace('"/second"', '"/second", tasks=[above]')), {"own.above"}),
        ((ABOVE, TWO.replace("other =", "app =").replace("second", "first")), {"own.above"}),
        ((ABOVE, PLUGIN, "\nunused = OperationsPlugin(config())\n"), {"own.above"}),
        ((ABOVE, BARE, PLUGIN.replace("app =", "other =")), {"own.above"}),
    ],
    ids=["no task", "none named", "named", "replaced", "unused", "added"],
)
def test_two_plugins_of_which_one_takes_the_tasks(
    parts: tuple[str, ...], names: set[str], module: MakeModule
) -> None:
    """A plugin without an application does not count, nor does one that is gone."""
    assert known(module(*parts)) == names


def test_plugins_of_a_function(module: MakeModule) -> None:
    """Each of them in turn has the tasks of the module; two at the same time do not start."""
    made = module(FACTORY, ABOVE)
    apps = [made.create_app() for _ in range(2)]
    results = []
    for app in apps:
        with TestClient(app) as client:
            results.append(completed(client, "own.above")["result"])
    with TestClient(apps[0]):
        fail_to_start(apps[1])
    with TestClient(apps[1]):
        pass

    assert results == [8, 8]


def test_a_module_that_two_names_have(module: MakeModule) -> None:
    """The program may be a module of TASK_MODULES, too: its tasks are those of that module."""
    settings = "settings=Settings(task_modules=('own_program',))"
    made = module(
        ABOVE, PLUGIN.replace("config(", f"OperationsConfig({settings}, "), name="own_program"
    )
    namespace = runpy.run_path(str(made.__file__), run_name="__main__")
    with TestClient(namespace["app"]) as client:
        job = completed(client, "own.above")

    assert job["result"] == 8
