"""The command line, in a process whose packages lack some private parts for this project.

``VIRALFX_TEST_WITHOUT`` lists them, separated by commas: ``package.module:name`` is a name that the
project cannot import, and ``package.module:Class.method`` a method that its subclasses
cannot call. It stands for a release that has renamed them: the package itself works as before.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from viralfx.__main__ import main


def hide_name(module: ModuleType, name: str) -> None:
    """Put a copy without the name in the place of a module; its own code keeps the name."""
    copy = ModuleType(module.__name__, module.__doc__)
    vars(copy).update({key: value for key, value in vars(module).items() if key != name})
    sys.modules[module.__name__] = copy
    package, _, last = module.__name__.rpartition(".")
    if package:
        setattr(sys.modules[package], last, copy)


def hide_method(owner: Any, name: str) -> None:
    """Let a method raise for instances of this project's subclasses."""
    original = getattr(owner, name)

    def gone(self: object, *arguments: object, **named: object) -> object:
        if type(self).__module__.startswith("viralfx."):
            raise TypeError(f"{owner.__name__}.{name}: hidden by the test")
        return original(self, *arguments, **named)

    setattr(owner, name, gone)


def hide(part: str) -> None:
    """Hide one part."""
    module, _, path = part.partition(":")
    owner, _, method = path.partition(".")
    found = importlib.import_module(module)
    if method:
        hide_method(getattr(found, owner), method)
    else:
        hide_name(found, owner)


USERS = ("http.httptools_impl", "websockets.websockets_sansio_impl")
"""Modules of uvicorn's own that keep the names that they have imported."""

if __name__ == "__main__":
    for module in USERS:
        importlib.import_module(f"uvicorn.protocols.{module}")
    for wanted in os.environ.pop("VIRALFX_TEST_WITHOUT").split(","):
        hide(wanted)
    sys.exit(main())
