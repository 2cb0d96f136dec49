"""Makes the fixtures with real servers known to all tests, and says what may run side by side."""

import pytest

pytest_plugins = ["tests.servers.fixtures", "tests.integration.databases"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Put each test into a group, that of what measures time or its file's: ``-n`` splits none."""
    item.add_marker(pytest.mark.xdist_group("alone" if _alone(item) else str(item.path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what measures time last."""
    items.sort(key=_alone)


@pytest.hookimpl(tryfirst=True)
def pytest_report_to_serializable(report: object) -> None:
    """Let ``-n`` carry reports of tests that log what no encoding has."""
    if isinstance(report, pytest.TestReport):
        report.sections = [(name, _encodable(text)) for name, text in report.sections]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None
