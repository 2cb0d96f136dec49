"""Messages and errors of taskiq in jobs: nothing is changed on the way, and no code is run."""

import traceback
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.taskiq.messages import (
    job_id_of,
    json_of,
    message_of,
    payload_of,
    result_of,
    type_and_text,
)
from viralfx.core.ids import is_job_id
from viralfx.jobs.codec import ResultError
from viralfx.jobs.memory.ledger import new_job
from viralfx.jobs.model import Job, JobDraft, JobError, JobState

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CODEC = MsgspecCodec()


def failed_with(error: JobError | None, state: JobState = JobState.FAILED) -> Job:
    """Return a final job."""
    job = new_job(JobDraft(id="0" * 8, queue="default", task="t", payload=b"{}"), NOW)
    return replace(job, state=state, error=error)


@given(st.binary() | st.text().map(str.encode) | st.just(b'{"task_id": "a", "args": []}'))
def test_every_message_survives_as_json(message: bytes) -> None:
    """Of any serializer: the payload is JSON, and the message is the same."""
    payload = payload_of(message, "an id of taskiq")
    CODEC.decode(payload, Any)

    assert message_of(payload, "t", job_id_of("an id of taskiq"), {}) == message


@given(st.text())
def test_every_text_is_a_task_id(text: str) -> None:
    """The id of its job does not depend on the process, and that of a UUID is the UUID."""
    try:
        job_id = job_id_of(text)
    except UnicodeEncodeError:
        return

    assert is_job_id(job_id)
    assert job_id_of(job_id) == job_id == job_id_of(job_id.replace("-", "").upper())


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("too few"), ValueError, "too few"),
        (ValueError(), ValueError, ""),
        (KeyError("number"), KeyError, "'number'"),
        (OSError(2, "no such file"), OSError, "[Errno 2] no such file"),
        (ResultError("a: b"), ResultError, "a: b"),
        (SystemExit(3), Exception, "3"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_an_error_keeps_type_and_text(
    error: BaseException, kind: type[Exception], text: str
) -> None:
    """If this process has its class, and it is one of ``Exception``."""
    job = failed_with(JobError(code="error", message=type_and_text(error)))

    restored = result_of(job, {}).error

    assert isinstance(restored, kind)
    assert type(restored).__name__ == type(error).__name__
    assert str(restored) == text


class CodeError(Exception):
    """An error whose text needs its constructor."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        """Return a text of the code."""
        return f"the code is {self.code:d}"


@pytest.mark.parametrize(
    "error",
    [
        IntegrityError("INSERT", {}, Exception("duplicate key")),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        SyntaxError("bad", ("f", 1, 2, "x")),
        CodeError(5),
    ],
    ids=lambda each: type(each).__name__,
)
def test_an_error_that_needs_its_constructor_keeps_type_and_text(error: Exception) -> None:
    """Its text, its repr and its traceback can be written."""
    message = type_and_text(error)
    job = failed_with(JobError(code="error", message=message))

    restored = result_of(job, {}).error

    assert isinstance(restored, type(error))
    assert type_and_text(restored) == message
    assert message.endswith(str(restored) or "no text")
    assert str(restored) in repr(restored)
    assert str(restored) in "".join(traceback.format_exception_only(restored))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (JobError(code="error", message="os.system: rm -rf /"), "rm -rf /"),
        (JobError(code="error", message="it is no name: or is it"), "it is no name: or is it"),
        (JobError(code="error", message="pydantic_core.ValidationError: x"), None),
        (JobError(code="timeout", message="after 5 s"), "after 5 s"),
        (JobError(code="crashed", message="5 leases"), "crashed: 5 leases"),
        (None, "the job was cancelled"),
    ],
)
def test_any_other_error_is_an_exception(error: JobError | None, text: str | None) -> None:
    """No function of its name is called, and no class is made that cannot be."""
    state = JobState.CANCELLED if error is None else JobState.FAILED

    restored = result_of(failed_with(error, state), {}).error

    assert isinstance(restored, Exception)
    assert text is None or str(restored) == text


def test_values_that_have_no_json_are_errors() -> None:
    """Of the result, not of the program."""
    with pytest.raises(ResultError, match="object has no JSON"):
        json_of(object())
