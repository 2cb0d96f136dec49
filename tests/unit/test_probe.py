"""``viralfx probe``: yes, no, and nobody there."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.servers.ports import free_port

from viralfx.cli import main
from viralfx.domain.errors import ConfigurationError
from viralfx.runner.probe import probe

Respond = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(respond: Respond) -> Iterator[str]:
    """Serve on a free port; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def answering(status: int, body: bytes = b'{"ready":true}') -> Respond:
    """Answer always so."""

    def respond(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return respond


def test_200_is_yes() -> None:
    """A service that says yes passes, with what it said."""
    with serving(answering(200)) as base:
        assert probe("ready", base, timeout=5.0) == (True, '{"ready":true}')


@pytest.mark.parametrize("status", [204, 404, 500, 503])
def test_anything_else_is_no(status: int) -> None:
    """Only 200 is yes."""
    with serving(answering(status, b"" if status == 204 else b"no")) as base:
        passed, _ = probe("live", base, timeout=5.0)

    assert not passed


def test_refusal_says_what_the_service_said() -> None:
    """The body of a 503 tells why, even when it is not text."""
    with serving(answering(503, b'{"ready":false}\xff')) as base:
        assert probe("ready", base, timeout=5.0) == (False, '{"ready":false}\ufffd')


@pytest.mark.parametrize("kind", ["live", "ready", "startup"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_asks_the_endpoint_of_that_name(kind: str, slash: str) -> None:
    """The path is below ``/health``, with or without a slash in the address, and it is one GET."""
    asked: list[tuple[str, str | None]] = []

    def respond(request: BaseHTTPRequestHandler) -> None:
        asked.append((request.path, request.headers["User-Agent"]))
        answering(200)(request)

    with serving(respond) as base:
        probe(kind, base + slash, timeout=5.0)

    assert [(f"/health/{kind}", "viralfx-probe")] == asked


def test_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container asks itself, not its proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(answering(200)) as base:
        passed, _ = probe("live", base, timeout=5.0)

    assert passed


def test_nobody_listening_is_no() -> None:
    """A refused connection says so."""
    base = f"http://127.0.0.1:{free_port()}"
    passed, said = probe("live", base, timeout=5.0)

    assert not passed
    assert said.startswith(f"{base}/health/live: ")
    assert "refused" in said


def test_silence_is_no_after_the_timeout() -> None:
    """A blocked service is told from a healthy one within the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        base = f"http://127.0.0.1:{server.getsockname()[1]}"
        passed, said = probe("live", base, timeout=0.05)

    assert (False, f"{base}/health/live: timed out") == (passed, said)


def test_something_else_than_http_is_no() -> None:
    """A port that speaks another protocol is no healthy service."""

    def respond(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"220 mail.example ESMTP\r\n")
        request.close_connection = True

    with serving(respond) as base:
        passed, _ = probe("live", base, timeout=5.0)

    assert not passed


@pytest.mark.parametrize(
    "base", ["", "127.0.0.1:3000", "ftp://host", "file:///etc/passwd", "http:"]
)
def test_address_that_is_no_http_is_a_mistake(base: str) -> None:
    """A malformed address is the caller's mistake, with an example of a right one."""
    with pytest.raises(ConfigurationError) as caught:
        probe("live", base, timeout=5.0)

    assert (f"--url: {base!r} must look like http://127.0.0.1:3000",) == caught.value.problems


# -- the command -----------------------------------------------------------------------------


def test_command_says_yes_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Yes is exit code 0."""
    with serving(answering(200)) as base:
        code = main(["probe", "ready", "--url", base])

    assert (code, capsys.readouterr()) == (0, ('{"ready":true}\n', ""))


def test_command_says_no_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """No is exit code 1, and the reason is where the kubelet shows it."""
    with serving(answering(503, b"no")) as base:
        code = main(["probe", "ready", "--url", base])

    assert (code, capsys.readouterr()) == (1, ("", "no\n"))


def test_command_refuses_a_malformed_address(capsys: pytest.CaptureFixture[str]) -> None:
    """A malformed address is exit code 2 and one line."""
    code = main(["probe", "live", "--url", "localhost:3000"])
    out, err = capsys.readouterr()

    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("variable", ["PORT", "MANAGEMENT_PORT"])
def test_command_finds_the_service_by_its_settings(
    plain_environ: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    """Without an address it asks this machine, on the management port where there is one."""
    with serving(answering(200)) as base:
        plain_environ.setenv(variable, base.rpartition(":")[2])
        code = main(["probe", "live"])

    assert (code, capsys.readouterr().err) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["probe"],
        ["probe", "dead"],
        ["probe", "live", "--timeout", "0"],
        ["probe", "live", "--timeout", "nan"],
        ["probe", "live", "--timeout", "soon"],
    ],
    ids=" ".join,
)
def test_command_refuses_wrong_arguments(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong arguments are exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "base", ["http://[::1", "http://[zz]/", "http://127.0.0.1:abc", "ftp://a", "", "http://"]
)
def test_address_that_is_none_is_refused(base: str) -> None:
    """One line says what an address looks like."""
    with pytest.raises(ConfigurationError, match="must look like"):
        probe("live", base, timeout=1.0)


def test_name_that_cannot_be_a_host_is_no() -> None:
    """It fails like a host that is not there."""
    assert not probe("live", "http://a..b", timeout=1.0)[0]


def test_redirect_is_no() -> None:
    """Where a process points to says nothing about the process."""

    def respond(request: BaseHTTPRequestHandler) -> None:
        request.send_response(307 if request.path == "/health/live" else 200)
        request.send_header("Location", "/elsewhere")
        request.send_header("Content-Length", "0")
        request.end_headers()

    with serving(respond) as base:
        assert not probe("live", base, timeout=5.0)[0]
