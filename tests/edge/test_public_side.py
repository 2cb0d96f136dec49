"""The public side of the shipped proxies: the routes that it gives to each caller, and no others.

HAProxy and Envoy run with their files in front of the service in production. Routes come from the
application. A route without an entry in `SIDES` fails.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from itertools import count
from pathlib import Path

import httpx
import pytest
import yaml
from tests.servers.envoy import envoy
from tests.servers.fixtures import or_skip
from tests.servers.haproxy import haproxy
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.system.service import Service, running
from tests.web.test_exposure import BODIES, NAMED, NEEDS, expected, routes_of

from viralfx import OperationsPlugin
from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app

PUBLIC, MANAGEMENT = "public", "management"
SIDES: Mapping[str, str] = {
    "/health/ready": PUBLIC,
    **{
        f"/api/v1/{path}": PUBLIC
        for path in (
            "jobs",
            "jobs/batch",
            "jobs/cancel",
            "jobs/retry",
            "jobs/{job_id}",
            "jobs/{job_id}/cancel",
            "jobs/{job_id}/events",
            "jobs/{job_id}/retry",
            "jobs/{job_id}/run",
            "queues",
            "queues/{queue}/pause",
            "queues/{queue}/resume",
            "schedules",
            "schedules/{task}/pause",
            "schedules/{task}/resume",
            "schedules/{task}/run",
        )
    },
    "/health": MANAGEMENT,
    **{
        f"/health/{path}": MANAGEMENT
        for path in (
            "circuits",
            "database",
            "detailed",
            "events",
            "info",
            "live",
            "loggers",
            "loggers/{name}",
            "memory",
            "queues",
            "redis",
            "shutdown",
            "startup",
            "tasks",
            "ui",
            "ui/session",
            "{check}",
        )
    },
    "/metrics": MANAGEMENT,
    **{
        f"/api/docs{path}": MANAGEMENT
        for path in ("", "/openapi.json", "/page.css", "/page.js", "/rapidoc-min.js", "/{path}")
    },
}
"""The side of each path."""
TOKENS = {name: secrets.token_hex(16) for name in ("management", "api", *NAMED)}
CALLERS: Mapping[str, Mapping[str, str]] = {
    "none": {},
    "wrong": {"Authorization": "Bearer wrong"},
    **{name: {"Authorization": f"Bearer {secret}"} for name, secret in TOKENS.items()},
}
ENVIRONMENT = {
    "ENVIRONMENT": "production",
    "HOST": "127.0.0.1",
    "ALLOW_MEMORY_ADAPTERS": "true",
    "TRUSTED_PROXIES": "127.0.0.1",
    "MANAGEMENT_TOKEN": TOKENS["management"],
    "API_TOKEN": TOKENS["api"],
    "TOKENS": "; ".join(f"{name} {rights} {TOKENS[name]}" for name, rights in NAMED.items()),
}
OF_BACKEND = "X-Correlation-ID"
"""The header of all answers of the service. The answers of a proxy itself do not have it."""
NOT_FOUND = 404
FORGED = "203.0.113.9"
_addresses = (f"127.0.{high}.{low}" for high in count(1) for low in range(1, 255))
"""Addresses of clients."""
REQUESTS_OF_ADDRESS = 8
"""Wrong tokens of one address after which none waits."""


@dataclass(frozen=True)
class Answer:
    """The status of a response, and whether it came from the service or from the proxy."""

    status: int
    of_backend: bool

    @property
    def is_refusal(self) -> bool:
        """Whether the proxy refused the request, or the service knows nothing by that name."""
        return self.status in {400, NOT_FOUND} or (not self.of_backend and 400 <= self.status < 500)


def ask_from(
    address: str,
    port: int,
    line: tuple[str, str],
    headers: Mapping[str, str],
    body: bytes = b"",
) -> Answer:
    """Send one request, whose target no library changes, from an address of this machine.

    ``line`` has the method and the target.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=20, source_address=(address, 0))
    try:
        kind = {"Content-Type": "application/json"} if body else {}
        connection.request(*line, body or None, {**headers, **kind})
        reply = connection.getresponse()
        return Answer(reply.status, of_backend=reply.getheader(OF_BACKEND) is not None)
    finally:
        connection.close()


@pytest.fixture(scope="module")
def backend() -> Iterator[Service]:
    """Return the service behind the proxies."""
    with running("--no-worker", environment=ENVIRONMENT) as service:
        yield service.wait_ready()


@pytest.fixture(scope="module", params=[haproxy, envoy], ids=["haproxy", "envoy"])
def proxy(
    request: pytest.FixtureRequest, backend: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Return the port of a proxy with its shipped file."""
    port, both = free_port(), {"a": backend.port, "b": backend.port}
    folder = tmp_path_factory.mktemp("proxy")
    with ExitStack() as stack:
        with or_skip():
            running_one = stack.enter_context(request.param(port, both, folder))
        wait_until(lambda: running_one.is_up("a") and running_one.is_up("b"), what="both are up")
        yield port


@cache
def routes() -> frozenset[tuple[str, str]]:
    """Return the methods and paths of the service, that its endpoints answer."""
    settings = Settings(
        environment="production",
        allow_memory_adapters=True,
        management_token=Secret(TOKENS["management"]),
        api_token=Secret(TOKENS["api"]),
        tokens=Secret(ENVIRONMENT["TOKENS"]),
    )
    app = create_app(settings)
    found = routes_of(app, app.plugins.get(OperationsPlugin).endpoints)
    return frozenset((method, path.rstrip("/")) for method, path in found if method != "OPTIONS")


DEPLOYMENT = Path(__file__).parents[2] / "docs/deployment.md"


def test_the_route_of_a_gateway_has_the_same_side() -> None:
    """The document's HTTPRoute matches the paths of the public side, and no others."""
    text = DEPLOYMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (route,) = [found for each in blocks if (found := yaml.safe_load(each))["kind"] == "HTTPRoute"]
    (rule,) = route["spec"]["rules"]
    matches = [(each["path"]["type"], each["path"]["value"]) for each in rule["matches"]]

    def is_public(path: str) -> bool:
        return any(
            path == value or (kind == "PathPrefix" and path.startswith(f"{value}/"))
            for kind, value in matches
        )

    assert {kind for kind, _ in matches} == {"Exact", "PathPrefix"}
    assert {path: PUBLIC if is_public(path) else MANAGEMENT for path in SIDES} == SIDES


def target_of(template: str) -> str:
    """Return a path of a route whose names fit nothing that exists."""
    return template.replace("{name}", "root").replace("{check}", "nothing").translate(_NO_BRACES)


_NO_BRACES = str.maketrans("", "", "{}")


def test_each_route_has_a_side() -> None:
    """A new route is on neither side until this table names it."""
    assert {path for _, path in routes()} == set(SIDES)


@pytest.mark.parametrize("caller", CALLERS)
def test_a_caller_gets_the_routes_of_the_public_side(proxy: int, caller: str) -> None:
    """They answer as without a proxy. To all others the proxy itself answers 404."""
    wrong, address = {}, next(_addresses)
    for number, (method, path) in enumerate(sorted(routes())):
        if caller == "wrong" and number % REQUESTS_OF_ADDRESS == 0:
            address = next(_addresses)
        if SIDES[path] == PUBLIC and (method, path) not in NEEDS:
            continue  # a method that the route does not have, and HEAD is GET
        target = target_of(path)
        body = b"" if method in {"GET", "HEAD", "DELETE"} else BODIES.get(target, b"[]")
        answer = ask_from(address, proxy, (method, target), CALLERS[caller], body)
        if SIDES[path] == MANAGEMENT:
            right = answer == Answer(NOT_FOUND, of_backend=False)
        elif (want := expected(NEEDS[method, path], caller, closed=True)) is None:
            right = answer.of_backend and answer.status not in {401, 403}
        else:
            right = answer == Answer(want, of_backend=True)
        if not right:
            wrong[method, path] = answer

    assert wrong == {}


def disguises(path: str) -> Iterator[str]:
    """Yield other ways to write a path, some of which a server takes for the same."""
    name, first, rest = path[1:], *path[1:].partition("/")[::2]
    encoded = "".join(f"%{ord(letter):02x}" for letter in name)
    yield from (f"/%{ord(name[0]):02x}{name[1:]}", f"/{name[:-1]}%{ord(name[-1]):02X}")
    yield from (f"/{encoded}", f"/%25{encoded[1:]}")
    yield from (f"/{path}", f"//{path}", path.replace("/", "//"), f"{path}/", f"{path}//")
    yield from (f"/.{path}", f"/x/..{path}", f"/api/..{path}", f"/api/%2e%2e{path}", f"{path}/.")
    yield from (f"/health/ready/../..{path}", f"/health/ready/%2E%2E/..{path}", f"/..{path}")
    yield from (f"/health/ready/..%2f..{path}", f"/health/ready;/../..{path}", f"/;x{path}")
    yield from (f"/%2f{name}", f"/%5c{name}", f"/\\{name}", f"{path}%2f", path.replace("/", "\\"))
    yield from (f"{path};x", f"{path};x=/health/ready", f"{path}%3bx", f"{path}%3f", f"{path}%23")
    yield from (f"{path}%00", f"{path}%20", f"{path}%0a", f"{path}?x=/health/ready", f"{path}#x")
    yield from (path.upper(), path.title(), f"http://x{path}", f"HTTP://X:80/{path}")
    yield from (f"https://x{path}", f"http://x/health/ready/../..{path}", f"http://x{path}?x")
    yield from (f"//x{path}", f"http:{path}", f"http:/{path}", name, f"*{path}")
    if rest:
        yield from (f"/{first}{between}{rest}" for between in ("%2f", "//", "/./", "/%2e/"))
        yield from (f"/{first}{between}{rest}" for between in (";a/", "\\", "/x/../", "%5c"))


HIDDEN = sorted(target_of(path) for path, side in SIDES.items() if side == MANAGEMENT)
ALL_RIGHTS = {"Authorization": f"Bearer {TOKENS['management']}"}


def test_no_other_form_of_a_path_reaches_the_management_side(proxy: int) -> None:
    """The proxy refuses each form from a caller with all rights, or the service knows it not."""
    answers = {
        form: ask_from("127.0.0.1", proxy, ("GET", form), ALL_RIGHTS)
        for path in HIDDEN
        for form in (path, *disguises(path))
    }

    assert {form: each for form, each in answers.items() if not each.is_refusal} == {}


def test_http_2_reaches_no_more(proxy: int) -> None:
    """A proxy takes it from a client that begins with it, and the rules hold there."""
    slipped, transport = {}, httpx.HTTPTransport(http1=False, http2=True)
    with httpx.Client(transport=transport, headers=ALL_RIGHTS, timeout=20) as client:

        def ask(target: str) -> Answer | None:
            url, as_it_is = f"http://127.0.0.1:{proxy}/", {"target": target.encode()}
            try:
                reply = client.get(url, extensions=as_it_is)
            except httpx.TransportError:  # the proxy ends the stream, or the connection
                return None
            assert reply.http_version == "HTTP/2"
            return Answer(reply.status_code, of_backend=OF_BACKEND in reply.headers)

        ready = ask("/health/ready")
        for form in (*HIDDEN, *disguises("/api/docs/openapi.json")):
            # In HTTP/2 another form has no meaning.
            if form.startswith("/") and (answer := ask(form)) and not answer.is_refusal:
                slipped[form] = answer
        still = ask("/health/ready")

    assert still == ready == Answer(200, of_backend=True)
    assert slipped == {}


def test_the_forms_are_a_danger(backend: Service) -> None:
    """Without a proxy several of them reach what they disguise."""
    reached = {
        path: {
            form
            for form in disguises(path)
            if ask_from("127.0.0.1", backend.port, ("GET", form), ALL_RIGHTS).status == 200
        }
        for path in ("/metrics", "/health/info", "/api/docs/openapi.json")
    }

    assert {"/%6detrics", "/metric%73", "http://x/metrics"} <= reached["/metrics"]
    assert {"/health%2finfo", "https://x/health/info"} <= reached["/health/info"]
    assert "//api//docs//openapi.json" in reached["/api/docs/openapi.json"]


def test_a_stop_does_not_begin_through_the_proxy(proxy: int, backend: Service) -> None:
    """No form of the path stops the service, with a token that may do so at the service itself."""
    answers = {
        ask_from("127.0.0.1", proxy, ("POST", form), ALL_RIGHTS)
        for form in ("/health/shutdown", *disguises("/health/shutdown"))
    }
    state = backend.get("/health/shutdown", headers=ALL_RIGHTS).json()["state"]

    assert all(answer.is_refusal for answer in answers)
    assert state == "ready"


LIES: Mapping[str, Mapping[str, str]] = {
    "the header": {"X-Forwarded-For": FORGED},
    "two headers": {"X-Forwarded-For": f"{FORGED}, 127.0.0.1", "x-forwarded-for": FORGED},
    "the standard": {"Forwarded": f"for={FORGED};proto=https", "X-Real-IP": FORGED},
    "for one hop": {"X-Forwarded-For": FORGED, "Connection": "close, X-Forwarded-For, Forwarded"},
    "both": {"X-Forwarded-For": f"{FORGED}, unknown", "Forwarded": f'for="{FORGED}:80"'},
}


def test_the_audit_trail_has_the_address_of_the_client(proxy: int, backend: Service) -> None:
    """Not the one that the client claims, nor that of the proxy: for an action, and a refusal."""
    addresses = {f"127.1.{proxy % 256}.{number}": lie for number, lie in enumerate(LIES, 1)}
    expected_events, refused = set(), set()
    for address, lie in addresses.items():
        for caller, event in {
            "api": ("api", "queue.pause"),
            "wrong": ("anonymous", "access"),
        }.items():
            headers = {**CALLERS[caller], **LIES[lie]}
            answer = ask_from(address, proxy, ("POST", "/api/v1/queues/default/pause"), headers)
            if answer.of_backend:
                expected_events.add((address, *event))
            else:
                refused.add(lie)

    def seen() -> set[tuple[str, str, str]]:
        fields = ("address", "actor", "action")
        events = backend.logged("Audit event")
        return {tuple(event[name] for name in fields) for event in events}

    # Envoy refuses a request that wants its address removed; HAProxy does not read this header.
    assert refused <= {"for one hop"}
    wait_until(lambda: expected_events <= seen(), what=lambda: str(sorted(seen())))
    assert {address for address, _, _ in seen()} & {FORGED, "127.0.0.1", None} == set()
