"""Loads the modules of TASK_MODULES, and gathers the tasks that are in force."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType

from viralfx.adapters.codec import MsgspecCodec
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.jobs.tasks import Task, TaskRegistry, declared_task
from viralfx.settings import Settings
from viralfx.telemetry.redaction import Redaction, secrets_of


def load_tasks(settings: Settings) -> tuple[list[Task], list[str]]:
    """Import TASK_MODULES; return the tasks that they declare or import, and what went wrong."""
    tasks: list[Task] = []
    problems: list[str] = []
    for name in settings.task_modules:
        try:
            module = _import(name, settings)
        except ConfigurationError as error:
            problems += error.problems
            continue
        found = [task for value in vars(module).values() if (task := declared_task(value))]
        if not found:
            problems.append(
                f"TASK_MODULES: {name} declares no task; put @task('...') on an async def in it"
            )
        tasks += found
    return tasks, problems


def declared_tasks(functions: Sequence[object]) -> tuple[list[Task], list[str]]:
    """Return the tasks of an application's own functions, and what went wrong."""
    tasks: list[Task] = []
    problems: list[str] = []
    for function in functions:
        task = declared_task(function)
        if task is None:
            problems.append(
                f"OperationsConfig.tasks: {function!r} is no task; put @task('...') on it"
            )
        else:
            tasks.append(task)
    return tasks, problems


def registry_of(
    own: Iterable[Task], built_in: Iterable[Task], queues: Sequence[str], codec: MsgspecCodec
) -> tuple[TaskRegistry, list[str]]:
    """Register tasks; return what is wrong with them, too.

    A built-in task whose queue is none of ``queues`` goes to the first of them.
    """
    registry = TaskRegistry(
        task if task.queue in queues else replace(task, queue=queues[0]) for task in built_in
    )
    problems: list[str] = []
    for task in own:
        problems += _problems_of(task, queues, codec)
        try:
            registry.add(task)
        except ValueError as error:
            problems.append(f"@task({task.name!r}): {error} ({_where(task)})")
    return registry, problems


def _problems_of(task: Task, queues: Collection[str], codec: MsgspecCodec) -> Iterator[str]:
    if task.queue not in queues:
        close = difflib.get_close_matches(task.queue, queues, n=1)
        hint = f"did you mean {close[0]}?" if close else f"QUEUES has {', '.join(queues)}"
        yield f"@task({task.name!r}): there is no queue named {task.queue!r}; {hint}"
    try:
        codec.learn(task.payload_type)
    except TypeError as error:
        yield f"@task({task.name!r}): its payload has no JSON: {error}"


def _where(task: Task) -> str:
    return f"{task.function.__module__}.{task.function.__qualname__}"


def _import(name: str, settings: Settings) -> ModuleType:
    # As for --app: a module in the current folder can be named.
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ConfigurationError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigurationError([_missing(name, error.name)]) from None
        raise _failed(name, error, settings) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a module does at import
        raise _failed(name, error, settings) from None


def _missing(name: str, missing: str) -> str:
    return f"TASK_MODULES: there is no module {missing!r}" + (
        "" if name == missing else f", which {name} would be in"
    )


def _failed(name: str, error: BaseException, settings: Settings) -> ConfigurationError:
    return ConfigurationError(
        [f"TASK_MODULES: importing {name} failed: {in_one_line(error, settings)}"]
    )


def in_one_line(error: BaseException, settings: Settings) -> str:
    """Say what somebody else's code raised, and where, without the secrets it may have quoted."""
    frames = traceback.extract_tb(error.__traceback__)
    last = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = f"{type(error).__name__}: {error}{last}"
    return Redaction(secrets_of(settings)).text(text).replace("\n", " ")
