"""``viralfx probe``: an exec probe or container health check without curl."""

import http.client
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from viralfx.domain.errors import ConfigurationError


def probe(kind: str, base: str, *, timeout: float) -> tuple[bool, str]:
    """Ask ``<base>/health/<kind>`` once; tell whether it answered 200, and what was said.

    Raises :class:`ConfigurationError` for a base that is no HTTP address.
    """
    if not _is_address(base):
        raise ConfigurationError([f"--url: {base!r} must look like http://127.0.0.1:3000"])
    url = f"{base.rstrip('/')}/health/{kind}"
    # A proxy from the environment must not stand between a container and itself.
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


def _is_address(base: str) -> bool:
    try:
        parts = urlsplit(base)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


class _NoRedirects(HTTPRedirectHandler):
    """A probe asks one process; where that one points to says nothing about it."""

    def redirect_request(self, *_: object) -> None:
        return None
