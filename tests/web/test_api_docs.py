"""The page with the OpenAPI document: its headers, its addresses, and the files it loads."""

import gzip
import re
import tomllib
from functools import cache
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from litestar import Litestar
from litestar.config.compression import CompressionConfig
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import ScalarRenderPlugin
from litestar.testing import AsyncTestClient

from viralfx import ApiDocsPlugin
from viralfx.settings import Settings
from viralfx.web.app import create_app

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "src/viralfx/web/api_docs/static"
VENDORED = sorted((ROOT / "src").rglob("vendor.toml"))
VIEWER = "/api/docs/rapidoc-min.js"
LINK = re.compile(r'(?:src|href|spec-url)="([^"]+)"')


async def get(path: str, app: Litestar | None = None, **headers: str) -> httpx.Response:
    """Request a path of the service, or of another application."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with AsyncTestClient(app or service()) as client:
        return await client.get(path, headers=named)


@cache
def service() -> Litestar:
    """Return the service: no test of this file changes anything in it."""
    return create_app(Settings())


def shop(**options: object) -> Litestar:
    """Return an application with the page beside another one."""
    config = OpenAPIConfig(
        title="Shop",
        version="1",
        path="/about",
        render_plugins=[ApiDocsPlugin(path="/api"), ScalarRenderPlugin(path="/scalar")],
    )
    return Litestar(openapi_config=config, **options)  # type: ignore[arg-type]


async def test_the_page_forbids_other_hosts() -> None:
    """Its policy allows nothing inline but styles, no frame, and no form."""
    page = await get("/api/docs")
    policy = dict(
        each.split(" ", 1) for each in page.headers["content-security-policy"].split("; ")
    )

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert re.search(r"<script(?![^>]* src=)|\son\w+=", page.text) is None


async def test_the_policy_is_only_for_this_page() -> None:
    """Another page of the same application keeps its own headers."""
    app = shop()
    ours, other = await get("/about/api", app), await get("/about/scalar", app)

    assert "content-security-policy" in ours.headers
    assert "content-security-policy" not in other.headers


@pytest.mark.parametrize("prefix", ["", "/prefix"])
@pytest.mark.parametrize("page", ["/api/docs", "/api/docs/"])
async def test_addresses_are_relative(page: str, prefix: str) -> None:
    """They lead to the files with and without a slash at the end, and behind a prefix."""
    async with AsyncTestClient(service(), root_path=prefix) as client:
        found = await client.get(prefix + page)
        links = [link for link in LINK.findall(found.text) if not link.startswith("data:")]
        replies = [await client.get(str(found.url.join(link))) for link in links]

    assert len(links) == 5
    assert all(reply.url.path.startswith(f"{prefix}/api/docs/") for reply in replies)
    assert [reply.status_code for reply in replies] == [200] * 5


async def test_the_default_page_of_an_application_finds_its_files() -> None:
    """The page is served at the path of the document, too, and that is one level higher."""
    app = shop()
    for page in ("/about", "/about/api"):
        found = await get(page, app)
        links = [link for link in LINK.findall(found.text) if not link.startswith("data:")]
        assert {(await get(found.url.join(link).path, app)).status_code for link in links} == {200}


async def test_a_file_is_sent_compressed_and_once() -> None:
    """A second request with the tag is answered without the file."""
    first = await get(VIEWER, accept_encoding="br, gzip")
    tag = first.headers["etag"]
    again = await get(VIEWER, accept_encoding="gzip", if_none_match=f'"other", W/{tag}')
    other = await get(VIEWER, accept_encoding="gzip", if_none_match='"other"')

    assert first.headers["content-encoding"] == "gzip"
    assert first.headers["content-type"].startswith("text/javascript")
    assert first.headers["vary"] == "Accept-Encoding"
    assert first.headers["cache-control"] == "no-cache"
    assert int(first.headers["content-length"]) == (STATIC / "rapidoc-min.js.gz").stat().st_size
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert other.status_code == 200


@pytest.mark.parametrize("accepted", ["identity", "gzip;q=0", "br", ""])
async def test_a_client_without_gzip_gets_the_file_itself(accepted: str) -> None:
    """Its tag is another one, so a cache does not mix the two up."""
    plain = await get(VIEWER, accept_encoding=accepted)
    compressed = await get(VIEWER, accept_encoding="gzip")

    assert "content-encoding" not in plain.headers
    assert plain.content == gzip.decompress((STATIC / "rapidoc-min.js.gz").read_bytes())
    assert plain.content == compressed.content
    assert plain.headers["etag"] != compressed.headers["etag"]


async def test_the_middleware_of_the_application_compresses_once() -> None:
    """A file that was compressed twice would be no script."""
    app = shop(compression_config=CompressionConfig(backend="gzip"))
    found = await get("/about/rapidoc-min.js", app, accept_encoding="gzip")

    assert found.headers["content-encoding"] == "gzip"
    assert found.content.startswith(b"/*! RapiDoc")


@pytest.mark.parametrize("name", ["index.html", "page.css", "page.js"])
def test_a_file_of_the_page_names_no_other_host(name: str) -> None:
    """The viewer has addresses in it; its policy and the test in a browser show it asks none."""
    assert re.search(r"https?:|//[a-z]", (STATIC / name).read_text(encoding="utf-8")) is None


@pytest.mark.parametrize("path", VENDORED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_vendored_file_is_the_one_of_its_package(path: Path) -> None:
    """Its hash is the noted one, and the notices name the package, version and licence."""
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")
    for name, noted in tomllib.loads(path.read_text(encoding="utf-8")).items():
        found = sha256((path.parent / noted["file"]).read_bytes()).hexdigest()

        assert found == noted["sha256"], name
        assert noted["integrity"].startswith("sha512-")
        assert re.search(rf"(?i){name}.* {re.escape(noted['version'])}\b", notices), name
        assert f"### {noted['licence']}\n" in notices
