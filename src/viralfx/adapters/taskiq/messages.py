"""taskiq's messages, results, errors and progress in the rows of their jobs (ADR-0058).

The messages of job notifications are here, too.
"""

import base64
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast
from uuid import UUID, uuid5

import msgspec
from pydantic import TypeAdapter
from taskiq import TaskiqMessage, TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress, TaskState
from taskiq.labels import prepare_label
from taskiq_dependencies import DependencyGraph

from viralfx.core.errors import ViralFXError
from viralfx.jobs.codec import Progress, ResultError, is_in_range
from viralfx.jobs.model import Job, JobError, JobState
from viralfx.jobs.notifier import JobNotification

MAX_PROGRESS_CHARACTERS = 10_000
"""The JSON of a progress of taskiq."""

_IDS_OF_OTHER_TASKS = UUID("0f6d1d5c-5c8e-4d53-9a53-4d8f0f3f6f0b")


class JobNotCompletedError(ViralFXError):
    """A job did not complete for another reason than an error of its task: see ``code``."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class MessageError(ValueError):
    """A message cannot be a job; the message of the error says why."""


# -- messages ------------------------------------------------------------------------------------


def job_id_of(task_id: str) -> str:
    """Return the id of a task's job: the same UUID, or one that is derived from another text."""
    try:
        return str(UUID(task_id))
    except ValueError:
        return str(uuid5(_IDS_OF_OTHER_TASKS, task_id))


class _Stored(msgspec.Struct):
    """A payload that the broker stored: a message in JSON, or the Base64 of another one."""

    task_id: str
    task_name: str | None = None
    base64: str | None = None


def payload_of(message: bytes, task_id: str) -> bytes:
    """Return a message as a job's payload: in JSON as it is, other bytes as Base64."""
    try:
        stored = msgspec.json.decode(message, type=_Stored)
        if stored.task_id == task_id and stored.task_name is not None:
            message.decode()
            return message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    encoded = base64.b64encode(message).decode()
    return msgspec.json.encode({"task_id": task_id, "base64": encoded})


class Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """A payload that is submitted without taskiq: the arguments alone."""

    args: list[Any] = []
    kwargs: dict[str, Any] = {}


def message_of(
    payload: bytes, task: str, job_id: str, labels: Mapping[str, Any]
) -> bytes | TaskiqMessage:
    """Return the message of a job; a new one, with the task's labels, for arguments alone.

    A serializer such as pickle runs code of the bytes that it decodes. So bytes are returned only
    if the payload names the id of its own job: the broker alone chooses ids, and the id of a job
    from the API or the SQL function is random and is not known before its payload.

    Raises :class:`MessageError`.
    """
    with suppress(msgspec.MsgspecError):
        stored = msgspec.json.decode(payload, type=_Stored)
        if job_id_of(stored.task_id) == job_id:
            return payload if stored.base64 is None else base64.b64decode(stored.base64)
    try:
        call = msgspec.json.decode(payload, type=Arguments)
    except msgspec.MsgspecError as error:
        raise MessageError(
            f"the payload is no message of taskiq to this job, nor an object with args and kwargs:"
            f" {error}"
        ) from None
    # These are classes, which taskiq does not send either.
    sent = {name: prepare_label(labels[name]) for name in labels if name != "types_of_exceptions"}
    return TaskiqMessage(
        task_id=job_id,
        task_name=task,
        labels={name: label for name, (label, _) in sent.items()},
        labels_types={name: type_ for name, (_, type_) in sent.items()},
        args=call.args,
        kwargs=call.kwargs,
    )


def arguments_type(task: str, function: Callable[..., Any]) -> type[Arguments]:
    """Return the type of a task's payloads: arguments that ``function`` can be called with."""
    signature: list[inspect.Signature] = []

    def check(given: Arguments) -> None:
        if not signature:
            signature.append(_signature(function))
        signature[0].bind(*given.args, **given.kwargs)

    made = msgspec.defstruct(
        f"{task}.Arguments", [], bases=(Arguments,), namespace={"__post_init__": check}
    )
    return cast("type[Arguments]", made)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function without the dependencies that taskiq injects."""
    # Not at the declaration: the names in annotations may be defined later.
    try:
        signature = inspect.signature(function)
        dependencies = DependencyGraph(function).dependencies
    except Exception:  # noqa: BLE001 - of annotations; taskiq reports it when the task runs
        return inspect.signature(lambda *_, **__: None)
    injected = {each.param_name for each in next(iter(dependencies.values()), [])}
    return signature.replace(
        parameters=[each for name, each in signature.parameters.items() if name not in injected]
    )


# -- results -------------------------------------------------------------------------------------

_any: TypeAdapter[Any] = TypeAdapter(Any)


def json_of(value: object) -> msgspec.Raw:
    """Return a return value as JSON, as taskiq does. Raises :class:`ResultError`."""
    try:
        return msgspec.Raw(_any.dump_json(value))
    except Exception as error:  # noqa: BLE001 - an object's own code may raise anything
        raise ResultError(f"{type(value).__name__} has no JSON: {error}") from None


def result_of(job: Job, labels: Mapping[str, Any]) -> TaskiqResult[Any]:
    """Return the result of a final job; ``labels`` are those of its message."""
    seconds = 0.0
    if job.started_at is not None and job.finished_at is not None:
        seconds = round((job.finished_at - job.started_at).total_seconds(), 2)
    completed = job.state is JobState.COMPLETED
    return TaskiqResult(
        is_err=not completed,
        return_value=None if job.result is None else msgspec.json.decode(job.result),
        execution_time=seconds,
        labels=dict(labels),
        error=None if completed else _error_of(job),
    )


def _error_of(job: Job) -> Exception:
    if job.error is None or job.state is JobState.CANCELLED:
        return JobNotCompletedError(str(job.state), f"the job was {job.state}")
    if job.error.code == "timeout":
        return TimeoutError(job.error.message)
    if job.error.code not in ("error", "discarded"):
        return JobNotCompletedError(job.error.code, f"{job.error.code}: {job.error.message}")
    return _restored(job.error)


def type_and_text(error: BaseException) -> str:
    """Return type and text of an error, as the last line of a traceback does."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    match error.args:
        case (str(text),):
            pass
        case _:
            text = str(error)
    return f"{name}: {text}" if text else name


def _restored(error: JobError) -> Exception:
    """Return an exception of the same type, if this process has it; runs no constructor."""
    name, _, text = error.message.partition(": ")
    kind = _type_named(name)
    if kind is None:
        if not all(map(str.isidentifier, name.replace(".<locals>", "").split("."))):
            return JobNotCompletedError(error.code, error.message)
        kind = type(name.rpartition(".")[2], (Exception,), {})
    try:
        made = kind.__new__(kind, *([text] if text else []))
        if _shows(made, text):
            return made
        # Its own __str__ needs what the constructor would have set, such as the position of a
        # byte, so that the text would be lost.
        members = _members_showing(kind, text)
        shown = cast("type[Exception]", type(kind.__name__, (kind,), members))
        return shown.__new__(shown, *([text] if text else []))
    except Exception:  # noqa: BLE001 - of a class that cannot be made, or not be a base of another
        return JobNotCompletedError(error.code, error.message)


def _shows(made: Exception, text: str) -> bool:
    if isinstance(made, KeyError):
        return True  # it shows the repr of the text
    try:
        return text in str(made)
    except Exception:  # noqa: BLE001 - any is the answer
        return False


def _members_showing(kind: type[Exception], text: str) -> dict[str, Any]:
    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__str__": lambda _: text,
        "__repr__": lambda _: f"{kind.__name__}({text!r})",
    }
    # A traceback shows this attribute of a SyntaxError.
    return members | {"msg": text} if issubclass(kind, SyntaxError) else members


def _type_named(name: str) -> type[Exception] | None:
    module, _, rest = name.rpartition(".")
    names = [rest]
    while module and module not in sys.modules:
        module, _, rest = module.rpartition(".")
        names.insert(0, rest)
    found: Any = sys.modules[module or "builtins"]
    for each in names:
        found = getattr(found, each, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


# -- progress ------------------------------------------------------------------------------------


class _Progress(msgspec.Struct):
    state: str
    meta: Any


def job_progress(progress: TaskProgress[Any]) -> Progress:
    """Return the progress of a job for one of taskiq; its message has state and ``meta``.

    Numbers ``current`` and ``total`` of ``meta`` are those of the job, unless it can have no such
    number. Raises ``ValueError`` if it is too long, and :class:`ResultError` if it has no JSON.
    """
    state = progress.state.value if isinstance(progress.state, TaskState) else progress.state
    meta = progress.meta
    text = state
    if meta is not None:
        text = bytes(json_of({"state": state, "meta": meta})).decode()
    if len(text) > MAX_PROGRESS_CHARACTERS:
        raise ValueError(f"a progress may have {MAX_PROGRESS_CHARACTERS} characters of JSON")
    current, total = (
        float(number)
        if isinstance(meta, Mapping)
        and isinstance(number := meta.get(name), int | float)
        and is_in_range(number)
        else None
        for name in ("current", "total")
    )
    return Progress(current, total, text)


def task_progress(job: Job) -> TaskProgress[Any] | None:
    """Return the progress of a job in taskiq's form; None without one."""
    if job.progress is None:
        return None
    message = msgspec.json.decode(job.progress)["message"] or ""
    try:
        found = msgspec.json.decode(message, type=_Progress)
    except msgspec.MsgspecError:
        return TaskProgress(state=message, meta=None)
    return TaskProgress(state=found.state, meta=found.meta)


def number_of(labels: Mapping[str, Any], label: str) -> float:
    """Return the value of a label, 0 without it; raises :class:`MessageError`."""
    try:
        number = float(labels.get(label) or 0)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise MessageError(f"the label {label} must be a number: {labels[label]!r}")
    return number


# -- notifications -------------------------------------------------------------------------------


class UnknownMessageError(Exception):
    """An entry of the stream is not a notification."""


class _Notification(msgspec.Struct, frozen=True):
    # Unknown fields are ignored: during a deployment a later release notifies older workers.
    ids: tuple[str, ...]


_encode_ids = msgspec.json.Encoder().encode
_decode_ids = msgspec.json.Decoder(_Notification).decode


def encode_notification(notification: JobNotification) -> bytes:
    """Return a notification as JSON, without its queue, which the stream's name holds."""
    return _encode_ids(_Notification(ids=tuple(notification.ids)))


def decode_notification(queue: str, data: bytes) -> JobNotification:
    """Return the notification that JSON holds. Raises :class:`UnknownMessageError`."""
    try:
        message = _decode_ids(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UnknownMessageError(str(error)) from None
    return JobNotification(queue=queue, ids=message.ids)
