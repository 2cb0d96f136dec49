"""Imports the modules of TASK_MODULES, and registers all tasks of the process."""

import importlib
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.errors import (
    ConfigurationError,
    ViralFXError,
    line_of,
    located,
    origin_of,
    suggest,
)
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.hooks import TaskHost, tasks_of
from viralfx.jobs.tasks import Task, TaskRegistry, is_copy
from viralfx.settings import Settings
from viralfx.telemetry.logging.redaction import Redaction, secrets_of


def load_tasks(settings: Settings) -> tuple[list[Task], list[str]]:
    """Import TASK_MODULES; return the tasks that they declare or import, and the problems.

    A module that creates the plugin itself is still being imported then. Call this again later for
    the tasks that it declares after the plugin.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    for name in settings.task_modules:
        try:
            module = import_named("TASK_MODULES", name, settings)
        except ConfigurationError as error:
            problems += error.problems
            continue
        found = [task for value in vars(module).values() for task in tasks_of(value)]
        if not found and not getattr(module.__spec__, "_initializing", False):
            problems.append(
                f"TASK_MODULES: {name} declares no task; put @task('...') on an async def in it"
            )
        tasks += found
    return tasks, problems


def declared_tasks(functions: Sequence[object]) -> tuple[list[Task], list[str]]:
    """Return the tasks of an application's own functions, and the problems."""
    tasks: list[Task] = []
    problems: list[str] = []
    for function in functions:
        found = tasks_of(function)
        if not found and not isinstance(function, TaskHost):
            problems.append(
                f"OperationsConfig.tasks: {function!r} is no task; put @task('...') on it"
            )
        tasks += found
    return tasks, problems


def without_copies(registry: TaskRegistry, own: Iterable[Task]) -> list[Task]:
    """Return the tasks of an application's module, without copies of registered ones.

    A module that runs as ``__main__`` has copies if TASK_MODULES names it, too.
    """
    known = {task.name: task for task in registry}
    return [
        task for task in own if (found := known.get(task.name)) is None or not is_copy(task, found)
    ]


def registry_of(built_in: Iterable[Task], queues: Sequence[str]) -> TaskRegistry:
    """Return a registry of the built-in tasks.

    One whose queue is not in ``queues`` uses the first of them.
    """
    return TaskRegistry(
        task if task.queue in queues else replace(task, queue=queues[0]) for task in built_in
    )


def add_tasks(
    registry: TaskRegistry,
    own: Iterable[Task],
    *,
    queues: Sequence[str],
    codec: MsgspecCodec,
    check_results: bool,
) -> Iterator[str]:
    """Register tasks of an application; yield the problems.

    With ``check_results`` also the types that the tasks declare for their results are checked; do
    not, if middleware may replace the results.
    """
    for task in own:
        place = line_of(task.function)
        problems = list(_problems_of(task, queues, codec))
        if check_results:
            try:
                codec.learn_result(task.result_type)
            except TypeError as error:
                problems.append(f"@task({task.name!r}): its result has no JSON: {error}")
        for problem in problems:
            yield located(problem, place)
        try:
            registry.add(task)
        except ValueError as error:
            yield located(f"@task({task.name!r}): {error}", place)


def _problems_of(task: Task, queues: Collection[str], codec: MsgspecCodec) -> Iterator[str]:
    if task.queue not in queues:
        hint = suggest(task.queue, queues) or f"add it to QUEUES, which has {', '.join(queues)}"
        yield f"@task({task.name!r}): there is no queue named {task.queue!r}; {hint}"
    try:
        codec.learn(task.payload_type)
    except TypeError as error:
        yield f"@task({task.name!r}): its payload has no JSON: {error}"
        return
    if task.cron is not None:
        try:
            codec.decode(b"null", task.payload_type)
        except PayloadError:
            yield (
                f"@task({task.name!r}): cron= runs it with the payload null, which its payload type"
                " does not allow; declare the payload as None, or as T | None"
            )


_PACKAGES: set[str] = set()
"""The packages of the application in this process, of which --app and TASK_MODULES name modules."""


def import_named(option: str, name: str, settings: Settings) -> ModuleType:
    """Import the module that a setting or an option names.

    Raises :class:`ConfigurationError` with one line that begins with ``option``, and without the
    secrets of ``settings``.
    """
    _PACKAGES.add(name.partition(".")[0])
    # As with ``python -m``, modules in the current folder can be imported.
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ConfigurationError as error:
        raise of_code(error) from None
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            where = "" if name == error.name else f", which {name} would be in"
            problem = f"{option}: there is no module {error.name!r}{where}"
            raise ConfigurationError([problem]) from None
        raise failed(option, f"importing {name}", error, settings) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the module may raise anything
        raise failed(option, f"importing {name}", error, settings) from None


def failed(option: str, step: str, error: BaseException, settings: Settings) -> ConfigurationError:
    """Return the error for a step that code of the application ended with ``error``."""
    text = Redaction(secrets_of(settings)).text(in_one_line(error))
    return ConfigurationError([f"{option}: {step} failed: {text}"])


def in_one_line(error: BaseException) -> str:
    """Return the error that code of the application raised, with its file and line."""
    error, place = origin_of(error, _PACKAGES)
    kind = "" if isinstance(error, ViralFXError) else f"{type(error).__name__}: "
    what = error.msg if isinstance(error, SyntaxError) else error
    return located(" ".join(f"{kind}{what}".split()), place)


def of_code(error: ConfigurationError) -> ConfigurationError:
    """Return the error with the line that made the plugin, for problems of its arguments."""
    _, place = origin_of(error, _PACKAGES)
    return ConfigurationError(
        located(problem, place) if problem.startswith("Operations") else problem
        for problem in error.problems
    )
