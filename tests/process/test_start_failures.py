"""A start that code of the application fails: the line names its file and line, not a library's."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from viralfx.bootstrap.task_modules import in_one_line
from viralfx.core.errors import ConfigurationError, origin_of
from viralfx.runner.applications import find_application
from viralfx.server.lifespan import ApplicationLifespan
from viralfx.settings import Settings

# The marked line of each module is the cause.
MODULES = {
    "deep": 'import json\n\n\ndef read():\n    return json.loads("{")  # here\n\n\nread()\n',
    "decorated": """from viralfx import task


@task("greet", timeout=-5)  # here
async def greet(payload: str) -> None: ...
""",
    "queued": """from viralfx import task


@task("greet", queue="nowhere")  # here
async def greet(payload: str) -> None: ...
""",
    "handler": """from litestar import Litestar, get


@get("/")
async def untyped(): ...


app = Litestar([untyped])  # here
""",
    "checked": """from litestar import Litestar
from viralfx import OperationsConfig, OperationsPlugin

config = OperationsConfig(checks={"orders": 3})
app = Litestar(plugins=[OperationsPlugin(config)])  # here
""",
    "broken": '"""Broken."""\n\ndef app(:  # here\n',
    "factory": """import json


def app():
    return json.loads("{")  # here
""",
    "started": """import asyncio
from contextlib import asynccontextmanager

from litestar import Litestar
from viralfx import OperationsPlugin


async def connect():
    raise OSError("no route")  # here


@asynccontextmanager
async def lifespan(app):
    await asyncio.sleep(0)
    await connect()
    yield


app = Litestar(lifespan=[lifespan], plugins=[OperationsPlugin()])
""",
    "raw": """async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        raise OSError("no route")  # here
""",
    "fastapi_app": """from contextlib import asynccontextmanager
from fastapi import FastAPI


@asynccontextmanager
async def lifespan(app):
    raise OSError("no route")  # here
    yield


app = FastAPI(lifespan=lifespan)
""",
}


@pytest.fixture
def written(
    tmp_path: Path, plain_environ: pytest.MonkeyPatch
) -> Iterator[Callable[[str], tuple[str, str]]]:
    """Return a function that writes a module; it returns its name and the place of its cause."""
    plain_environ.syspath_prepend(str(tmp_path))
    plain_environ.chdir(tmp_path)
    before = {*sys.modules}

    def write(name: str) -> tuple[str, str]:
        lines = MODULES[name].splitlines()
        number = next(at for at, line in enumerate(lines, 1) if line.endswith("# here"))
        path = tmp_path / f"planted_{name}.py"
        path.write_text(MODULES[name])
        return path.stem, f"({path}:{number})"

    yield write
    for name in {*sys.modules} - before:
        if name.startswith("planted_"):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["deep", "decorated", "handler", "checked", "broken", "factory"])
def test_an_application_that_cannot_be_loaded(
    name: str, written: Callable[[str], tuple[str, str]]
) -> None:
    """The one line of --app ends with the place."""
    module, place = written(name)
    with pytest.raises(ConfigurationError) as caught:
        find_application(Settings(), f"{module}:app")

    (line,) = caught.value.problems
    assert line.endswith(place)


@pytest.mark.parametrize("name", ["deep", "decorated", "queued", "broken"])
def test_a_module_of_tasks_that_cannot_be_used(
    name: str, written: Callable[[str], tuple[str, str]]
) -> None:
    """Also a task that is refused after the import, by the line of its function."""
    module, place = written(name)
    with pytest.raises(ConfigurationError) as caught:
        find_application(Settings(task_modules=(module,)), None)

    (line,) = caught.value.problems
    assert line.endswith(place)


@pytest.mark.parametrize("name", ["started", "raw", "fastapi_app"])
async def test_a_lifespan_that_fails(name: str, written: Callable[[str], tuple[str, str]]) -> None:
    """The error of the application is known, whether its framework raises it or reports it."""
    module, place = written(name)
    app, layer = find_application(Settings(), f"{module}:app")
    layer.operations.staged = True
    lifespan = ApplicationLifespan(app)

    assert not await lifespan.start()
    assert lifespan.error is not None
    assert in_one_line(lifespan.error) == f"OSError: no route {place}"
    assert await lifespan.stop()
    await layer.operations.shutdown.run()


def test_an_installed_application_is_the_users(tmp_path: Path) -> None:
    """Its package is given; without it, the last line of all is the result."""
    path = tmp_path / "site-packages/shop/orders.py"
    code = compile('import json\njson.loads("{")\n', path, "exec")
    with pytest.raises(json.JSONDecodeError) as caught:
        exec(code, {"__name__": "shop.orders"})  # noqa: S102 - code of the test
    # The test itself would be the application otherwise.
    error = caught.value.with_traceback(caught.tb.tb_next)

    assert origin_of(error, {"shop"}) == (error, f"{path}:2")
    assert "json" in origin_of(error)[1]


def test_the_cause_and_the_member_of_a_group_are_found(tmp_path: Path) -> None:
    """A library that wraps an error hides neither the error nor its line."""
    code = compile("raise KeyError('k')", tmp_path / "shop.py", "exec")
    with pytest.raises(KeyError) as caught:
        exec(code, {"__name__": "shop"})  # noqa: S102 - code of the test
    own = caught.value.with_traceback(caught.tb.tb_next)
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = ExceptionGroup("all", [ValueError("of a library"), own])

    assert origin_of(wrapped) == (own, f"{tmp_path / 'shop.py'}:1")
    never_raised = ValueError("of a library")
    assert origin_of(never_raised) == (never_raised, "")
