"""``viralfx probe``: success, failure, and no server."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.servers.ports import free_port

from viralfx.cli import main
from viralfx.core.errors import ConfigurationError
from viralfx.runner.probe import probe, probe_for

Respond = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(respond: Respond, *, port: int = 0) -> Iterator[str]:
    """Serve on a port, by default on a free one; yield the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def answering(status: int, body: bytes = b'{"ready":true}') -> Respond:
    """Return a handler that always sends this response."""

    def respond(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return respond


def test_status_200_is_success() -> None:
    """The result has the body of the response."""
    with serving(answering(200)) as base:
        assert probe("ready", base, timeout=5.0) == (True, '{"ready":true}')


@pytest.mark.parametrize(
    "base",
    [
        "http://u:hunter2@127.0.0.1:3000",
        "http://hunter2@127.0.0.1:3000",
        "http://u:hunter2@127.0.0.1:port",
        "u:hunter2@127.0.0.1",
        "http://u:hunter2@",
        "http://[u:hunter2@127.0.0.1",
    ],
)
def test_an_address_with_a_password_is_rejected_and_not_printed(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the error nor the output has the password; the exit code is 2."""
    with pytest.raises(ConfigurationError) as caught:
        probe("live", base, timeout=5.0)
    code = main(["probe", "live", "--url", base])
    printed = capsys.readouterr()

    assert code == 2
    assert "hunter2" not in f"{caught.value}{printed.out}{printed.err}"
    assert "--url: the address must not have a user or password" in printed.err


@pytest.mark.parametrize("status", [204, 404, 500, 503])
def test_any_other_status_is_failure(status: int) -> None:
    """Only 200 is success."""
    with serving(answering(status, b"" if status == 204 else b"no")) as base:
        passed, _ = probe("live", base, timeout=5.0)

    assert not passed


def test_a_failure_has_the_body_of_the_response() -> None:
    """The body of a 503 is shown even if it is not valid text."""
    with serving(answering(503, b'{"ready":false}\xff')) as base:
        assert probe("ready", base, timeout=5.0) == (False, '{"ready":false}\ufffd')


@pytest.mark.parametrize("kind", ["live", "ready", "startup"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_the_probe_requests_the_endpoint_of_its_name(kind: str, slash: str) -> None:
    """It sends one GET below ``/health``, with or without a slash at the end of the address."""
    requests: list[tuple[str, str | None]] = []

    def respond(request: BaseHTTPRequestHandler) -> None:
        requests.append((request.path, request.headers["User-Agent"]))
        answering(200)(request)

    with serving(respond) as base:
        probe(kind, base + slash, timeout=5.0)

    assert [(f"/health/{kind}", "viralfx-probe")] == requests


def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is for a process in the same container."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(answering(200)) as base:
        passed, _ = probe("live", base, timeout=5.0)

    assert passed


def test_no_server_is_failure() -> None:
    """The error says that the connection was refused."""
    base = f"http://127.0.0.1:{free_port()}"
    passed, output = probe("live", base, timeout=5.0)

    assert not passed
    assert output.startswith(f"{base}/health/live: ")
    assert "refused" in output


def test_no_response_within_the_timeout_is_failure() -> None:
    """A blocked service fails the probe after the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        base = f"http://127.0.0.1:{server.getsockname()[1]}"
        passed, output = probe("live", base, timeout=0.05)

    assert (False, f"{base}/health/live: timed out") == (passed, output)


def test_another_protocol_is_failure() -> None:
    """A server that does not speak HTTP fails the probe."""

    def respond(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"220 mail.example ESMTP\r\n")
        request.close_connection = True

    with serving(respond) as base:
        passed, _ = probe("live", base, timeout=5.0)

    assert not passed


@pytest.mark.parametrize(
    "base", ["", "127.0.0.1:3000", "ftp://host", "file:///etc/passwd", "http:"]
)
def test_an_address_without_http_is_a_configuration_error(base: str) -> None:
    """The error shows an example of a valid address."""
    with pytest.raises(ConfigurationError) as caught:
        probe("live", base, timeout=5.0)

    assert (f"--url: {base!r} must look like http://127.0.0.1:3000",) == caught.value.problems


# -- the command -----------------------------------------------------------------------------


def test_the_command_prints_success_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 0."""
    with serving(answering(200)) as base:
        code = main(["probe", "ready", "--url", base])

    assert (code, capsys.readouterr()) == (0, ('{"ready":true}\n', ""))


def test_the_command_prints_failure_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 1, and the kubelet shows the reason."""
    with serving(answering(503, b"no")) as base:
        code = main(["probe", "ready", "--url", base])

    assert (code, capsys.readouterr()) == (1, ("", "no\n"))


def test_the_command_rejects_a_malformed_address(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 2, with one line."""
    code = main(["probe", "live", "--url", "localhost:3000"])
    out, err = capsys.readouterr()

    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("variable", ["PORT", "MANAGEMENT_PORT"])
def test_the_command_finds_the_service_by_its_settings(
    plain_environ: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    """Without an address it probes this machine, at the management port if it is set."""
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
def test_the_command_rejects_invalid_arguments(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 2, without a traceback."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "base", ["http://[::1", "http://[zz]/", "http://127.0.0.1:abc", "ftp://a", "", "http://"]
)
def test_an_invalid_address_is_rejected(base: str) -> None:
    """The error shows the format of an address."""
    with pytest.raises(ConfigurationError, match="must look like"):
        probe("live", base, timeout=1.0)


def test_an_invalid_host_name_is_failure() -> None:
    """It fails like an unknown host."""
    assert not probe("live", "http://a..b", timeout=1.0)[0]


def test_a_redirect_is_failure() -> None:
    """The target of a redirect says nothing about the process."""

    def respond(request: BaseHTTPRequestHandler) -> None:
        request.send_response(307 if request.path == "/health/live" else 200)
        request.send_header("Location", "/elsewhere")
        request.send_header("Content-Length", "0")
        request.end_headers()

    with serving(respond) as base:
        assert not probe("live", base, timeout=5.0)[0]


def test_a_probe_with_a_time_waits_for_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    """It repeats after an answer that is no success, and prints the last one."""
    statuses = iter([503, 503, 200])
    asked = threading.Event()

    def respond(request: BaseHTTPRequestHandler) -> None:
        status = next(statuses)
        answering(status, b"ready" if status == 200 else b"starting")(request)

    port = free_port()
    codes: list[int] = []

    def wait() -> None:
        asked.set()
        url = f"http://127.0.0.1:{port}"
        codes.append(main(["probe", "ready", "--url", url, "--wait", "60"]))

    waiting = threading.Thread(target=wait)
    waiting.start()
    asked.wait()
    with serving(respond, port=port):
        waiting.join(60)

    assert codes == [0]
    assert capsys.readouterr() == ("ready\n", "")


def test_a_probe_with_a_time_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """After the time the exit code is 1, with the last error."""
    code = main(["probe", "live", "--url", f"http://127.0.0.1:{free_port()}", "--wait", "0.6"])

    assert code == 1
    assert "Connection refused" in capsys.readouterr().err


def test_no_attempt_exceeds_the_time() -> None:
    """A server that does not answer costs the time, not the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        base = f"http://127.0.0.1:{silent.getsockname()[1]}"
        passed, error = probe_for(0.3, "live", base, timeout=3600.0)

    assert not passed
    assert "timed out" in error


def test_a_probe_gives_up_when_the_process_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """A service that failed to start costs one attempt, not the whole time."""
    url = f"http://127.0.0.1:{free_port()}"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        arguments = ["probe", "live", "--url", url, "--pid", str(process.pid), "--wait"]
        alive = main([*arguments, "0.6"])
        printed = capsys.readouterr().err
    ended = main([*arguments, "3000"])

    assert (alive, ended) == (1, 1)
    assert "has ended" not in printed
    assert f"process {process.pid} has ended; {url}" in capsys.readouterr().err
