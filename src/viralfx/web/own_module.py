"""The module of an application: the one whose code creates its operations layer."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from viralfx.jobs.tasks import Task, tasks_of_module

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True)
class OwnModule:
    """The module whose code creates a layer, and whether it does so at its top level."""

    namespace: Mapping[str, Any]
    at_top_level: bool
    """False: in a function, which may create several."""

    @classmethod
    def of(cls, created: object) -> "OwnModule | None":
        """Return the module that creates an object, whose constructor calls this.

        None if code of this package creates it.
        """
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the only way to the caller
        # The constructors of its class, and of classes of the application that extend it.
        while frame is not None and _first_argument(frame) is created:
            frame = frame.f_back
        if frame is None or _name_of(frame.f_globals).partition(".")[0] == _PACKAGE:
            return None
        return cls(frame.f_globals, frame.f_code.co_name == "<module>")

    @property
    def name(self) -> str:
        """Its name; ``__main__`` for the program."""
        return _name_of(self.namespace)

    def tasks(self) -> Sequence[Task]:
        """Return the tasks that it has declared so far."""
        return tasks_of_module(self.namespace)


def _name_of(namespace: Mapping[str, Any]) -> str:
    return str(namespace.get("__name__", "__main__"))


def _first_argument(frame: FrameType) -> object:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
