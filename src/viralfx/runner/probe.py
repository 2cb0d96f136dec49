"""``viralfx probe``: an exec probe or container health check that needs no curl."""

import http.client
import os
import time
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from viralfx.core.errors import ConfigurationError

_PAUSE = 0.25
_SHORTEST_ATTEMPT = 0.1


def probe(kind: str, base: str, *, timeout: float) -> tuple[bool, str]:
    """Request ``<base>/health/<kind>`` once; return whether the status is 200, and the body.

    Without a response, the second value is the error. Raises :class:`ConfigurationError` for a base
    that is not an HTTP address or has a user or password: probes need none, and errors show the
    address.
    """
    if "@" in base:
        # Before parsing, because it may be malformed, and not shown, because it has a password.
        example = "it must look like http://127.0.0.1:3000"
        raise ConfigurationError(
            [f"--url: the address must not have a user or password; {example}"]
        )
    if not _is_address(base):
        raise ConfigurationError([f"--url: {base!r} must look like http://127.0.0.1:3000"])
    url = f"{base.rstrip('/')}/health/{kind}"
    # Without a proxy: the probe is for a process in the same container.
    opener = build_opener(ProxyHandler({}), _NoRedirects)
    request = Request(url, headers={"User-Agent": "viralfx-probe"})  # noqa: S310 - scheme checked
    try:
        with opener.open(request, timeout=timeout) as response:
            return response.status == http.client.OK, response.read().decode("utf-8", "replace")
    except HTTPError as error:
        return False, error.read().decode("utf-8", "replace")
    except (URLError, OSError, UnicodeError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        return False, f"{url}: {reason or type(error).__name__}"


def probe_for(
    seconds: float, kind: str, base: str, *, timeout: float, pid: int | None = None
) -> tuple[bool, str]:
    """Repeat :func:`probe` until it succeeds or the time is over; return the last result.

    No attempt exceeds the time, and there is one at least. With ``pid`` it also ends when that
    process has ended: a service that failed to start does not become ready.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        passed, output = probe(kind, base, timeout=min(timeout, max(left, _SHORTEST_ATTEMPT)))
        if passed or time.monotonic() + _PAUSE >= deadline:
            return passed, output
        if pid is not None and not _exists(pid):
            return False, f"process {pid} has ended; {output}"
        time.sleep(_PAUSE)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _is_address(base: str) -> bool:
    try:
        parts = urlsplit(base)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


class _NoRedirects(HTTPRedirectHandler):
    """Treats a redirect as a failure: the target says nothing about the probed process."""

    def redirect_request(self, *_: object) -> None:
        return None
