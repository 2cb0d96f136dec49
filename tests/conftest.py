"""Makes the fixtures with real servers known to all tests."""

import pytest

pytest_plugins = ["tests.servers.fixtures", "tests.integration.databases"]


@pytest.hookimpl(tryfirst=True)
def pytest_report_to_serializable(report: object) -> None:
    """Let ``-n`` carry reports of tests that log what no encoding has."""
    if isinstance(report, pytest.TestReport):
        report.sections = [(name, _encodable(text)) for name, text in report.sections]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
