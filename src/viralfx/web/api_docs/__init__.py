"""Shows an application's OpenAPI document on a page that loads nothing from another host."""

import gzip
import html
import posixpath
import re
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

from litestar import Request, Response, Router, get
from litestar.constants import OPENAPI_JSON_HANDLER_NAME
from litestar.datastructures import ResponseHeader, State
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.routes import HTTPRoute

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    # The viewer has styles in its templates.
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Scripts and requests of the page: only the application's own origin, nothing inline."""

_SECURITY = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_FILE_HEADERS = {
    "cache-control": "no-cache",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
_TYPES = {".css": "text/css", ".js": "text/javascript"}
_FILES = ("page.css", "page.js", "rapidoc-min.js")

AnyRequest = Request[object, object, State]


class _Asset(NamedTuple):
    plain: bytes
    compressed: bytes
    etag: str


@cache
def _template() -> Template:
    return Template(_read("index.html").decode())


@cache
def _asset(name: str) -> _Asset:
    """Return a file of this package; the viewer is stored compressed."""
    if name == "rapidoc-min.js":
        compressed = _read(f"{name}.gz")
        plain = gzip.decompress(compressed)
    else:
        plain = _read(name)
        compressed = gzip.compress(plain, mtime=0)
    return _Asset(plain, compressed, sha256(plain).hexdigest()[:32])


def _read(name: str) -> bytes:
    return files(__package__).joinpath("static", name).read_bytes()


class ApiDocsPlugin(OpenAPIRenderPlugin):
    """Renders the document with RapiDoc from this package, for ``render_plugins`` of Litestar.

    The page works without access to other hosts, forbids the browser any by its content security
    policy, and sends requests that are tried on it to the application itself.
    """

    def __init__(self, *, path: str = "/") -> None:
        """Take the path of the page below that of the OpenAPI configuration."""
        super().__init__(path=path, favicon="", style="")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """Return the page. Its addresses are relative, so a proxy may remove a prefix."""
        # Litestar takes the slash at the end from `path`, and the root path from both.
        raw = request.scope.get("raw_path") or b""
        page = request.scope["path"] + ("/" if raw.endswith(b"/") else "")
        here = posixpath.dirname(page)

        def relative(name: str) -> str:
            return posixpath.relpath(request.app.route_reverse(name), here)

        csrf = request.app.csrf_config
        readable = csrf is not None and not csrf.cookie_httponly
        values = {
            "title": openapi_schema["info"]["title"],
            "document": relative(OPENAPI_JSON_HANDLER_NAME),
            "style": relative(_route_name("page.css")),
            "script": relative(_route_name("page.js")),
            "viewer": relative(_route_name("rapidoc-min.js")),
            "csrf_cookie": csrf.cookie_name if csrf is not None and readable else "",
            "csrf_header": csrf.header_name if csrf is not None and readable else "",
        }
        escaped = {name: html.escape(value) for name, value in values.items()}
        return _template().substitute(escaped).encode()

    def receive_router(self, router: Router) -> None:
        """Add the files of the page beside the document, and the headers of the page."""
        for route in router.routes:
            for handler in route.route_handlers if isinstance(route, HTTPRoute) else ():
                if set(self.paths) <= set(handler.paths):
                    own = handler.response_headers or ()
                    handler.response_headers = (*own, *_headers(_SECURITY))
        for name in _FILES:
            router.register(_file_handler(name))


def _headers(named: Mapping[str, str]) -> list[ResponseHeader]:
    return [ResponseHeader(name=name, value=value) for name, value in named.items()]


def _route_name(file: str) -> str:
    return f"viralfx.api_docs.{file}"


def _file_handler(name: str) -> HTTPRouteHandler:
    media_type = _TYPES[posixpath.splitext(name)[1]]

    @get(f"/{name}", name=_route_name(name), media_type=media_type, sync_to_thread=False)
    def send_file(request: AnyRequest) -> Response[bytes]:
        asset = _asset(name)
        # The application's own middleware would compress a second time.
        compress = request.app.compression_config is None and _takes_gzip(request)
        etag = f'"{asset.etag}-gzip"' if compress else f'"{asset.etag}"'
        headers = {"etag": etag, "vary": "Accept-Encoding", **_FILE_HEADERS}
        known = {each.strip().removeprefix("W/") for each in _fields(request, "if-none-match")}
        if etag in known or "*" in known:
            return Response(b"", status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        if compress:
            headers["content-encoding"] = "gzip"
        body = asset.compressed if compress else asset.plain
        return Response(body, headers=headers, media_type=media_type)

    return send_file


def _fields(request: AnyRequest, header: str) -> list[str]:
    return request.headers.get(header, "").split(",")


def _takes_gzip(request: AnyRequest) -> bool:
    for each in _fields(request, "accept-encoding"):
        coding, _, parameter = each.partition(";")
        if coding.strip().lower() in {"gzip", "*"}:
            return not re.fullmatch(r"\s*q=0(\.0*)?\s*", parameter)
    return False
