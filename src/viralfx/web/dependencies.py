"""Dependencies: those of a Litestar application for its tasks, and clients for its handlers."""

import inspect
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from litestar import Litestar
from litestar.config.app import AppConfig
from litestar.constants import RESERVED_KWARGS
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler
from litestar.routes import BaseRoute, HTTPRoute, WebSocketRoute
from litestar.typing import FieldDefinition

from viralfx.core.errors import ConfigurationError, suggest
from viralfx.domain.cache import Cache
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import Task

CLIENTS: Mapping[str, type | None] = {
    "jobs": JobService,
    "cache": Cache,
    "database": None,
    "redis": None,
}
"""The clients of the plugin that handlers get by name; None: the class belongs to a driver."""


class ClientDependencies:
    """Gives the clients of a plugin to the handlers of its application, by name."""

    def __init__(self, clients: object, app: AppConfig) -> None:
        """Add a dependency for each attribute of ``clients`` in :data:`CLIENTS`.

        Dependencies of the application with these names stay.
        """
        self._providers = {
            # Read for each request, because a test client wires the plugin anew.
            name: Provide(_reader(clients, name), sync_to_thread=False)
            for name in CLIENTS
            if name not in app.dependencies
        }
        app.dependencies.update(self._providers)
        for each in (JobService, Cache):
            app.signature_namespace.setdefault(each.__name__, each)

    def require_free_names(self, route: BaseRoute) -> None:
        """Raise :class:`ConfigurationError` for a parameter with the name of a client.

        Without this, a query parameter ``cache: int`` would get the cache.
        """
        handlers: Sequence[BaseRouteHandler] = ()
        if isinstance(route, HTTPRoute):
            handlers = route.route_handlers
        elif isinstance(route, WebSocketRoute):
            handlers = (route.route_handler,)
        problems = [problem for handler in handlers for problem in self._problems(handler)]
        if problems:
            raise ConfigurationError(problems)

    def _problems(self, handler: BaseRouteHandler) -> Iterator[str]:
        dependencies = handler.resolve_dependencies()
        seen: set[str] = set()
        waiting = [("", handler.parsed_fn_signature)]
        while waiting:
            whose, signature = waiting.pop()
            for name, parameter in signature.parameters.items():
                provider = dependencies.get(name)
                if provider is None or name in seen:
                    continue
                if provider is not self._providers.get(name):
                    # Its own parameters are those of the request, too.
                    seen.add(name)
                    waiting.append((f" of its dependency {name!r}", provider.parsed_fn_signature))
                elif not _may_be(CLIENTS[name], parameter):
                    yield (
                        f"{handler.handler_name}: its parameter {name!r}{whose} gets the client of"
                        " the OperationsPlugin. Rename it, declare a dependency with that name, or"
                        " pass OperationsConfig(dependencies=False)"
                    )


def _reader(clients: object, name: str) -> Callable[[], Any]:
    def read() -> Any:
        return getattr(clients, name)

    return read


_PLAIN = (str, int, float, bool, bytes, list, dict, set, tuple)


def _may_be(client: type | None, parameter: FieldDefinition) -> bool:
    """Return whether a parameter may be meant for a client of a class; None: any class."""
    parts = parameter.inner_types if parameter.is_union else (parameter,)
    kinds = [getattr(part.annotation, "__origin__", part.annotation) for part in parts]
    return any(
        not isinstance(kind, type)
        or (kind not in _PLAIN if client is None else issubclass(client, kind))
        for kind in kinds
        if kind is not type(None)
    )


_STATE = "state"
"""The parameter of a dependency that gets the application's state, as in Litestar."""


_Plan = Mapping[str, tuple[Provide, Sequence[str]]]
"""By name, the dependencies that a task needs, with the names of their parameters.

They are in the order in which they are called.
"""


class ApplicationDependencies:
    """Implements ``DependencyProvider`` with the dependencies of a Litestar application.

    These are the ones that the application itself declares, not its routers and controllers. Each
    is called once for each call of a task that needs it, after the dependencies of its own.
    """

    def __init__(self, app: Litestar | AppConfig) -> None:
        """Read the dependencies and the state of ``app`` when they are needed."""
        self._app = app
        self._plans: dict[str, _Plan] = {}
        """By the name of a task."""

    def problems(self, task: Task) -> Iterable[str]:
        """Return why dependencies of a task cannot be provided."""
        return self._plan(task)[1]

    @asynccontextmanager
    async def provide(self, task: Task) -> AsyncIterator[Mapping[str, Any]]:
        """Call the dependencies; generators go on after the call of the task, in reverse order.

        Raises :class:`ConfigurationError` for a dependency that cannot be provided.
        """
        if (plan := self._plans.get(task.name)) is None:
            plan, problems = self._plan(task)
            if problems:
                raise ConfigurationError(problems)
            self._plans[task.name] = plan
        values: dict[str, Any] = {_STATE: self._app.state}
        async with AsyncExitStack() as generators:
            for name, (provider, parameters) in plan.items():
                value = await provider(**{each: values[each] for each in parameters})
                if inspect.isasyncgen(value) and provider.has_async_generator_dependency:
                    value = await generators.enter_async_context(_async_generator(value))
                elif inspect.isgenerator(value) and provider.has_sync_generator_dependency:
                    value = await generators.enter_async_context(_generator(value))
                values[name] = value
            yield {name: values[name] for name in task.dependencies if name in plan}

    def _plan(self, task: Task) -> tuple[_Plan, Sequence[str]]:
        known: Mapping[str, Any] = self._app.dependencies or {}
        plan: dict[str, tuple[Provide, Sequence[str]]] = {}
        problems: list[str] = []

        def add(name: str, user: str, *path: str) -> None:
            if name in plan:
                return
            if name in path:
                problems.append(f"{user} needs {name!r}, which needs itself")
                return
            if name not in known:
                problems.append(f"{user} takes {name!r}, {_reason(name, known)}")
                return
            provider = _provider(known[name])
            parameters = _parameters(provider)
            for each, required in parameters.items():
                if each != _STATE and (required or each in known):
                    add(each, f"its dependency {name!r}", *path, name)
            plan[name] = provider, [each for each in parameters if each in {_STATE, *known}]

        for name, required in task.dependencies.items():
            if required or name in known:
                add(name, task.function.__qualname__)
        return plan, [f"@task({task.name!r}): {problem}" for problem in problems]


def _provider(dependency: Any) -> Provide:
    if isinstance(dependency, Provide):
        return dependency
    with warnings.catch_warnings():  # Litestar gives them for its handlers
        warnings.simplefilter("ignore")
        return Provide(dependency)


def _parameters(provider: Provide) -> Mapping[str, bool]:
    """Return the parameters of a dependency, and whether each must be given."""
    # Litestar wraps a dependency that runs in a thread.
    function = getattr(provider.dependency, "func", provider.dependency)
    return {
        each.name: each.default is each.empty
        for each in inspect.signature(function).parameters.values()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }


_NONE = "it has none: declare it in Litestar(dependencies={...}), and name that app with --app"


def _reason(name: str, known: Iterable[str]) -> str:
    if name in RESERVED_KWARGS:
        return "which belongs to a request: a job has none"
    there = ", ".join(sorted(known))
    return (
        "and the application has no dependency of that name; "
        + (suggest(name, known) or (f"it has {there}" if there else _NONE))
        + f". A task has one payload: if {name!r} should come with the job, make it a field of that"
    )


@asynccontextmanager
async def _async_generator(generator: Any) -> AsyncIterator[Any]:
    try:
        yield await anext(generator)
    except BaseException as error:
        # It may raise another error, but it cannot turn a failure into a success.
        with suppress(StopAsyncIteration):
            await generator.athrow(error)
        raise
    else:
        await anext(generator, None)


@asynccontextmanager
async def _generator(generator: Any) -> AsyncIterator[Any]:
    try:
        yield next(generator)
    except BaseException as error:
        with suppress(StopIteration):
            generator.throw(error)
        raise
    else:
        next(generator, None)
