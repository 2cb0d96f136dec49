"""The fixtures of the unit tests, for state machines and simulations of hours."""

from tests.unit.conftest import clock, held, plain_environ

__all__ = ["clock", "held", "plain_environ"]
