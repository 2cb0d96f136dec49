"""Gives each file of tests a process with a console."""

from tests.web.console_site import site

__all__ = ["site"]
