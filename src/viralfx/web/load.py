"""Finds the application to serve: the backend itself, or the one that ``--app`` names."""

import difflib
import importlib
import logging
import os
import sys
from types import ModuleType
from typing import cast

from litestar import Litestar

from viralfx.bootstrap.modules import in_one_line
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
    app = create_app(settings) if spec is None else load_app(spec, settings)
    plugin = next((p for p in app.plugins if isinstance(p, OperationsPlugin)), None)
    if plugin is None:
        plugin = OperationsPlugin(OperationsConfig(settings=settings))
        plugin.mount(app)
        _logger.info("Added the operations plugin to the application", extra={"app": spec})
    plugin.require_metrics_path(app)
    return cast("ASGIApp", app), plugin


def load_app(spec: str, settings: Settings) -> Litestar:
    """Import the application; a function without parameters that returns one will do.

    Raises :class:`ConfigurationError` with one line that says what is wrong, and no secret of
    ``settings``.
    """
    module_name, separator, name = spec.partition(":")
    if not separator or not module_name or not name:
        raise ConfigurationError([f"--app: {spec!r} must be package.module:name"])
    found: object = _import(module_name, settings)
    module = found
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigurationError([f"--app: {module_name} has no {part!r}{hint}"])
        found = getattr(found, part)
    if not isinstance(found, Litestar) and callable(found) and not isinstance(found, type):
        found = _call(spec, found, settings)
    if not isinstance(found, Litestar):
        kind = "module" if found is module else type(found).__name__
        raise ConfigurationError([f"--app: {spec} is not a Litestar application but a {kind}"])
    return found


def _import(name: str, settings: Settings) -> ModuleType:
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
        raise _failed(f"importing {name}", error, settings) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a module does at import
        raise _failed(f"importing {name}", error, settings) from None


def _call(spec: str, factory: object, settings: Settings) -> object:
    assert callable(factory)  # noqa: S101 - narrows for the type checker
    try:
        return factory()
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever somebody else's factory does
        raise _failed(f"calling {spec}", error, settings) from None


def _failed(what: str, error: BaseException, settings: Settings) -> ConfigurationError:
    return ConfigurationError([f"--app: {what} failed: {in_one_line(error, settings)}"])
