"""Gives each file of tests a browser."""

from tests.browser.conftest import browser

__all__ = ["browser"]
