"""Tests of log lines: one format for all libraries, and no harm from a broken stream."""

import contextvars
import io
import json
import logging
import logging.config
import re
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from litestar import Litestar
from litestar.logging.config import StructLoggingConfig
from tests.unit.doubles import BrokenError, observed
from tests.unit.unreadable import ERRORS, MuteExit

from viralfx.core.correlation import (
    bind_correlation_id,
    bind_user_id,
    correlated,
    current_correlation_id,
    current_user_id,
)
from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import Status, Transition
from viralfx.domain.shutdown import (
    Outcome,
    Phase,
    ShutdownTriggered,
    StageFinished,
    StageReport,
)
from viralfx.telemetry import EndedRequest, set_trace_source
from viralfx.telemetry.logging import handler as logs
from viralfx.telemetry.logging.events import HealthLog, log_shutdown
from viralfx.telemetry.logging.handler import LineHandler, configure_logging, enforce_logging
from viralfx.telemetry.logging.lines import VERBOSE, AccessLog, AccessRecord, JsonLines
from viralfx.telemetry.logging.redaction import Redaction

STARTED = datetime(2026, 1, 6, 12, tzinfo=UTC)


class Lines:
    """Captures log lines in memory."""

    def __init__(self, *, level: str = "verbose", console: bool = False) -> None:
        self.stream = io.StringIO()
        configure_logging(level=level, console=console, stream=self.stream)

    @property
    def raw(self) -> list[str]:
        """Return the written text."""
        return self.stream.getvalue().splitlines()

    @property
    def parsed(self) -> list[dict[str, Any]]:
        """The written lines, parsed."""
        return [json.loads(line) for line in self.raw]


# -- format ----------------------------------------------------------------------------------


def test_line_has_the_contracts_fields() -> None:
    """A line has timestamp, level, context, message, and the caller's fields; nothing else."""
    lines = Lines()
    logging.getLogger("viralfx.jobs").info("Job done", extra={"queue": "default", "duration": 12})
    (line,) = lines.parsed

    assert list(line) == ["timestamp", "level", "context", "message", "queue", "duration"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "context": "jobs",
        "message": "Job done",
        "queue": "default",
        "duration": 12,
    }


@pytest.mark.parametrize(
    ("level", "word"),
    [
        (logging.CRITICAL, "error"),
        (logging.ERROR, "error"),
        (logging.WARNING, "warn"),
        (logging.INFO, "info"),
        (logging.DEBUG, "debug"),
        (VERBOSE, "verbose"),
    ],
)
def test_levels_have_the_names_of_the_guide(level: int, word: str) -> None:
    """docs/operations.md names the levels."""
    lines = Lines()
    logging.getLogger("any").log(level, "x")

    assert [word] == [line["level"] for line in lines.parsed]


@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("error", ["error"]),
        ("warn", ["error", "warn"]),
        ("log", ["error", "warn", "info"]),
        ("debug", ["error", "warn", "info", "debug"]),
        ("verbose", ["error", "warn", "info", "debug", "verbose"]),
    ],
)
def test_level_is_the_minimum_that_is_written(level: str, words: list[str]) -> None:
    """``LOG_LEVEL`` drops the lines below it."""
    lines = Lines(level=level)
    for number in (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG, VERBOSE):
        logging.getLogger("any").log(number, "x")

    assert words == [line["level"] for line in lines.parsed]


def test_correlation_id_is_absent_outside_a_request() -> None:
    """Outside a request the field is missing, not null."""
    lines = Lines()
    logging.getLogger("any").info("outside")
    with correlated("order-1"):
        logging.getLogger("any").info("inside")
    outside, inside = lines.parsed

    assert "correlationId" not in outside
    assert inside["correlationId"] == "order-1"


def test_lines_of_other_libraries_have_the_same_format() -> None:
    """Standard loggers and their arguments produce ordinary lines."""
    lines = Lines()
    logging.getLogger("another.library").warning("%s of %d", "two", 3)
    (line,) = lines.parsed

    assert (line["context"], line["message"]) == ("another.library", "two of 3")


def test_one_record_is_one_line() -> None:
    """Newlines and control characters in values do not start a second line."""
    lines = Lines()
    hostile = 'a\nb\r\n{"level":"error"}\x1b[31m\u2028\ud800'
    logging.getLogger("any").info("%s", hostile, extra={"value": hostile})
    (line,) = lines.parsed

    assert (hostile, hostile) == (line["message"], line["value"])
    assert lines.stream.getvalue().count("\n") == 1
    assert lines.stream.getvalue().isascii()


def test_value_that_json_cannot_express_is_written_as_text() -> None:
    """An unusual value does not fail the line."""
    lines = Lines()
    logging.getLogger("any").info("x", extra={"odd": {1}, "kind": Status.PASS})
    (line,) = lines.parsed

    assert (line["odd"], line["kind"]) == ("{1}", "pass")


def _fail(secret: str) -> None:
    raise BrokenError(f"{len(secret)} characters")


class _Mute:
    """Raises in its repr, like a mapped object whose session is gone."""

    def __repr__(self) -> str:
        raise RuntimeError("planted")


def _deep(times: int) -> object:
    value: object = None
    for _ in range(times):
        value = [value]
    return value


@pytest.mark.parametrize("value", [_Mute(), [_Mute()]], ids=["alone", "in a list"])
def test_value_without_repr_does_not_lose_the_line(value: object) -> None:
    """The line names its class and has all other fields, also if it is the message itself."""
    lines = Lines()
    logging.getLogger("any").warning("x", extra={"odd": value, "order": 1})
    logging.getLogger("any").warning(value)
    line, message = lines.parsed

    assert "_Mute object at" in line["odd"] or line["odd"].startswith("<list object at")
    assert (line["message"], line["order"]) == ("x", 1)
    assert " object at " in message["message"]


def test_line_that_cannot_be_rendered_is_counted(tmp_path: Path) -> None:
    """It counts as lost and is reported with the next line."""

    def render(record: logging.LogRecord) -> bytes:
        if record.msg == "never":
            raise RuntimeError("planted")
        return f"{record.getMessage()} {vars(record).get('lost', '')}\n".encode()

    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        handler = LineHandler(render, file, threaded=True)
        for message in ("never", "never", "after"):
            handler.handle(logging.LogRecord("any", logging.INFO, "", 0, message, (), None))
        handler.close()

    assert (tmp_path / "log").read_text(encoding="utf-8") == "after \nLog lines were lost 2\n"


def test_exception_is_structured_and_without_locals() -> None:
    """It has type, text and frames, but no local variables, which may hold any data."""
    lines = Lines()
    token = "hunter2"
    try:
        _fail(token)
    except BrokenError:
        logging.getLogger("any").exception("It broke")
    (line,) = lines.parsed
    (exception,) = line["exception"]

    assert line["message"] == "It broke"
    assert (exception["exc_type"], exception["exc_value"]) == ("BrokenError", "7 characters")
    assert exception["frames"]
    assert "hunter2" not in lines.raw[0]
    assert "exc_info" not in line


def test_console_lines_are_readable() -> None:
    """The console format has the same content."""
    lines = Lines(console=True)
    with correlated("order-1"):
        logging.getLogger("viralfx.jobs").warning("Job slow", extra={"queue": "default"})
    (text,) = lines.raw

    assert all(part in text for part in ("warn", "jobs", "Job slow", "default", "order-1"))
    assert not text.startswith("{")
    assert "\x1b" not in text


def test_console_shows_stacks_as_lists_or_text() -> None:
    """The stack of a blocked loop is a list of frames; other errors may be text."""
    lines = Lines(console=True)
    extra = {"stack": ["first frame", "second frame"], "exception": "an error as text"}
    logging.getLogger("viralfx.loop").warning("Event loop is blocked", extra=extra)
    logging.getLogger("any").warning("x", extra={"stack": 7, "exception": ["one", "two", _Mute()]})

    assert "Event loop is blocked" in lines.raw[0]
    assert {"first frame", "second frame", "an error as text", "7", "one", "two"} <= set(lines.raw)


@pytest.mark.parametrize("value", [_Mute(), [_Mute()], 10**5000, _deep(20_000)], ids=range(4))
def test_console_writes_a_value_without_repr(value: object) -> None:
    """The line names its class, all other fields and the source of the error."""
    lines = Lines(console=True)
    try:
        _fail("")
    except BrokenError:
        logging.getLogger("any").exception("It broke", extra={"odd": value, "order": "o-1"})

    assert all(part in lines.raw[0] for part in ("It broke", "o-1", "odd"))
    assert "BrokenError" in lines.stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_console_escapes_what_a_terminal_interprets(
    *, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client cannot clear the screen, set colors or write another line by a value."""
    monkeypatch.setattr(logs, "_is_terminal", lambda _: terminal)
    lines = Lines(console=True)
    hostile = "\x1b[2J\x07\x9b1m\x85\u2028\r\x7f\u202e"
    shown = "\\x1b[2J\\x07\\x9b1m\\x85\\u2028\\r\\x7f\\u202e"

    class Odd:
        def __repr__(self) -> str:
            return hostile

    names = ("word", "phrase", "items", "odd")
    values = (hostile, f"a {hostile}\nb='c'", [hostile], Odd())
    extra = dict(zip(names, values, strict=True))
    error = (BrokenError, BrokenError(hostile), None)
    record = logging.LogRecord(f"any{hostile}", 40, "", 0, "%s\tx\ny", (hostile,), error)
    vars(record).update(extra)
    logging.root.handle(record)
    logging.getLogger("any").info("x", extra={"stack": [hostile], "exception": hostile})
    text = re.sub(r"\x1b\[[0-9]*m", "", lines.stream.getvalue())

    for each in (f"{shown}\tx\ny", f"any{shown}]", f"word='{shown}'", f"items=['{shown}']"):
        assert each in text
    assert f"phrase={values[1]!r}" in text
    assert f"odd={shown}" in text
    assert text.count(f"BrokenError: {shown}\n") == 1
    assert text.endswith(f"\n{shown}\n\n{'=' * 79}\n\n{shown}\n")
    assert [c for c in text if not c.isprintable() and c not in "\n\t"] == []


def test_other_logging_configurations_are_overridden(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """This holds for ``dictConfig`` and handlers set by hand; additional handlers may stay."""
    monkeypatch.setattr(logging.config, "dictConfigClass", logging.config.DictConfigurator)
    reinstall = enforce_logging(level="log", console=False, redaction=Redaction(["planted-secret"]))
    any_logger, root = logging.getLogger("any"), logging.getLogger()
    Litestar()
    any_logger.info("1 planted-secret")
    logging.getLogger("litestar").info("2")
    any_logger.debug("too much")
    logging.config.dictConfig({"version": 1, "root": {"level": "ERROR"}})
    any_logger.info("3")
    root.handlers[0].flush()
    root.handlers[:] = [logging.NullHandler()]
    any_logger.disabled = True
    any_logger.info("nowhere")
    reinstall()
    any_logger.info("4")
    root.addHandler(other := logging.NullHandler())
    reinstall()
    any_logger.info("5")
    assert other in root.handlers
    root.handlers[0].flush()

    out, err = capfd.readouterr()
    assert [json.loads(line)["message"] for line in out.splitlines()] == ["1 ***", *"2345"]
    assert err == ""


def test_structlog_events_are_ordinary_lines(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By default structlog prints them without redaction."""
    monkeypatch.setattr(logging.config, "dictConfigClass", logging.config.DictConfigurator)
    reinstall = enforce_logging(level="log", console=False, redaction=Redaction(["planted-secret"]))
    StructLoggingConfig().configure()
    reinstall()
    logger = structlog.get_logger().bind(order="o-1")
    with correlated("order-1"):
        logger.info("paid %s", "planted-secret", name="alice", message="m", event_type="x")
        logger.msg("logged", amount=1.5)
        logger.debug("too much")
        try:
            _fail("")
        except BrokenError:
            logger.exception("broke")
    logging.getLogger().handlers[0].flush()
    structlog.reset_defaults()

    out, err = capfd.readouterr()
    first, second, third = map(json.loads, out.splitlines())
    assert first.pop("timestamp")
    assert first == {
        "level": "info",
        "context": __name__,
        "message": "paid ***",
        "correlationId": "order-1",
        "order": "o-1",
        "name_": "alice",
        "message_": "m",
        "event_type": "x",
    }
    assert (second["message"], second["amount"]) == ("logged", 1.5)
    assert (third["level"], third["exception"][0]["exc_type"]) == ("error", "BrokenError")
    assert err == ""


def test_configuring_twice_writes_once() -> None:
    """Only the last configuration is in force."""
    first, second = Lines(), Lines()
    logging.getLogger("any").info("x")

    assert (len(first.raw), len(second.raw)) == (0, 1)


def test_info_lines_of_the_server_are_dropped() -> None:
    """The lifecycle logs start and stop; the server's errors are logged."""
    lines = Lines()
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").error("Exception in ASGI application")

    assert [line["message"] for line in lines.parsed] == ["Exception in ASGI application"]


@pytest.mark.parametrize("console", [False, True])
def test_trailing_newlines_of_messages_are_removed(*, console: bool) -> None:
    """Some messages of uvicorn end with a newline."""
    lines = Lines(console=console)
    logging.getLogger("any").error("Exception in %s\n", "ASGI\r\n")

    (line,) = lines.raw
    if not console:
        assert json.loads(line)["message"] == "Exception in ASGI"


# -- failing streams -------------------------------------------------------------------------


class _FailingStream(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def write(self, _: str) -> int:
        raise self._error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left")], ids=str)
def test_failing_stream_does_not_fail_the_caller(
    error: OSError, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk or a closed reader costs the line, not the request."""
    configure_logging(level="log", console=False, stream=_FailingStream(error))
    logging.getLogger("any").info("x")

    assert capsys.readouterr() == ("", "")


def test_closed_stream_does_not_fail_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    """Logging after standard output was closed raises nothing."""
    lines = Lines()
    lines.stream.close()
    logging.getLogger("any").info("x")

    assert capsys.readouterr() == ("", "")


# -- the domain's events ---------------------------------------------------------------------


def transition(new: Status, correlation_id: str) -> Transition:
    """Return a transition from pass."""
    return Transition(
        check="database",
        old=Status.PASS,
        new=new,
        code=None if new is Status.PASS else "error",
        message="database check failed",
        at=STARTED,
        correlation_id=correlation_id,
    )


def completed(correlation_id: str, error: BaseException | None = None) -> CheckCompleted:
    """Return a completed attempt."""
    return CheckCompleted(
        check="database",
        observation=observed(Status.FAIL),
        response_time=0.1,
        correlation_id=correlation_id,
        error=error,
    )


def test_transition_is_one_line_with_its_cause() -> None:
    """The line has the attempt's id and the exception behind it."""
    lines, log = Lines(), HealthLog()
    log(completed("attempt-1", BrokenError("connection refused")))
    log(transition(Status.FAIL, "attempt-1"))
    (line,) = lines.parsed

    assert (
        line["level"],
        line["context"],
        line["message"],
    ) == ("error", "health", "Health check changed")
    assert (
        line["check"],
        line["old"],
        line["new"],
        line["correlationId"],
    ) == ("database", "pass", "fail", "attempt-1")
    assert line["exception"][0]["exc_value"] == "connection refused"


def test_attempts_without_transition_are_not_logged() -> None:
    """A check with an unchanged status writes no lines."""
    lines, log = Lines(), HealthLog()
    for number in range(100):
        log(completed(f"attempt-{number}", BrokenError("again")))

    assert lines.raw == []


def test_error_of_another_attempt_is_not_logged() -> None:
    """A transition without an error, such as a recovery, has no exception."""
    lines, log = Lines(), HealthLog()
    log(completed("attempt-1", BrokenError("old")))
    log(completed("attempt-2"))
    log(transition(Status.PASS, "attempt-2"))
    (line,) = lines.parsed

    assert (line["level"], "exception" in line) == ("info", False)


@pytest.mark.parametrize(
    ("new", "level"), [(Status.PASS, "info"), (Status.WARN, "warn"), (Status.FAIL, "error")]
)
def test_level_of_a_transition_is_its_severity(new: Status, level: str) -> None:
    """The new status determines the level."""
    lines = Lines()
    HealthLog()(transition(new, "attempt-1"))

    assert [level] == [line["level"] for line in lines.parsed]


def _stage(outcome: Outcome, error: BaseException | None = None) -> StageFinished:
    report = StageReport(name="queues", outcome=outcome, duration=1.5, error=error)
    return StageFinished(phase=Phase.DRAIN, report=report, at=STARTED)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            lambda: ShutdownTriggered(reason="SIGTERM", deadline=STARTED, force_timeout=60.0),
            {"level": "info", "reason": "SIGTERM", "forceTimeout": 60000},
        ),
        (
            lambda: _stage(Outcome.OK),
            {"level": "info", "phase": "drain", "stage": "queues", "outcome": "ok"},
        ),
        (lambda: _stage(Outcome.TIMEOUT), {"level": "error", "outcome": "timeout"}),
        (
            lambda: _stage(Outcome.FAILED, BrokenError("x")),
            {"level": "error", "outcome": "failed", "duration": 1500},
        ),
    ],
    ids=["trigger", "ok", "timeout", "failed"],
)
def test_shutdown_is_logged_stage_by_stage(
    event: Callable[[], ShutdownTriggered | StageFinished], expected: dict[str, object]
) -> None:
    """The trigger and each stage have one line, in milliseconds; failed stages are errors."""
    lines = Lines()
    log_shutdown(event())
    (line,) = lines.parsed

    assert expected == {key: line[key] for key in expected}


def test_added_fields_do_not_replace_standard_fields() -> None:
    """A caller's field with the name of a standard field is ignored."""
    lines = Lines()
    logging.getLogger("any").info("x", extra={"level": "fake", "timestamp": 1, "context": "fake"})
    (line,) = lines.parsed

    assert (line["level"], line["context"], line["message"]) == ("info", "any", "x")
    assert line["timestamp"].endswith("Z")


def test_number_that_json_cannot_express_is_text() -> None:
    """The line stays valid JSON."""
    lines = Lines()
    logging.getLogger("any").info("x", extra={"ratio": float("nan"), "count": 3})
    (line,) = lines.parsed

    assert (line["ratio"], line["count"]) == ("nan", 3)


@pytest.mark.parametrize(
    ("odd", "shown"),
    [
        ({"many": 10**5000}, "many"),
        ({("a", 1): "x"}, "('a', 1)"),
        ({_Mute(): "x"}, None),
        ({("a", 1): "x", "more": {_Mute()}}, "('a', 1)"),
    ],
    ids=["more digits than are written", "a name that is no text", "nor has one", "both"],
)
def test_odd_values_do_not_change_other_fields(odd: dict[Any, Any], shown: str | None) -> None:
    """Strings get no extra quotes; booleans, numbers and null stay as they are."""
    beside = {"order": "o-1", "kind": Status.PASS, "again": True, "count": 3, "none": None}
    lines = Lines()
    logging.getLogger("any").info("x", extra={**beside, **odd})
    (line,) = lines.parsed

    assert {name: line[name] for name in beside} == {**beside, "kind": "pass"}
    assert line["again"] is True
    assert any(name == shown if shown else " object at " in name for name in line)


def test_console_traceback_shows_no_local_variables() -> None:
    """The console shows the frames only."""
    lines = Lines(console=True)
    secret = "SECRET_PLANTED".lower()
    try:
        _fail(secret)
    except BrokenError:
        logging.getLogger("any").exception("x")

    assert "BrokenError" in lines.stream.getvalue()
    assert secret not in lines.stream.getvalue()


# -- ids, requests and lines of other libraries ----------------------------------------------


@pytest.fixture
def traced() -> Iterator[None]:
    """Set a current span for all lines."""
    set_trace_source(lambda: ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"))
    yield
    set_trace_source(None)


def in_a_request(work: Callable[[], None]) -> None:
    """Run a function with the context of a user's request."""

    def run() -> None:
        bind_correlation_id("order-1")
        bind_user_id('user "1"')
        work()

    contextvars.copy_context().run(run)


@pytest.mark.usefixtures("traced")
def test_ids_come_in_the_contracts_order() -> None:
    """Correlation, user, trace and span ids precede a caller's fields."""
    lines = Lines()
    in_a_request(lambda: logging.getLogger("viralfx.jobs").info("x", extra={"queue": "default"}))
    (line,) = lines.parsed

    assert list(line) == [
        "timestamp",
        "level",
        "context",
        "message",
        "correlationId",
        "userId",
        "traceId",
        "spanId",
        "queue",
    ]
    assert line["userId"] == 'user "1"'
    assert (line["traceId"], line["spanId"]) == (
        "4bf92f3577b34da6a3ce929d0e0e4736",
        "00f067aa0ba902b7",
    )


def answered(**more: Any) -> EndedRequest:
    """Return a finished request."""
    known: dict[str, Any] = {
        "at": 1764122463.1204,
        "correlation_id": current_correlation_id(),
        "user_id": current_user_id(),
        "trace": ("a" * 32, "b" * 16),
        "method": "GET",
        "route": "/orders/{order}",
        "status": 200,
        "seconds": 0.0123456,
        "received": 10,
        "sent": 12,
        "cut": False,
        **more,
    }
    return EndedRequest(**known)


REQUESTS = {
    "whole": {},
    "small": {"received": None, "trace": None},
    "cut": {"cut": True},
    "unanswered": {"status": None, "cut": True, "sent": 0},
    "websocket": {"method": "WEBSOCKET", "status": 101, "close_code": 4999},
    "odd": {"route": '/orders/{order:str}/"ä"\\', "status": None},
}


@pytest.mark.parametrize("more", REQUESTS.values(), ids=REQUESTS.keys())
def test_the_direct_path_renders_the_same_line(more: dict[str, Any]) -> None:
    """Rendering requests together equals rendering a record for each."""
    lines = JsonLines(Redaction(), lambda _: [])
    rendered: list[bytes] = []

    def both() -> None:
        request = answered(**more)
        rendered.append(lines.render(AccessRecord(request)))
        rendered.extend(lines.render_requests([request, copy(request)]).splitlines())

    in_a_request(both)
    ordinary, quick, again = (json.loads(line) for line in rendered)

    assert list(quick) == list(ordinary)
    assert quick == ordinary == again
    assert quick["duration"] == 12.345
    assert quick["message"].startswith(f"{quick['method']} /orders/{{order")
    assert ("status" in quick) == (more.get("status", 200) is not None)
    assert quick.get("closeCode") == more.get("close_code")


IDS = {
    "secret": "s3cret-of-ours",
    "secret_that_json_writes_otherwise": 'pa"ss\\word',
    "quotation_mark": 'a"b',
    "backslash": "a\\b",
    "line_end": "a\nb",
    "beyond_ascii": "Zoë\u2028",
    "half_a_character": "half a character: \ud800",
}


@pytest.mark.parametrize("user", IDS.values(), ids=IDS.keys())
def test_any_user_id_stays_on_one_line(user: str) -> None:
    """Unusual ids of users do not affect neighbouring lines."""
    secrets = [IDS["secret"], IDS["secret_that_json_writes_otherwise"]]
    lines = JsonLines(Redaction(secrets), lambda _: [])
    anonymous = answered(user_id=None, correlation_id=None)
    made: list[bytes] = []

    def make() -> None:
        requests = [answered(user_id=user), anonymous, answered(correlation_id=user, user_id=None)]
        made.append(lines.render_requests(requests))

    in_a_request(make)
    known, unknown, correlated = (json.loads(line) for line in made[0].splitlines())
    shown = "***" if user in secrets else user

    assert made[0].isascii()
    assert (known["correlationId"], known["userId"]) == ("order-1", shown)
    assert correlated["correlationId"] == shown
    assert {"userId", "correlationId"}.isdisjoint(unknown)
    assert "userId" not in correlated


@pytest.mark.parametrize("user", [b"bytes", ["a", "list"]], ids=["bytes", "list"])
def test_a_user_id_that_is_not_a_string_loses_no_line(user: Any) -> None:
    """An application may bind an undecoded header."""
    lines = JsonLines(Redaction(), lambda _: [])
    made = lines.render_requests([answered(), answered(user_id=user), answered()]).splitlines()

    assert len(made) == 3
    assert json.loads(made[1])["userId"]
    assert made[0] == made[2]


def test_an_odd_id_does_not_change_neighbouring_lines() -> None:
    """Each line equals the line without the odd one."""
    lines = JsonLines(Redaction(["s3cret"]), lambda _: [])
    others = [answered(correlation_id=f"id-{number}") for number in range(255)]
    odd = answered(correlation_id="of-s3cret")
    made = lines.render_requests([*others[:100], odd, *others[100:]]).splitlines()

    assert json.loads(made.pop(100))["correlationId"] == "of-***"
    assert made == lines.render_requests(others).splitlines()


def test_other_handlers_and_filters_get_records() -> None:
    """The direct path is only used if no other handler or filter exists."""
    seen: list[logging.LogRecord] = []
    configure_logging(level="log", console=False)
    access = logging.getLogger("viralfx.access")

    def examine(record: logging.LogRecord) -> bool:
        seen.append(record)
        return False

    access.addFilter(examine)
    try:
        AccessLog().write(answered(sent=1))
    finally:
        access.removeFilter(examine)
    (record,) = seen

    assert isinstance(record, AccessRecord)
    assert vars(record)["responseSize"] == 1


def test_another_handler_gets_whole_messages() -> None:
    """Its formatter may show the message alone; the lines of this package stay as they are."""
    written, shown = io.StringIO(), io.StringIO()
    configure_logging(
        level="log", console=False, stream=written, redaction=Redaction(["planted-secret"])
    )
    other = logging.StreamHandler(shown)
    logging.getLogger().addHandler(other)
    extra = {"check": "shop", "detail": "asked at planted-secret"}
    try:
        for name in ("viralfx.health", "viralfx.access", "shop"):
            logging.getLogger(name).warning("Changed", extra=extra)
    finally:
        logging.getLogger().removeHandler(other)

    assert shown.getvalue().splitlines() == [
        "Changed: check=shop, detail=asked at ***",
        "Changed",
        "Changed",
    ]
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [(line["message"], line["check"]) for line in lines] == [("Changed", "shop")] * 3


def test_the_handlers_level_applies_to_requests(capfd: pytest.CaptureFixture[str]) -> None:
    """The direct path respects it."""
    configure_logging(level="log", console=False)
    (handler,) = logging.getLogger().handlers
    AccessLog().write(answered(route="/before"))
    handler.setLevel(logging.ERROR)
    AccessLog().write(answered(route="/after"))
    handler.close()
    written = capfd.readouterr().out

    assert "/before" in written
    assert "/after" not in written


def test_the_handlers_filters_apply() -> None:
    """Filters may drop or replace records, as applications do to add fields."""
    lines = Lines()

    def examine(record: logging.LogRecord) -> bool:
        record.tenant = "acme"
        return record.name != "noise"

    logging.getLogger().handlers[0].addFilter(examine)
    logging.getLogger("noise").info("left out")
    logging.getLogger("any").info("kept")

    assert [(line["message"], line["tenant"]) for line in lines.parsed] == [("kept", "acme")]


def test_the_record_of_a_request_is_complete() -> None:
    """It has every attribute of an ordinary ``LogRecord``."""
    ordinary = vars(logging.LogRecord("x", logging.INFO, "", 0, "m", (), None))
    record = AccessRecord(answered())
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s").format(record)

    assert ordinary.keys() <= vars(record).keys()
    assert text.endswith("INFO viralfx.access GET /orders/{order} 200")


def test_python_warnings_are_log_lines() -> None:
    """They do not go to standard error as text."""
    lines = Lines()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logs._show_warning
        warnings.warn("planted", UserWarning, stacklevel=1)
    (line,) = lines.parsed

    assert (line["level"], line["context"], line["message"]) == ("warn", "warnings", "planted")
    assert line["category"] == "UserWarning"


def test_a_message_with_wrong_arguments_is_logged_without_them() -> None:
    """A caller's mistake costs the arguments, not the line."""
    lines = Lines()
    logging.getLogger("any").warning("%d apples", "two")

    assert [line["message"] for line in lines.parsed] == ["%d apples"]


def test_bytes_are_written_as_redactable_text() -> None:
    """They are not encoded in base64."""
    stream = io.StringIO()
    redaction = Redaction(["planted-secret"])
    configure_logging(level="log", console=False, stream=stream, redaction=redaction)
    logging.getLogger("any").info("x", extra={"raw": b"a planted-secret", "deep": {"b": b"c"}})

    assert json.loads(stream.getvalue())["raw"] == "b'a ***'"


@pytest.mark.parametrize("console", [False, True], ids=["json", "console"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_the_code_of_an_error_cannot_raise_through_the_log(
    error: Callable[[], BaseException], *, console: bool
) -> None:
    """Its line is written, or lost, but the caller goes on."""
    stream = io.StringIO()
    configure_logging(level="log", console=console, stream=stream, interruptible=False)
    log = logging.getLogger("viralfx.jobs")
    log.error("Job failed", exc_info=error(), extra={"code": "error"})
    log.error("Job failed: %s %s", error(), 1, extra={"value": error()})
    log.info("Then another")

    lines = stream.getvalue().splitlines()
    assert "Then another" in lines[-1]
    if not (console or error is MuteExit):
        assert [json.loads(each)["message"][:10] for each in lines[:2]] == ["Job failed"] * 2


def test_an_interrupt_that_may_be_a_signal_reaches_the_caller() -> None:
    """As in a command that SIGINT ends."""
    lines = Lines()
    with pytest.raises(KeyboardInterrupt):
        logging.getLogger("viralfx.jobs").error("Job failed", exc_info=MuteExit())
    assert lines.raw == []
