"""The fixtures of the unit tests, for tests with threads, child processes, files and sockets."""

from tests.unit.conftest import clock, held, plain_environ

__all__ = ["clock", "held", "plain_environ"]
