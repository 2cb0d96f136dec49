"""The error tree: one root, and a leaf only where somebody catches it."""

from collections.abc import Iterable


class ViralFXError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigurationError(ViralFXError):
    """The configuration cannot be used; ``problems`` lists everything wrong with it at once."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class StartupError(ViralFXError):
    """The configuration is right but the process could not start: a port in use, for example."""


class WorkLostError(ViralFXError):
    """A shutdown stage ran out of budget and had to give up work it should have finished."""
