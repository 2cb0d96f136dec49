"""The application that ``--app`` names: its import and its operations layer.

For a worker ``--app`` may name a broker of tasks, too, which needs no application.
"""

import inspect
import logging
import sys
from collections.abc import Collection
from typing import cast

from viralfx.asgi import OperationsMiddleware, has_layer, middleware_around
from viralfx.bootstrap.task_modules import failed, import_named, of_code
from viralfx.core.errors import ConfigurationError, suggest
from viralfx.jobs.hooks import TaskHost
from viralfx.jobs.tasks import tasks_of_module
from viralfx.server.interface import ASGIApp, Receive, Scope, Send
from viralfx.settings import Settings
from viralfx.telemetry.tracing import tracing_of
from viralfx.web.layer import READS_STRICTLY, OperationsConfig, OperationsLayer

_logger = logging.getLogger("viralfx.serve")


def find_application(
    settings: Settings, spec: str | None, problems: Collection[str] = ()
) -> tuple[ASGIApp, OperationsLayer]:
    """Return the application and its operations layer, which is added if it is missing.

    None is the service's own application. ``problems``: those of the environment, for an
    application without a layer, which takes ``settings``; a layer of its own reads and judges its
    variables itself. Raises :class:`ConfigurationError` with these problems, or if the application
    cannot be loaded, or if its routes conflict with the endpoints.
    """
    with tracing_of(module_of(spec)):
        if spec is None:
            # Imported late: an application of another framework needs no Litestar.
            from viralfx.web.app import create_app  # noqa: PLC0415

            app = cast("ASGIApp", create_app(settings))
        else:
            app = load_app(spec, settings)
        return _with_layer(app, settings, spec, problems)


def module_of(spec: str | None) -> str:
    """Return the module of the application; None is that of the service."""
    return __name__ if spec is None else spec.partition(":")[0]


def bare_application(settings: Settings) -> tuple[ASGIApp, OperationsLayer]:
    """Return the operations layer around no application, which answers every other path with 404.

    An environment without Litestar has it in place of the service's own application.
    """
    layer = OperationsMiddleware(_no_application, OperationsConfig(settings=settings))
    return layer, layer


async def _no_application(scope: Scope, receive: Receive, send: Send) -> None:
    del scope, receive
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def find_worker_application(
    settings: Settings, spec: str, problems: Collection[str] = ()
) -> tuple[ASGIApp, OperationsLayer] | TaskHost:
    """Return the application with its layer, as :func:`find_application` does, or a task host.

    A host, such as ``LedgerBroker``, has no application: its tasks run in a plain worker, with
    ``settings``. So ``problems`` are raised for it, too.
    """
    with tracing_of(module_of(spec)):
        found = _load(spec, settings)
        if not isinstance(found, TaskHost):
            return _with_layer(found, settings, spec, problems)
    if problems:
        raise ConfigurationError(problems)
    return found


def _with_layer(
    app: ASGIApp, settings: Settings, spec: str | None, problems: Collection[str]
) -> tuple[ASGIApp, OperationsLayer]:
    layer: OperationsLayer
    if problems and not has_layer(app) and middleware_around(app) is None:
        raise ConfigurationError(problems)
    # A layer that is added has the tasks of the module that --app names.
    own = () if spec is None else tasks_of_module(vars(sys.modules[module_of(spec)]))
    tasks = [task.function for task in own]
    if _is_litestar(app):
        from viralfx.web.plugin import plugin_of  # noqa: PLC0415 - as above

        layer, added = plugin_of(app, settings, tasks)
    elif isinstance(app, OperationsMiddleware):
        layer, added = app, False
        app.require_free_paths()
    else:
        if middleware_around(app) is not None:
            problem = f"--app: {spec} is inside an OperationsMiddleware; name the middleware"
            raise ConfigurationError([problem])
        app = layer = OperationsMiddleware(app, OperationsConfig(settings=settings, tasks=tasks))
        added = True
        layer.require_free_paths()
    if added:
        _logger.info("Added the operations layer to the application", extra={"app": spec})
    layer.load_tasks()
    return app, layer


def _is_litestar(app: object) -> bool:
    return any(
        (c.__module__, c.__name__) == ("litestar.app", "Litestar") for c in type(app).__mro__
    )


def load_app(spec: str, settings: Settings) -> ASGIApp:
    """Import the application ``package.module:name``, or call the function that creates it.

    Raises :class:`ConfigurationError` with one line that names the problem, and without the secrets
    of ``settings``.
    """
    found = _load(spec, settings)
    if isinstance(found, TaskHost):
        problem = (
            f"--app: {spec} is a {type(found).__name__}, which has tasks and no routes; run them"
            f" with `viralfx worker --app {spec}`, or name its module in TASK_MODULES"
        )
        raise ConfigurationError([problem])
    return found


def _load(spec: str, settings: Settings) -> ASGIApp | TaskHost:
    strictly = READS_STRICTLY.set(True)
    try:
        return _import(spec, settings)
    finally:
        READS_STRICTLY.reset(strictly)


def _import(spec: str, settings: Settings) -> ASGIApp | TaskHost:
    module_name, separator, name = spec.partition(":")
    if not separator or not module_name or not name:
        raise ConfigurationError([f"--app: {spec!r} must be package.module:name"])
    found: object = import_named("--app", module_name, settings)
    module = found
    for part in name.split("."):
        if not hasattr(found, part):
            hint = suggest(part, dir(found))
            problem = f"--app: {module_name} has no {part!r}"
            raise ConfigurationError([f"{problem}; {hint}" if hint else problem])
        found = getattr(found, part)
    if _is_factory(found):
        found = _call(spec, found, settings)
    if isinstance(found, TaskHost):
        return found
    if isinstance(found, type) or not _takes(found, 3):
        kind = "module" if found is module else type(found).__name__
        if isinstance(found, type):
            kind = f"class; name an instance of {found.__name__}"
        raise ConfigurationError([f"--app: {spec} is not an ASGI application but a {kind}"])
    return cast("ASGIApp", found)


def _is_factory(found: object) -> bool:
    """Return whether it creates applications; an application can be called, too, but with a scope.

    A function that takes other arguments counts, so that the error names the missing ones.
    """
    if isinstance(found, type) or not callable(found):
        return False
    return _takes(found, 0) or (inspect.isroutine(found) and not _takes(found, 3))


def _takes(found: object, arguments: int) -> bool:
    """Return whether it can be called with that many arguments."""
    if not callable(found):
        return False
    try:
        inspect.signature(found).bind(*range(arguments))
    except (TypeError, ValueError):
        return False
    return True


def _call(spec: str, factory: object, settings: Settings) -> object:
    assert callable(factory)  # noqa: S101 - narrows for the type checker
    try:
        return factory()
    except ConfigurationError as error:
        raise of_code(error) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a factory may raise anything
        raise failed("--app", f"calling {spec}", error, settings) from None
