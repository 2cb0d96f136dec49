"""The name of the service in traces is that of the application."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
from opentelemetry.sdk.trace import TracerProvider

from viralfx.runner.applications import find_application
from viralfx.settings import Settings
from viralfx.telemetry.tracing import SERVICE, service_of
from viralfx.web.layer import OperationsLayer

PLUGIN = """from litestar import Litestar
from viralfx import OperationsPlugin

plugin = OperationsPlugin()
app = Litestar(plugins=[plugin])
"""
PLAIN = """from litestar import Litestar

app = Litestar()
"""
OTHER = """async def app(scope, receive, send): ...
"""
Import = Callable[[str, str], str]


@pytest.fixture
def planted(tmp_path: Path, plain_environ: pytest.MonkeyPatch) -> Iterator[Import]:
    """Turn tracing on; return a function that writes a module below a folder ``shop``."""
    plain_environ.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "shop"
    plain_environ.syspath_prepend(str(folder))
    plain_environ.chdir(tmp_path)
    before = {*sys.modules}

    def write(module: str, code: str) -> str:
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != folder:
            (path.parent / "__init__.py").write_text('"""Planted."""\n')
        path.write_text(code)
        return module

    yield write
    for name in {*sys.modules} - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def resource_of(layer: OperationsLayer) -> Mapping[str, object]:
    """Return the attributes of the process in the spans of a layer."""
    tracing = layer.assembly.tracing
    assert tracing is not None
    provider = tracing.provider
    assert isinstance(provider, TracerProvider)
    found = dict(provider.resource.attributes)
    provider.shutdown()
    return found


@pytest.mark.parametrize("code", [PLUGIN, PLAIN, OTHER], ids=["plugin", "plain", "middleware"])
@pytest.mark.parametrize(
    ("module", "name"), [("store.web", "store"), ("main", "shop"), ("app.main", "shop")]
)
def test_the_application_that_is_served(planted: Import, module: str, name: str, code: str) -> None:
    """By its package, or by the folder around a generic name; without the version of this one."""
    _, layer = find_application(Settings(), f"{planted(module, code)}:app")
    resource = resource_of(layer)

    assert resource["service.name"] == name
    assert "service.version" not in resource


def test_the_plugin_under_another_server(planted: Import) -> None:
    """By the module that makes it; a variable wins."""
    planted("store.web", PLUGIN)
    from store.web import plugin  # type: ignore[import-not-found]  # noqa: PLC0415

    assert resource_of(plugin)["service.name"] == "store"


def test_a_variable_wins(planted: Import, plain_environ: pytest.MonkeyPatch) -> None:
    """The variable works in every program with OpenTelemetry."""
    plain_environ.setenv("OTEL_SERVICE_NAME", "checkout")
    _, layer = find_application(Settings(), f"{planted('store.web', PLUGIN)}:app")

    assert resource_of(layer)["service.name"] == "checkout"


@pytest.mark.usefixtures("planted")
def test_the_service_of_this_package_keeps_its_name() -> None:
    """Also while a task module of the user is loaded."""
    _, layer = find_application(Settings(), None)
    resource = resource_of(layer)

    assert resource["service.name"] == SERVICE == "viralfx-backend"
    assert "service.version" in resource


@pytest.mark.parametrize(
    ("module", "file", "name"),
    [
        (None, None, SERVICE),
        ("viralfx.web.app", None, SERVICE),
        ("store.web", "/srv/store/__init__.py", "store"),
        ("main", "/srv/shop/main.py", "shop"),
        ("main", "/main.py", "main"),
        ("main", "/srv/shop/src/main.py", "shop"),
        ("main", "/src/main.py", "main"),
        ("app", "/app/app.py", "app"),
        ("asgi", None, "asgi"),
        ("__main__", "/srv/shop/serve_shop.py", "serve_shop"),
        ("__main__", "/srv/shop/main.py", "shop"),
        ("__main__", "/srv/store/__main__.py", "store"),
        ("__main__", "/srv/shop/app/__main__.py", "shop"),
    ],
)
def test_a_service_is_named_by_the_module_that_makes_it(
    monkeypatch: pytest.MonkeyPatch, module: str | None, file: str | None, name: str
) -> None:
    """A generic name gives way to that of its folder."""
    top = (module or "viralfx").partition(".")[0]
    if top != "viralfx":
        made = ModuleType(top)
        made.__file__ = file
        monkeypatch.setitem(sys.modules, top, made)

    assert service_of(module) == name
