"""Finds the application to serve: the backend itself, or the one that ``--app`` names."""

import difflib
import importlib
import logging
import os
import sys
import traceback
from types import ModuleType
from typing import cast

from litestar import Litestar

from viralfx.domain.errors import ConfigurationError
from viralfx.settings import Settings
from viralfx.web.app import create_app
from viralfx.web.asgi import ASGIApp
from viralfx.web.plugin import OperationsConfig, OperationsPlugin

_logger = logging.getLogger("viralfx.serve")


def find_application(settings: Settings, spec: str | None) -> tuple[ASGIApp, OperationsPlugin]:
    """Return the application and its operations plugin, adding the plugin where there is none.

    Raises :class:`ConfigurationError` when the application cannot be loaded or mounted on.
    """
    app = create_app(settings) if spec is None else load_app(spec)
    plugin = next((p for p in app.plugins if isinstance(p, OperationsPlugin)), None)
    if plugin is None:
        plugin = OperationsPlugin(OperationsConfig(settings=settings))
        plugin.mount(app)
        _logger.info("Added the operations plugin to the application", extra={"app": spec})
    plugin.require_metrics_path(app)
    return cast("ASGIApp", app), plugin


def load_app(spec: str) -> Litestar:
    """Import the application; a function without parameters that returns one will do.

    Raises :class:`ConfigurationError` with one line that says what is wrong.
    """
    module_name, separator, name = spec.partition(":")
    if not separator or not module_name or not name:
        raise ConfigurationError([f"--app: {spec!r} must be package.module:name"])
    found: object = _import(module_name)
    module = found
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigurationError([f"--app: {module_name} has no {part!r}{hint}"])
        found = getattr(found, part)
    if not isinstance(found, Litestar) and callable(found) and not isinstance(found, type):
        found = _call(spec, found)
    if not isinstance(found, Litestar):
        kind = "module" if found is module else type(found).__name__
        raise ConfigurationError([f"--app: {spec} is not a Litestar application but a {kind}"])
    return found


def _import(name: str) -> ModuleType:
    # As when Python itself runs a module: an application in the current folder can be named.
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ConfigurationError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigurationError([f"--app: there is no module {error.name!r}"]) from None
        raise ConfigurationError([f"--app: importing {name} failed: {_where(error)}"]) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a module does at import
        raise ConfigurationError([f"--app: importing {name} failed: {_where(error)}"]) from None


def _call(spec: str, factory: object) -> object:
    assert callable(factory)  # noqa: S101 - narrows for the type checker
    try:
        return factory()
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever somebody else's factory does
        raise ConfigurationError([f"--app: calling {spec} failed: {_where(error)}"]) from None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{last}".replace("\n", " ")
