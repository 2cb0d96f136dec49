"""Attacks on the HTTP server by a client without a token.

Each attack gets the response that docs/http-edge.md describes, is counted by its reason, and does
not prevent probes on either port.
"""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from tests.edge.wire import (
    HEADER_LINES,
    PROBE,
    TIMEOUT_SECONDS,
    RawResponse,
    Wire,
    ask,
    rejected,
    silent,
    statuses,
    talk,
)
from tests.servers.waiting import wait_until
from tests.system.service import Prober, Service, request, running

APP = ("--app", "tests.edge.edge_app:app")
LINE = "HTTP request rejected"
MIB = 2**20
INNER = b"GET /who HTTP/1.1\r\nHost: x\r\nX-User: admin\r\n\r\n"
CHUNKED = b"POST /up HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
HANDSHAKE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.fixture(scope="module")
def edge() -> Iterator[Service]:
    """Return a service with the default limits, whose ports are probed during all its tests."""
    with running(*APP, management=True) as service, probed(service.wait_ready()):
        yield service


@pytest.fixture(scope="module")
def impatient() -> Iterator[Service]:
    """Return a service with short timeouts."""
    environment = {
        "HTTP_HEAD_TIMEOUT": "1000",
        "HTTP_BODY_TIMEOUT": "1500",
        "HTTP_KEEP_ALIVE_TIMEOUT": "2000",
    }
    with running(*APP, management=True, environment=environment) as service:
        yield service.wait_ready()


@contextmanager
def probed(service: Service) -> Iterator[None]:
    """Probe both ports within the block; each probe must succeed."""
    assert service.management_port is not None
    ports = (service.port, service.management_port)
    with ExitStack() as stack:
        probers = [
            stack.enter_context(Prober(port, "/health/live", timeout=TIMEOUT_SECONDS))
            for port in ports
        ]
        yield
        # Wait for one probe that starts after the attack, so that there is more than the first one.
        counts = [len(prober.seen) for prober in probers]
        wait_until(
            lambda: all(len(p.seen) > n for p, n in zip(probers, counts, strict=True)),
            seconds=2 * TIMEOUT_SECONDS,
            what="a probe after the attack",
        )
    assert [prober.order() for prober in probers] == [[200], [200]]


@contextmanager
def counted(service: Service, *reasons: str, at_least: int = 1) -> Iterator[None]:
    """Expect that these reasons, and no others, are counted within the block."""
    before = rejected(service)
    yield
    wait_until(
        lambda: rejected(service) != before, what=lambda: f"one of {reasons} is counted; {before}"
    )
    after = rejected(service)
    grown = {reason: after[reason] - before.get(reason, 0) for reason in after}
    grown = {reason: count for reason, count in grown.items() if count}
    assert set(grown) <= set(reasons)
    assert sum(grown.values()) >= at_least


def rss(service: Service) -> int:
    """Return the resident bytes of the process."""
    return int(psutil.Process(service.process.pid).memory_info().rss)


@dataclass(frozen=True)
class Endless:
    """A request that never ends, and the expected rejection."""

    opening: bytes
    piece: bytes
    reasons: tuple[str, ...]
    status: int = 431


MANY = ("too_many_headers", "head_too_large")
"""Many small lines in one read exceed both limits; either reason is correct."""
BIG = ("head_too_large",)
ENDLESS = {
    "headers": Endless(b"GET / HTTP/1.1\r\nHost: x\r\n", HEADER_LINES, MANY),
    "one header": Endless(b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"a" * 65536, BIG),
    "one header name": Endless(b"GET / HTTP/1.1\r\nHost: x\r\n", b"a" * 65536, BIG),
    "one URL": Endless(b"GET /", b"a" * 65536, BIG),
    "one query": Endless(b"GET /health/live?", b"a" * 65536, BIG),
    "trailers": Endless(CHUNKED + b"0\r\n", HEADER_LINES, MANY),
    "one trailer": Endless(CHUNKED + b"0\r\nX: ", b"a" * 65536, BIG),
    "one chunk extension": Endless(CHUNKED + b"1;", b"a" * 65536, BIG),
    "empty lines": Endless(b"", b"\r\n" * 32768, BIG),
    "probes": Endless(b"", PROBE * 1000, ("pipelined",), 503),
    "requests": Endless(b"", PROBE.replace(b"health/live", b"echo/a") * 1000, ("pipelined",), 503),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_request_is_rejected(edge: Service, name: str) -> None:
    """The client gets a status and a close, and the server uses little memory."""
    attack, before = ENDLESS[name], rss(edge)
    with probed(edge), counted(edge, *attack.reasons), Wire(edge.port) as wire:
        flood = wire.send(attack.opening).flood(attack.piece, at_most=64 * MIB)

    assert flood.ended, f"{flood.sent} bytes were taken"
    assert flood.statuses[-1] == attack.status
    assert rss(edge) - before < 16 * MIB


@pytest.mark.parametrize("name", ["headers", "probes", "requests"])
def test_an_endless_request_without_reading_is_rejected(edge: Service, name: str) -> None:
    """Unread responses do not accumulate in the server."""
    attack, before = ENDLESS[name], rss(edge)
    with probed(edge), counted(edge, *attack.reasons), Wire(edge.port) as wire:
        flood = wire.send(attack.opening).flood(attack.piece, at_most=64 * MIB, read=False)

    assert flood.ended, f"{flood.sent} bytes were taken"
    assert rss(edge) - before < 16 * MIB


def test_the_management_port_has_the_same_limits(edge: Service) -> None:
    """Both ports run the same server class."""
    assert edge.management_port is not None
    for name in ("headers", "one URL", "probes"):
        attack = ENDLESS[name]
        with counted(edge, *attack.reasons), Wire(edge.management_port) as wire:
            flood = wire.send(attack.opening).flood(attack.piece, at_most=64 * MIB)
        assert flood.ended
        assert flood.statuses[-1] == attack.status


@pytest.mark.parametrize(
    ("count", "expected"), [(60, 200), (98, 200), (101, 431)], ids=["60", "98", "101"]
)
def test_the_limit_of_a_hundred_headers(edge: Service, count: int, expected: int) -> None:
    """``Host`` is counted."""
    lines = b"".join(b"x-%d: a\r\n" % number for number in range(count))
    for path in (b"/health/live", b"/echo/a"):
        response = talk(edge.port, b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (path, lines))
        assert response.status == expected


@pytest.mark.parametrize(("size", "expected"), [(60_000, 200), (66_000, 431)])
@pytest.mark.parametrize("pieces", [1, 6])
def test_the_limit_of_a_head_of_64_kib(
    edge: Service, size: int, expected: int, pieces: int
) -> None:
    """The number of reads does not matter."""
    head = b"GET /echo/a HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % (b"a" * size)
    step = len(head) // pieces + 1
    parts = [head[at : at + step] for at in range(0, len(head), step)]

    assert talk(edge.port, *parts).status == expected


def test_a_large_body_and_the_next_head_in_one_read(edge: Service) -> None:
    """The head limit does not count bodies and complete requests in the same read."""
    body = b"a" * 200_000
    first = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with Wire(edge.port) as wire:
        wire.send(first + PROBE[:10], PROBE[10:])
        responses = [wire.response(), wire.response()]

    assert [response.status for response in responses] == [200, 200]
    assert responses[0].json()["n"] == len(body)


def test_many_small_chunks_are_accepted(edge: Service) -> None:
    """A body may have 100 000 chunks of one byte."""
    with Wire(edge.port) as wire:
        wire.send(CHUNKED + b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n")
        assert wire.response().json()["n"] == 100_000


@pytest.mark.parametrize("request_bytes", [PROBE, PROBE.replace(b"health/live", b"echo/a")])
def test_the_limit_of_a_hundred_pipelined_requests(edge: Service, request_bytes: bytes) -> None:
    """A hundred are answered in order; with more at once, the connection gets 503."""
    with Wire(edge.port) as wire:
        wire.send(request_bytes * 100)
        assert [wire.response().status for _ in range(100)] == [200] * 100
        wire.send(request_bytes)
        assert wire.response().status == 200
    with counted(edge, "pipelined"), Wire(edge.port) as wire:
        assert statuses(wire.send(request_bytes * 150).until_closed())[-1] == 503


UPGRADES = {
    "foo": b"Connection: Upgrade\r\nUpgrade: foo\r\n",
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    "websocket": HANDSHAKE,
    "two": b"Connection: keep-alive, Upgrade\r\nUpgrade: h2c, websocket\r\n",
}


def _parts(message: bytes, head: int, way: str) -> list[bytes]:
    if way == "one":
        return [message]
    if way == "two":
        return [message[:head], message[head:]]
    return [message[at : at + 7] for at in range(0, len(message), 7)]


def ignored_upgrades(service: Service) -> int:
    """Return ``viralfx_http_upgrades_ignored_total``."""
    text = service.manage("/metrics").body.decode()
    (count,) = re.findall(r"^viralfx_http_upgrades_ignored_total ([\d.e+]+)$", text, re.MULTILINE)
    return int(float(count))


@pytest.mark.parametrize("way", ["one", "two", "many"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("name", UPGRADES)
def test_a_body_after_an_upgrade_is_a_body(
    edge: Service, name: str, framing: str, way: str
) -> None:
    """The request is served as an ordinary one with this body."""
    before = ask(edge.port, "/executed").get("who", 0)
    ignored = ignored_upgrades(edge)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(INNER), INNER) if framing == "chunked" else INNER
    announced = (
        b"Transfer-Encoding: chunked" if framing == "chunked" else b"Content-Length: %d" % len(body)
    )
    head = b"POST /up HTTP/1.1\r\nHost: x\r\n%s%s\r\n\r\n" % (UPGRADES[name], announced)
    with Wire(edge.port) as wire:
        wire.send(*_parts(head + body, len(head), way), gap=0.01)
        response = wire.response()
        after = wire.send(b"GET /executed HTTP/1.1\r\nHost: x\r\n\r\n").response()

    assert (response.status, response.json()) == (200, {"n": len(INNER), "user": None})
    assert after.json().get("who", 0) == before
    assert ignored_upgrades(edge) == ignored + 1


@pytest.mark.parametrize("way", ["one", "two"])
def test_a_get_with_a_body_is_no_websocket_handshake(edge: Service, way: str) -> None:
    """The body is not executed as a request."""
    before = ask(edge.port, "/executed").get("who", 0)
    head = b"GET /ws HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n" % (HANDSHAKE, len(INNER))
    with Wire(edge.port) as wire:
        wire.send(*_parts(head + INNER, len(head), way))
        assert wire.response().status in {400, 404, 405}

    assert ask(edge.port, "/executed").get("who", 0) == before


@pytest.mark.parametrize("protocol", [b"HTTP/1.0", b"RTSP/1.0"])
def test_a_handshake_of_an_old_version_is_an_ordinary_request(
    edge: Service, protocol: bytes
) -> None:
    """It gets the response of the same request without the handshake, and no server error."""
    with Wire(edge.port) as wire:
        wire.send(b"GET /executed %s\r\nHost: x\r\n%s\r\n" % (protocol, HANDSHAKE))
        assert wire.response().status == 200


def test_a_websocket_is_still_accepted(edge: Service) -> None:
    """This also works after another request on the same connection."""
    with Wire(edge.port) as wire:
        assert wire.send(PROBE).response().status == 200
        wire.send(b"GET /ws HTTP/1.1\r\nHost: x\r\n%s\r\n" % HANDSHAKE)
        assert wire.response().status == 101
        wire.send(b"\x81\x82\x00\x00\x00\x00hi")  # a masked text frame
        assert wire.socket.recv(4) == b"\x81\x02hi"
        wire.send(b"\x88\x82\x00\x00\x00\x00\x03\xe8")  # a frame that closes
        wire.until_closed()


def test_a_websocket_handshake_with_a_large_header_is_answered(edge: Service) -> None:
    """The connection does not stay silent."""
    big = b"X: %s\r\n" % (b"a" * 60_000)
    with probed(edge):
        head = b"GET /ws HTTP/1.1\r\nHost: x\r\n%s%s\r\n" % (HANDSHAKE, big)
        assert talk(edge.port, head).status == 431


JOB = '{"task": "parcels.echo", "payload": null}'


@pytest.mark.parametrize("lines", [b"gzip, chunked", b"deflate\r\nTransfer-Encoding: chunked"])
def test_an_unknown_transfer_coding_is_refused(edge: Service, lines: bytes) -> None:
    """A body that the application cannot read is 501; nothing after it is a request."""
    with Wire(edge.port) as wire:
        wire.send(CHUNKED.replace(b"chunked", lines) + b"3\r\nabc\r\n0\r\n\r\n" + PROBE)
        response = wire.response()

        assert response.status == 501
        assert b"connection: close" in response.head.lower()
        assert wire.until_closed() == b""


@pytest.mark.parametrize(
    "options", [(), ("-H", "Transfer-Encoding: chunked")], ids=["length", "chunked"]
)
def test_a_curl_request_that_offers_http_2(options: tuple[str, ...]) -> None:
    """The response is HTTP/1.1, and the body arrives."""
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.check_output([curl, "--version"], text=True):
        pytest.skip("curl with HTTP/2 is not on PATH; Debian's package curl has it")
    with running(environment={"TASK_MODULES": "tests.job_tasks"}) as service:
        service.wait_ready()
        done = subprocess.run(
            [
                *(curl, "-sS", "--http2", "-m", "20", "-d", JOB),
                *("-w", "\n%{http_code} %{http_version}"),
                *("-H", "Content-Type: application/json", *options),
                f"http://127.0.0.1:{service.port}/api/v1/jobs",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    body, _, summary = done.stdout.rpartition("\n")

    assert (done.returncode, done.stderr, summary) == (0, "", "202 1.1")
    assert json.loads(body)["queue"] == "analytics"


def test_a_trailer_does_not_become_a_header(edge: Service) -> None:
    """This holds for the application and the next request, and for any split into parts."""
    whole = CHUNKED + b"1\r\na\r\n0\r\nX-User: admin\r\n\r\n"
    for parts in ([whole], [whole[:-20], whole[-20:]], [whole[i : i + 3] for i in range(0, 99, 3)]):
        with Wire(edge.port) as wire:
            wire.send(*parts, gap=0.01)
            assert wire.response().json() == {"n": 1, "user": None}
            following = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
            assert wire.send(following).response().json() == {"n": 0, "user": None}


def test_a_token_in_a_trailer_does_not_authorize() -> None:
    """A request to change a logger gets 401."""
    token = "a-management-token-of-some-length"
    change = b'{"level": "debug"}'
    with running(*APP, environment={"MANAGEMENT_TOKEN": token}) as service:
        service.wait_ready()
        response = talk(
            service.port,
            b"PUT /health/loggers/viralfx.jobs HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"%x\r\n%s\r\n0\r\nAuthorization: Bearer %s\r\n\r\n"
            % (len(change), change, token.encode()),
        )

    assert response.status == 401


HOSTS = {
    "none": b"",
    "two": b"Host: x\r\nHost: y\r\n",
    "two alike": b"Host: x\r\nHost: x\r\n",
    "a space": b"Host: a b\r\n",
    "brackets": b"Host: a<>\r\n",
    "a path": b"Host: a/b\r\n",
    "a user": b"Host: a@b\r\n",
    "a word for a port": b"Host: a:b\r\n",
    "half an address": b"Host: [::1\r\n",
}


@pytest.mark.parametrize("method", [b"GET /health/live", b"GET /echo/a", b"POST /up"])
@pytest.mark.parametrize("name", HOSTS)
def test_an_invalid_host_is_rejected(edge: Service, name: str, method: bytes) -> None:
    """HTTP/1.1 requires one valid Host, and nothing after the request is read."""
    before = ask(edge.port, "/executed").get("who", 0)
    with counted(edge, "host"), Wire(edge.port) as wire:
        wire.send(b"%s HTTP/1.1\r\n%s\r\n" % (method, HOSTS[name]) + INNER)
        assert statuses(wire.until_closed()) == [400]
    assert ask(edge.port, "/executed").get("who", 0) == before


@pytest.mark.parametrize(
    "host",
    [b"x", b"x:3000", b"EXAMPLE.com", b"a_b.local", b"127.0.0.1:80", b"[::1]:3000", b"[::1]"],
)
def test_a_valid_host_is_accepted(edge: Service, host: bytes) -> None:
    """All values are a host and port of RFC 3986."""
    for path in (b"/health/live", b"/echo/a"):
        response = talk(edge.port, b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (path, host))
        assert response.status == 200


def test_http_1_0_needs_no_host(edge: Service) -> None:
    """HTTP/1.0 does not require the header."""
    for path in (b"/health/live", b"/echo/a"):
        assert talk(edge.port, b"GET %s HTTP/1.0\r\n\r\n" % path).status == 200


_TWO_LENGTHS = b"Content-Length: 0\r\nContent-Length: 45\r\n"
INVALID = {
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "both lengths": CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n0\r\n\r\n" + INNER,
    "both lengths the other way": b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    "two lengths": b"POST /up HTTP/1.1\r\nHost: x\r\n%s\r\n" % _TWO_LENGTHS + INNER,
    "another coding": CHUNKED.replace(b"chunked", b"xchunked") + b"0\r\n\r\n" + INNER,
    "a space before the colon": CHUNKED.replace(b"Encoding:", b"Encoding :") + b"0\r\n\r\n" + INNER,
    "a bad chunk": CHUNKED + b"1\r\na\r\nzz\r\n" + INNER,
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_request_is_rejected(edge: Service, name: str) -> None:
    """The client gets 400 and a close, and nothing after the request is read."""
    before = ask(edge.port, "/executed").get("who", 0)
    with probed(edge), counted(edge, "invalid"), Wire(edge.port) as wire:
        assert statuses(wire.send(INVALID[name]).until_closed()) == [400]

    assert ask(edge.port, "/executed").get("who", 0) == before


def _access_lines(service: Service, route: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in list(service.output) if line.startswith("{")]
    return [line for line in lines if line.get("route") == route and "method" in line]


def test_the_access_log_has_the_status_that_the_client_gets() -> None:
    """An invalid chunk is logged as 400, although its handler was waiting for the body."""
    with running(*APP, environment={"ACCESS_LOG": "true"}) as service:
        service.wait_ready()
        with Wire(service.port) as wire:
            wire.send(CHUNKED + b"1\r\na\r\n", b"zz\r\n")
            assert statuses(wire.until_closed()) == [400]
        (line,) = wait_until(lambda: _access_lines(service, "/up"), what="the log line")

    assert line["status"] == 400
    assert line["message"] == "POST /up 400"


def test_a_body_over_the_limit_is_not_read() -> None:
    """The client gets 413 and a close, even if it continues to send."""
    head = (
        b"POST /api/v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 10000000000\r\n\r\n"
    )
    with running(management=True) as service:
        service.wait_ready()
        before = rss(service)
        with Wire(service.port) as wire:
            response = wire.send(head).response()
            flood = wire.flood(b"a" * 65536, at_most=64 * MIB)
        with Wire(service.port) as wire:
            again = wire.send(head).flood(b"a" * 65536, at_most=64 * MIB)
        after = rss(service)

    assert (response.status, response.header(b"connection")) == (413, b"close")
    assert flood.ended
    # A client that sends immediately also gets the response, and no reset instead.
    assert (again.ended, again.statuses) == (True, [413])
    assert after - before < 16 * MIB


OPENINGS = {
    "a part of a request line": (b"GET /hea", b"", 408),
    "a part of a header": (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Wa", b"", 408),
    "a head byte by byte": (b"GET /health/live HTTP/1.1\r\n", b"a", 408),
    "headers one by one": (b"GET /health/live HTTP/1.1\r\n", b"a: b\r\n", 408),
    "nothing": (b"", b"", None),
}


def _drip(wire: Wire, piece: bytes) -> bytes:
    """Send a piece every 100 ms until the server closes; return the received data."""
    if piece:
        wire.send(*[piece] * 90, gap=0.1)
    return wire.until_closed()


@pytest.mark.parametrize(
    ("name", "after_an_answer"),
    [
        pytest.param(name, after, id=f"{name}-{'second' if after else 'first'}")
        for name, (opening, _, _) in OPENINGS.items()
        for after in (
            [False, True] if opening else [False]
        )  # without data, the second request is an idle connection
    ],
)
def test_an_unfinished_head_is_408(impatient: Service, name: str, *, after_an_answer: bool) -> None:
    """The client gets 408 after HTTP_HEAD_TIMEOUT, even if it keeps sending bytes."""
    opening, piece, status = OPENINGS[name]
    with probed(impatient), counted(impatient, "head_timeout"), Wire(impatient.port) as wire:
        if after_an_answer:
            assert wire.send(PROBE).response().status == 200
        wire.send(opening)
        received = _drip(wire, piece)

    assert statuses(received) == ([] if status is None else [status])


@pytest.mark.parametrize("path", [b"/health/live", b"/echo/a"])
def test_an_idle_connection_is_closed(impatient: Service, path: bytes) -> None:
    """The server closes after HTTP_KEEP_ALIVE_TIMEOUT without a response."""
    with Wire(impatient.port) as wire:
        wire.send(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        assert wire.response().status == 200
        assert wire.until_closed() == b""


@pytest.mark.parametrize("path", [b"/health/live", b"/echo/a"])
def test_a_connection_in_use_stays_open(impatient: Service, path: bytes) -> None:
    """Requests every 0.7 s keep it open for longer than both timeouts."""
    head = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path
    with Wire(impatient.port) as wire:
        wire.send(*[head] * 6, gap=0.7)
        assert [wire.response().status for _ in range(6)] == [200] * 6


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_an_unfinished_body_times_out(impatient: Service, framing: str) -> None:
    """The client gets 408 after HTTP_BODY_TIMEOUT without data."""
    head = CHUNKED + b"5\r\nab"
    if framing == "length":
        head = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab"
    with probed(impatient), counted(impatient, "body_timeout"), Wire(impatient.port) as wire:
        assert statuses(wire.send(head).until_closed()) == [408]


def test_a_slow_body_is_read(impatient: Service) -> None:
    """The timeout restarts with each piece, so the whole body may take longer."""
    head = b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n"
    with Wire(impatient.port) as wire:
        response = wire.send(head, *[b"a"] * 8, gap=0.5).response()

    assert (response.status, response.json()["n"]) == (200, 8)


@pytest.mark.parametrize("size", [0, 5, 4 * MIB])
def test_a_slow_handler_does_not_time_out_the_client(impatient: Service, size: int) -> None:
    """The body timeout does not run while the handler is not reading."""
    head = b"POST /late?seconds=4 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
    response = talk(impatient.port, head, b"a" * size)

    assert (response.status, response.json()["n"]) == (200, size)


def test_an_unfinished_body_does_not_delay_the_stop() -> None:
    """The stop waits at most HTTP_BODY_TIMEOUT and exits with 0."""
    with running(*APP, environment={"HTTP_BODY_TIMEOUT": "1500"}) as service:
        service.wait_ready()
        with Wire(service.port) as wire:
            wire.send(b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
            service.signal(signal.SIGTERM)
            assert statuses(wire.until_closed()) == [408]
            assert service.exit_code(seconds=15) == 0


def test_connections_above_the_limit_are_rejected() -> None:
    """Each gets 503 and a close; the management port has its own connections."""
    with running(*APP, management=True, environment={"HTTP_MAX_CONNECTIONS": "20"}) as service:
        service.wait_ready()
        assert service.management_port is not None
        with silent(service.port, 20) as held, counted(service, "connections", at_least=10):
            for _ in range(10):
                response = rejected_connection(service.port)
                assert (response.status, response.header(b"retry-after")) == (503, b"1")
            assert request(service.management_port, "/health/live").status == 200
            held[0].close()
            wait_until(lambda: service.status("/health/live") == 200, what="a free connection")


def rejected_connection(port: int) -> RawResponse:
    """Return the response that a connection gets without a request, before its close."""
    with Wire(port) as wire:
        response = wire.response()
        assert wire.until_closed() == b""
        return response


EACH: dict[str, bytes] = {
    "head_too_large": b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 70_000),
    "too_many_headers": b"GET / HTTP/1.1\r\nHost: x\r\n%s\r\n" % (b"a: b\r\n" * 101),
    "pipelined": PROBE * 150,
    "head_timeout": b"GET /",
    "body_timeout": b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
    "host": b"GET /health/live HTTP/1.1\r\n\r\n",
    "coding": CHUNKED.replace(b"chunked", b"gzip, chunked"),
}


def test_each_reason_is_logged_once_a_minute() -> None:
    """The first rejection is logged at once; a later line counts the suppressed ones."""
    environment = {"HTTP_HEAD_TIMEOUT": "1000", "HTTP_BODY_TIMEOUT": "1000"}
    with running(*APP, management=True, environment=environment) as service:
        service.wait_ready()
        for _ in range(4):
            with ExitStack() as stack:
                wires = [stack.enter_context(Wire(service.port)) for _ in EACH]
                for wire, message in zip(wires, EACH.values(), strict=True):
                    wire.send(message)
                for wire in wires:
                    wire.until_closed()
        total = rejected(service)
        wait_until(
            lambda: {line["reason"] for line in service.logged(LINE)} == set(EACH),
            what=lambda: f"a line for each reason; {service.logged(LINE)}",
        )
        first = service.logged(LINE)
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        lines = service.logged(LINE)

    assert total == dict.fromkeys(EACH, 4)
    assert len(first) == len(EACH)
    assert {(line["level"], line["context"]) for line in lines} == {("warn", "http")}
    for reason in EACH:
        others_logged = [line["others"] for line in lines if line["reason"] == reason]
        assert sum(1 + others for others in others_logged) == 4, reason
        assert len(others_logged) <= 2
