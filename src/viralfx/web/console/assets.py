"""The files of the page, served from memory: compressed once, with ETag and strict headers."""

import gzip
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from viralfx.web.auth import Headers
from viralfx.web.responses import READ, RawResponse, not_allowed, problem_response

_logger = logging.getLogger("viralfx.console")

STATIC = Path(__file__).parent / "static"
_MEDIA_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
    ".ico": b"image/x-icon",
    ".txt": b"text/plain; charset=utf-8",
}
"""Other files are not served."""

SECURITY_HEADERS = (
    (
        b"content-security-policy",
        (
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
            b" connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none';"
            b" require-trusted-types-for 'script'"
        ),
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""The headers of every response of the console: no other page may frame, embed or script it."""


class _File(msgspec.Struct, frozen=True):
    plain: RawResponse
    zipped: RawResponse
    unchanged: RawResponse
    tag: bytes


class Assets:
    """Serves the files of a folder by their relative path; reads them at the first request."""

    def __init__(self, folder: Path = STATIC) -> None:
        self._folder = folder
        self._files: Mapping[str, _File] | None = None

    @property
    def files(self) -> Mapping[str, _File]:
        """The files by path; empty if the distribution has none."""
        if self._files is None:
            found = sorted(self._folder.rglob("*")) if self._folder.is_dir() else []
            self._files = {
                path.relative_to(self._folder).as_posix(): _file(path)
                for path in found
                if path.is_file() and path.suffix in _MEDIA_TYPES
            }
            if not self._files:
                _logger.error("Console has no files", extra={"folder": str(self._folder)})
        return self._files

    def respond(self, name: str, method: str, headers: Headers) -> RawResponse:
        """Return the response for a path below ``ui/``."""
        if method not in READ:
            return not_allowed("GET, HEAD", *SECURITY_HEADERS)
        file = self.files.get(name)
        if file is None:
            return problem_response(404, "The console has no such file.", *SECURITY_HEADERS)
        accepted, seen = b"", b""
        for key, value in headers:
            if key == b"accept-encoding":
                accepted += value + b","
            elif key == b"if-none-match":
                seen += value + b","
        if any(one.strip().removeprefix(b"W/") == file.tag for one in seen.split(b",")):
            return file.unchanged
        return file.zipped if _takes_gzip(accepted) else file.plain


def _takes_gzip(accepted: bytes) -> bool:
    for one in accepted.split(b","):
        name, _, weight = one.strip().partition(b";")
        if name.strip().lower() in {b"gzip", b"*"}:
            return weight.replace(b" ", b"") not in {b"q=0", b"q=0.0", b"q=0.00", b"q=0.000"}
    return False


def _file(path: Path) -> _File:
    content = path.read_bytes()
    # Of the content alone, so that the bytes are the same in each build.
    zipped = gzip.compress(content, 9, mtime=0)
    tag = b'"%s"' % hashlib.sha256(content).hexdigest()[:20].encode()
    common = (
        (b"etag", tag),
        (b"cache-control", b"no-cache"),
        (b"vary", b"accept-encoding"),
        *SECURITY_HEADERS,
    )
    media_type = (b"content-type", _MEDIA_TYPES[path.suffix])
    return _File(
        plain=_response(200, content, media_type, *common),
        zipped=_response(200, zipped, media_type, (b"content-encoding", b"gzip"), *common),
        unchanged=RawResponse(304, _head(*common), b""),
        tag=tag,
    )


def _response(status: int, body: bytes, *headers: tuple[bytes, bytes]) -> RawResponse:
    return RawResponse(status, _head((b"content-length", b"%d" % len(body)), *headers), body)


def _head(*headers: tuple[bytes, bytes]) -> bytes:
    return b"".join(b"%b: %b\r\n" % header for header in headers)
