"""The page with the OpenAPI document works in a browser that reaches no other host."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from tests.servers.chromium import visiting
from tests.soak import SOAK, Record
from tests.system.service import Service, running


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Return the service with an open jobs API, for all tests of this file."""
    with running() as started:
        started.wait_ready()
        yield started


def origin(service: Service) -> str:
    """Return the beginning of the addresses of the service."""
    return f"http://127.0.0.1:{service.port}"


def operation_id(method: str, path: str) -> str:
    """Return the id of an operation on the page."""
    return f"{method}-{path.translate(str.maketrans('{}', '--'))}"


@pytest.mark.soak
@pytest.mark.parametrize("colors", ["light", "dark"] if SOAK else ["dark"])
def test_the_page_shows_each_operation(
    browser: Browser, service: Service, colors: str, record_property: Record
) -> None:
    """It asks only its own origin, and breaks no rule of its policy, in each colour scheme."""
    paths = service.get("/api/docs/openapi.json").json()["paths"]
    shown = {operation_id(method, path) for path, item in paths.items() for method in item}
    with visiting(browser, colors="dark" if colors == "dark" else "light") as visit:
        visit.page.goto(f"{origin(service)}/api/docs")
        viewer = visit.page.locator("rapi-doc")
        methods = {method for item in paths.values() for method in item}
        operations = viewer.locator(", ".join(f"main [id^='{each}-/']" for each in methods))
        expect(operations).to_have_count(len(shown))
        assert set(operations.evaluate_all("found => found.map((each) => each.id)")) == shown
        expect(viewer).to_have_attribute("theme", colors)

    record_property(f"/api/docs, {colors}: operations shown", len(shown))
    record_property(f"/api/docs, {colors}: requests", len(visit.requested))
    record_property(f"/api/docs, {colors}: to elsewhere", len(visit.foreign(origin(service))))
    assert visit.foreign(origin(service)) == []
    assert visit.problems == []


def test_a_request_is_tried_on_the_page(browser: Browser, service: Service) -> None:
    """The policy allows requests to the service itself, and the page shows the answer."""
    with visiting(browser) as visit:
        visit.page.goto(f"{origin(service)}/api/docs#get-/api/v1/queues")
        operation = visit.page.locator("rapi-doc [id='get-/api/v1/queues']")
        operation.get_by_role("button", name="TRY").click()
        expect(operation.get_by_text("Response Status: OK:200")).to_be_visible()

    assert f"{origin(service)}/api/v1/queues" in visit.requested
    assert visit.foreign(origin(service)) == []
    assert visit.problems == []


def test_the_page_of_another_application(browser: Browser) -> None:
    """Path, title, compression and CSRF token are its own, and the jobs API is part of it."""
    with running("--app", "tests.browser.docs_app:app") as service, visiting(browser) as visit:
        service.wait_ready()
        visit.page.goto(f"{origin(service)}/about/api/")
        operation = visit.page.locator("rapi-doc [id='post-/orders']")
        operation.get_by_role("button", name="TRY").click()
        expect(operation.get_by_text("Response Status: Created:201")).to_be_visible()
        queues = visit.page.locator("rapi-doc [id='get-/api/v1/queues']")
        queues.get_by_role("button", name="TRY").click()
        expect(queues.get_by_text("Response Status: OK:200")).to_be_visible()
        title = visit.page.title()

        assert title == "Shop </title><script>document.title = 'injected'</script>"
        assert visit.foreign(origin(service)) == []
        assert visit.problems == []
