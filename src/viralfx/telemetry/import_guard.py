"""Libraries that import OpenTelemetry wherever it is installed, and how they are kept from it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NAME = "opentelemetry"


@contextmanager
def without_opentelemetry() -> Iterator[None]:
    """Have imports within the block find no OpenTelemetry, unless somebody has it already.

    Litestar looks for its own plugin in each application, and redis-py for a provider of metrics.
    Both can do without; where nothing is traced it would take a quarter of the start.
    """
    if _NAME in sys.modules:
        yield
        return
    sys.modules[_NAME] = None  # type: ignore[assignment]  # so an import of it fails, as foreseen
    try:
        yield
    finally:
        del sys.modules[_NAME]
