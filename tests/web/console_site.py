"""A process with a console, asked through its gate, and its open pages."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.servers.waiting import until

from viralfx import CircuitBreaker, OperationsConfig, OperationsPlugin
from viralfx.domain.health.model import Observation, Status
from viralfx.server.interface import Message
from viralfx.settings import Secret, Settings
from viralfx.web.console import feed
from viralfx.web.gate import Gate
from viralfx.web.sessions import ServingPort, Session

TOKEN = "a-token-of-operators"
SETTINGS = Settings(management_token=Secret(TOKEN), health_check_interval=0.1)
MARKUP = "<img src=x onerror=alert(1)>"
SESSION = "ui/session"
OWN = {"origin": "http://console.test", "content-type": "application/json"}


class MarkedCheck:
    """A check with markup in its texts."""

    def __init__(self) -> None:
        self.status = Status.PASS
        self.message = MARKUP
        self.details = {MARKUP: MARKUP}

    async def check(self) -> Observation:
        """Return the status."""
        return Observation(
            status=self.status, message=self.message, code=MARKUP, details=self.details
        )


@dataclass
class Answer:
    """A response of the gate."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def json(self) -> Any:
        """Return the body."""
        return json.loads(self.body)

    def header(self, name: str) -> str:
        """Return a header."""
        return dict(self.headers)[name]


class Site:
    """A process with a console, asked through its gate."""

    def __init__(self, settings: Settings = SETTINGS, **config: Any) -> None:
        self.check = MarkedCheck()
        self.breaker = CircuitBreaker(name=MARKUP)
        self.plugin = OperationsPlugin(
            OperationsConfig(
                settings=settings,
                checks={"marked": self.check},
                breakers=[self.breaker],
                **config,
            )
        )
        self.gate = Gate(self.plugin.endpoints)

    async def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        headers: Mapping[str, str] | None = None,
        body: object = None,
        query: str = "",
    ) -> Answer:
        """Send a request."""
        sent: list[Message] = []
        content = b"" if body is None else json.dumps(body).encode()

        async def receive() -> Message:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        given = {"host": "console.test", **(headers or {})}
        await self.gate(
            {
                "type": "http",
                "method": method,
                "path": f"/health/{path}",
                "query_string": query.encode(),
                "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()],
                "client": ("127.0.0.1", 1),
            },
            receive,
            send,
        )
        return Answer(
            sent[0]["status"],
            [(k.decode(), v.decode()) for k, v in sent[0]["headers"]],
            b"".join(message.get("body", b"") for message in sent[1:]),
        )

    async def log_in(self, **more: str) -> dict[str, str]:
        """Log in, and return the headers of the console's own requests."""
        answer = await self.ask(SESSION, "POST", headers={**OWN, **more}, body={"token": TOKEN})
        assert answer.status == 204, answer.body
        return {**OWN, "cookie": answer.header("set-cookie").split(";")[0]}

    async def logged_in(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request has a session."""
        state = (await self.ask(SESSION, headers=headers)).json()
        assert state["reads"] == ("settings" if state["loggedIn"] else "status")
        return bool(state["loggedIn"])


def audited(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the fields of the events of the audit trail."""
    return [vars(each) for each in caplog.records if each.name == "viralfx.audit"]


def acted(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str, str, str | None]]:
    """Return the actions of sessions: session, action, target, outcome and detail."""
    lines = [line for line in audited(caplog) if not line["action"].startswith("session.")]
    lines = [line for line in lines if line["action"] != "access"]
    assert {line["address"] for line in lines} <= {"127.0.0.1"}
    names = ("action", "target", "outcome")
    return [
        (
            line["actor"].removeprefix("console "),
            *(line[name] for name in names),
            line.get("detail"),
        )
        for line in lines
    ]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """Return a started process."""
    site = Site()
    await site.plugin.operations.start()
    site.plugin.operations.monitor.start()  # the check, without a worker
    yield site
    await site.plugin.operations.shutdown.run()


class OpenPage:
    """A page that keeps each message of its stream; a blocked one takes none after the first."""

    def __init__(
        self, feed: feed.Feed, *, blocked: bool = False, session: Session | None = None
    ) -> None:
        self.messages: list[bytes] = []
        self.ended = False
        self.error: BaseException | None = None
        self._blocked = blocked
        self._session = session
        self.task = asyncio.ensure_future(self._run(feed))

    async def _run(self, feed: feed.Feed) -> None:
        try:
            await feed.stream(
                "",
                {"method": "GET"},
                self._receive,
                self._send,
                session=self._session,
                everything=self._session is not None,
            )
        except asyncio.CancelledError as error:
            self.error = error

    async def _receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            if self._blocked and self.messages:
                await asyncio.Event().wait()
            self.messages.append(message["body"])
            self.ended = not message["more_body"]


def session_of_an_hour() -> Session:
    """Return a session, as if a request had its cookie; the console ends it at the next beat."""
    return Session(
        name="management",
        port=ServingPort.API,
        number="0" * 24,
        expires_at=datetime.now(UTC) + timedelta(hours=1),
        cookie=b"",
    )


async def opened(
    pages: feed.Feed, count: int, *, blocked: bool = False, everything: bool = False
) -> list[OpenPage]:
    """Open some pages that have got their snapshot; ``everything``: with a session."""
    session = session_of_an_hour() if everything else None
    made = [OpenPage(pages, blocked=blocked, session=session) for _ in range(count)]
    await until(lambda: all(each.messages for each in made))
    return made
