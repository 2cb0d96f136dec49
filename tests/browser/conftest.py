"""Gives each file of tests a browser."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from tests.servers.chromium import chromium
from tests.servers.fixtures import or_skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a browser for the tests of one file, none of which may be async."""
    with or_skip(), chromium() as running:
        yield running
