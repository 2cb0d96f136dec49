"""Log lines of the plugin under the logging of another program."""

import asyncio
import contextlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar, get
from litestar.middleware.logging import LoggingMiddlewareConfig
from litestar.plugins.structlog import StructlogPlugin
from litestar.testing import AsyncTestClient
from litestar.types import Receive

from viralfx import Observation, OperationsConfig, OperationsPlugin, Status
from viralfx.asgi import OperationsMiddleware
from viralfx.settings import Secret, Settings
from viralfx.telemetry.logging.lines import LOGGERS, FactsInMessages
from viralfx.web.plugin import plugin_of

ROOT = Path(__file__).parents[2]


@get("/")
async def index() -> str:
    """Serve a request."""
    return "here"


class Shop:
    """A check whose status the test sets."""

    status = Status.PASS

    async def check(self) -> Observation:
        """Return the status."""
        return Observation(status=self.status, message="asked at planted-secret", code="gone")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Return the output of a handler as ``logging.basicConfig`` makes it."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield output
    root.removeHandler(handler)
    root.setLevel(level)


def found(output: io.StringIO, beginning: str) -> list[str]:
    """Return the lines that begin so."""
    return [line for line in output.getvalue().splitlines() if line.startswith(beginning)]


async def test_messages_contain_their_facts(lines: io.StringIO) -> None:
    """Names, statuses and reasons, without secrets; after the lifespan no filter is left."""
    settings, shop = Settings(management_token=Secret("planted-secret")), Shop()
    plugin = OperationsPlugin(OperationsConfig(settings=settings, checks={"shop": shop}))
    app = Litestar([index], plugins=[plugin], logging_config=None)
    changed = (
        "ERROR:viralfx.health:Health check changed: check=shop, old=pass, new=fail, code=gone,"
    )
    async with AsyncTestClient(app) as client:
        await client.get("/health/detailed?fresh=1")
        shop.status = Status.FAIL

        async def asked() -> list[str]:
            await client.get("/health/detailed?fresh=1")
            return found(lines, changed)

        while not await asked():
            pass
        state = found(
            lines, "INFO:viralfx.lifecycle:State changed: old=starting, new=ready, reason="
        )
    logging.getLogger("viralfx.health").warning("Later", extra={"check": "shop"})

    assert len(found(lines, changed)) == len(state) == 1
    assert "detail=asked at ***, correlationId=" in found(lines, changed)[0]
    assert found(lines, "INFO:viralfx.shutdown:Shutdown began: reason=application lifespan ended")
    assert found(lines, "WARNING:viralfx.health:Later") == ["WARNING:viralfx.health:Later"]


async def test_a_logger_that_is_made_later_has_its_facts(
    monkeypatch: pytest.MonkeyPatch, lines: io.StringIO
) -> None:
    """Modules for webhooks, taskiq and checks are imported when they are first needed."""
    monkeypatch.delitem(logging.root.manager.loggerDict, "viralfx.taskiq", raising=False)
    plugins = [OperationsPlugin(OperationsConfig(settings=Settings())) for _ in range(2)]
    first, second = (Litestar(plugins=[each], logging_config=None) for each in plugins)
    async with AsyncTestClient(first), AsyncTestClient(second):
        logging.getLogger("viralfx.taskiq").warning("Late", extra={"task": "shop"})
        logging.getLogger("shop").warning("Late", extra={"task": "shop"})

    assert found(lines, "WARNING:viralfx.taskiq:") == ["WARNING:viralfx.taskiq:Late: task=shop"]
    assert found(lines, "WARNING:shop:") == ["WARNING:shop:Late"]


def test_every_logger_of_the_package_is_known() -> None:
    """Messages of the access log are whole already."""
    sources = (path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    used = {name for text in sources for name in re.findall(r'getLogger\("viralfx\.(\w+)"\)', text)}

    assert used - {"access"} == set(LOGGERS)


@pytest.mark.parametrize("value", [None, "", "true", "false"])
async def test_requests_are_logged_only_if_a_setting_says_so(
    monkeypatch: pytest.MonkeyPatch, lines: io.StringIO, value: str | None
) -> None:
    """The server of the application logs them already."""
    monkeypatch.delenv("OPS_ACCESS_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("OPS_ACCESS_LOG", value)
    plugin = OperationsPlugin(OperationsConfig(env_prefix="OPS_"))
    async with AsyncTestClient(Litestar([index], plugins=[plugin], logging_config=None)) as client:
        await client.get("/")

    assert len(found(lines, "INFO:viralfx.access:GET / 200")) == (value == "true")


@pytest.mark.parametrize("by", ["structlog", "middleware", "nothing"])
@pytest.mark.parametrize("value", [None, "true"])
def test_an_application_that_logs_requests_has_one_line_for_each(
    monkeypatch: pytest.MonkeyPatch, by: str, value: str | None
) -> None:
    """Also under the server of this package, unless a setting asks for both."""
    monkeypatch.delenv("OPS_ACCESS_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("OPS_ACCESS_LOG", value)
    plugin = OperationsPlugin(OperationsConfig(env_prefix="OPS_"))
    others = [StructlogPlugin()] if by == "structlog" else []
    middleware = [LoggingMiddlewareConfig().middleware] if by == "middleware" else []
    Litestar([index], plugins=[*others, plugin], middleware=middleware)

    logs = plugin.request_recorder()._access_log is not None
    assert logs is (by == "nothing" or value == "true")


@pytest.mark.parametrize("by", ["middleware", "nothing"])
@pytest.mark.parametrize("value", [None, "", "true"])
def test_an_application_without_the_plugin_has_one_line_for_each_request(
    monkeypatch: pytest.MonkeyPatch, by: str, value: str | None
) -> None:
    """The command adds the plugin with settings from the environment."""
    for name in ("ACCESS_LOG", "ACCESS_LOG_FILE"):
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv("ACCESS_LOG", value)
    middleware = [LoggingMiddlewareConfig().middleware] if by == "middleware" else []
    plugin, added = plugin_of(Litestar([index], middleware=middleware), Settings())

    logs = plugin.request_recorder()._access_log is not None
    assert (added, logs) == (True, by == "nothing" or value == "true")


class Odd:
    """A value that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("planted")


def test_every_message_stays_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Percent signs, line breaks, long values and odd objects are facts, too."""
    logger = logging.getLogger("viralfx.events")
    facts = FactsInMessages()
    facts.install()
    facts.install()
    try:
        logger.warning("At %d %%", 7, extra={"text": "100 %s\n x", "odd": Odd(), "none": None})
        logger.warning("Long", extra={"text": "x" * 1000})
        logger.warning("Bare %s", "line")
    finally:
        facts.remove()

    assert caplog.messages == [
        "At 7 %: text=100 %s x, odd=a Odd",
        f"Long: text={'x' * 200}",
        "Bare line",
    ]
    assert logger.filters == []


def test_a_value_adds_no_fact_to_its_line(caplog: pytest.LogCaptureFixture) -> None:
    """Clients choose the path of a refused request; a value of such a form is in quotes."""
    logger = logging.getLogger("viralfx.audit")
    facts = FactsInMessages()
    facts.install()
    try:
        for path in ("/a, outcome=done", '/b",outcome=done', '"/c', "/d, e", 'f "g"'):
            logger.warning("Event", extra={"target": path, "outcome": "refused"})
    finally:
        facts.remove()

    assert caplog.messages == [
        'Event: target="/a, outcome=done", outcome=refused',
        r'Event: target="/b\",outcome=done", outcome=refused',
        r'Event: target="\"/c", outcome=refused',
        "Event: target=/d, e, outcome=refused",
        'Event: target=f "g", outcome=refused',
    ]


HOSTILE = "\r\nWARNING:root:forged\x1b[31m\x7f\x9b1m\u2028\u202e"


async def _fail(scope: Any, receive: Receive, send: Any) -> None:
    while scope["type"] == "lifespan":
        event: Any = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return
    raise ValueError(f"nothing at {' '.join(scope['path'].split())}")


async def _ask(site: OperationsMiddleware, method: str, path: str) -> bytes:
    """Send one request as another server would, and return all bytes of the response."""
    headers = [(name, HOSTILE.encode()) for name in (b"x-correlation-id", b"x-request-id")]
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Any = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    with contextlib.suppress(ValueError):
        await site(scope, receive, send)
    texts = [part for each in sent for pair in each.get("headers", ()) for part in pair]
    return b"".join([*texts, *(each.get("body", b"") for each in sent)])


async def test_control_characters_of_a_client_reach_no_terminal(lines: io.StringIO) -> None:
    """Other servers decode paths and pass methods and headers on; our server refuses them."""
    config = OperationsConfig(settings=Settings(allow_memory_adapters=True), jobs_api=True)
    site = OperationsMiddleware(_fail, config)
    events, started = asyncio.Queue[Any](), asyncio.Event()

    async def send(_event: Any) -> None:
        started.set()

    lifespan: Any = {"type": "lifespan", "asgi": {"version": "3.0"}}
    await events.put({"type": "lifespan.startup"})
    running = asyncio.create_task(site(lifespan, events.get, send))
    await started.wait()
    for path in (f"/{HOSTILE}", f"/health/{HOSTILE}", f"/api/v1/jobs/{HOSTILE}"):
        for method in ("GET", f"GET{HOSTILE}"):
            response = await _ask(site, method, path)
            assert response.decode().isprintable()
    await events.put({"type": "lifespan.shutdown"})
    await running

    text = lines.getvalue()
    failed = found(lines, "ERROR:viralfx.web:Request failed: method=GET, path=/")
    assert failed[0].endswith(r"/ WARNING:root:forged\x1b[31m\x7f\x9b1m \u202e")
    assert all(map(str.isprintable, text.split("\n")))
