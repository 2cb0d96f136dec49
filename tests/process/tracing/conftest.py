"""The tracing fixtures of the unit tests."""

from tests.unit.tracing.conftest import _clean, finished, memory, provider

__all__ = ["_clean", "finished", "memory", "provider"]
