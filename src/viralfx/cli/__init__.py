"""The command line. Each command imports only its own modules, so that a probe stays cheap."""

import argparse
import contextlib
import errno
import gc
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from viralfx.core.errors import ConfigurationError, StartupError
from viralfx.core.extras import require, require_modules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import datetime

    from viralfx.runner.signals import SignalWatch

EXIT_PROBE_FAILED = EXIT_PENDING = EXIT_OUTPUT = 1
EXIT_CONFIGURATION = 2
EXIT_STARTUP = 3
EXIT_INTERRUPTED = 130
_OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, which no lost line of errors changes."""
    if sys.stderr is None:  # its descriptor was closed; print would write to standard output
        sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # noqa: PTH123, SIM115 - until the process ends
    try:
        return _command(arguments)
    finally:  # also after an exit of argparse
        _flushed(sys.stderr)


def note(line: str) -> None:
    """Print a line to standard error. If it cannot be written, it is lost."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _flushed(stream: TextIO | None) -> OSError | None:
    """Flush a stream; return the error of one that cannot be written."""
    if stream is None:  # its descriptor was closed
        return None
    try:
        stream.flush()
    except OSError as error:
        # Leave nothing for the interpreter to flush, as its failure replaces the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def _command(arguments: Sequence[str] | None) -> int:
    if arguments is None:
        try:
            arguments = [os.fsencode(each).decode() for each in sys.argv[1:]]
        except UnicodeDecodeError:
            note("viralfx: an argument is not UTF-8")
            return EXIT_CONFIGURATION
    options = _parser().parse_args(arguments)
    serves = options.run in {_serve, _worker}
    if not serves:  # these unblock signals once they handle them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    code, unwritten = 0, None
    lines: Sequence[str] = ()
    try:
        code, lines = _run(options)
    except OSError as error:
        # A service prints nothing, and an error of the output names no file.
        if serves or error.filename is not None or error.errno not in _OUTPUT_ERRORS:
            raise
        unwritten = error
    for line in lines:
        note(f"viralfx: {line}")
    unwritten = _flushed(sys.stdout) or unwritten
    if unwritten is None or unwritten.errno == errno.EPIPE:  # its reader has gone, as head does
        return code
    note(f"viralfx: cannot write the output: {unwritten.strerror}")
    return code or EXIT_OUTPUT


def _run(options: argparse.Namespace) -> tuple[int, Sequence[str]]:
    """Run a command; return its exit code and the lines about its failure."""
    try:
        return options.run(options), ()
    except ConfigurationError as error:
        return EXIT_CONFIGURATION, error.problems
    except StartupError as error:
        return EXIT_STARTUP, (str(error),)
    except KeyboardInterrupt:
        import logging  # noqa: PLC0415 - a probe starts without it

        # Calls that the interrupt cut off may still fail. Their errors are no news.
        logging.getLogger("asyncio").disabled = True
        return EXIT_INTERRUPTED, ("interrupted",)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="viralfx",
        description="Runs the ViralFX backend, or any ASGI application in the same way.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser("serve", help="serve the HTTP API until a stop signal")
    serve.add_argument("--app", metavar="MODULE:NAME", help="an ASGI application of your own")
    serve.add_argument("--host", help="address to listen on (default: HOST)")
    serve.add_argument("--port", type=_port, help="port to listen on (default: PORT, or 3000)")
    serve.add_argument(
        "--worker",
        action=argparse.BooleanOptionalAction,
        help="also run jobs in this process, or do not (default: only if jobs are in memory)",
    )
    serve.set_defaults(run=_serve)

    worker = commands.add_parser("worker", help="run jobs until a stop signal")
    worker.add_argument(
        "--app",
        metavar="MODULE:NAME",
        help="an ASGI application whose tasks, dependencies and lifespan the jobs use, or a"
        " LedgerBroker",
    )
    worker.add_argument(
        "--queue",
        action="append",
        default=[],
        metavar="NAME",
        help="a queue to work on; may be given several times (default: all of QUEUES)",
    )
    worker.set_defaults(run=_worker)

    migrate = commands.add_parser(
        "migrate",
        help="apply the database migrations",
        description="Applies the database migrations. Concurrent runs wait up to 60 s for the first"
        " one, then exit with 3.",
    )
    migrate.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if migrations are pending"
    )
    migrate.set_defaults(run=_migrate)

    doctor = commands.add_parser(
        "doctor", help="check a deployment before it starts; exit 0 if no check fails"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.add_argument(
        "--app", metavar="MODULE:NAME", help="the application to check, as with serve"
    )
    doctor.set_defaults(run=_doctor)

    probe = commands.add_parser(
        "probe", help="probe a running service; exit 0 if the probe succeeds"
    )
    probe.add_argument("kind", choices=["live", "ready", "startup"])
    probe.add_argument(
        "--url", help="base URL of the service (default: this machine, MANAGEMENT_PORT or PORT)"
    )
    probe.add_argument(
        "--worker",
        action="store_true",
        help="probe `viralfx worker` at MANAGEMENT_PORT (default there: 3001)",
    )
    probe.add_argument(
        "--timeout", type=_seconds, default=2.0, help="timeout in seconds (default: 2)"
    )
    probe.add_argument(
        "--wait", type=_seconds, help="repeat the probe for this many seconds until it succeeds"
    )
    probe.add_argument(
        "--pid", type=int, help="with --wait: give up when the process with this id has ended"
    )
    probe.set_defaults(run=_probe)

    env = commands.add_parser("env", help="list every environment variable and its value")
    env.add_argument("--markdown", action="store_true", help="print a Markdown table")
    env.set_defaults(run=_env)
    _add_jobs(commands)
    _add_audit(commands)

    webhook_key = commands.add_parser(
        "webhook-key",
        help="print the key by which a receiver verifies its webhooks",
        description="Prints the key of one receiver, for its operator. The key is a secret.",
    )
    webhook_key.add_argument("url", help="address of the receiver, such as https://host/path")
    webhook_key.add_argument("--alerts", action="store_true", help="the key of alerts")
    webhook_key.set_defaults(run=_webhook_key)
    return parser


class _ShowVersion(argparse.Action):
    """Prints the version; ``action="version"`` would look it up for every command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from viralfx import __version__  # noqa: PLC0415

        print(f"{parser.prog} {__version__}")
        parser.exit()


def _add_jobs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "jobs",
        help="list, show, submit, retry, cancel and run jobs; list and pause queues and schedules",
        description="Works on the ledger in DATABASE_URL; no service needs to run.",
    )
    parser.set_defaults(run=_jobs)
    actions = parser.add_subparsers(required=True, metavar="action", dest="command")

    def action(name: str, what: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=what)
        added.add_argument("--json", action="store_true", help="print JSON, as the jobs API does")
        return added

    def add_filter(to: argparse.ArgumentParser) -> None:
        to.add_argument("--queue", metavar="NAME", help="only jobs of this queue")
        to.add_argument("--task", metavar="NAME", help="only jobs of this task")
        to.add_argument("--state", choices=_STATES, help="only jobs in this state")
        to.add_argument("--code", help="only jobs whose last error has this code")
        to.add_argument(
            "--before", type=_moment, metavar="TIME", help="only jobs that were accepted before"
        )

    listing = action("list", "list jobs, the newest first")
    add_filter(listing)
    listing.add_argument("--cursor", metavar="ID", type=_job_id, help="only jobs older than this")
    listing.add_argument(
        "--limit", type=_limit, default=20, metavar="N", help="the most jobs to list (default: 20)"
    )
    action("show", "show one job").add_argument("id", type=_job_id)
    for name, what in (
        ("retry", "run failed jobs again, by id or by a filter"),
        ("cancel", "cancel waiting and running jobs, by id or by a filter"),
    ):
        change = action(name, what)
        change.add_argument("id", nargs="*", type=_job_id)
        add_filter(change)
        change.add_argument(
            "--yes", action="store_true", help="change all jobs that match, without a question"
        )

    run = action("run", "run waiting jobs now, or the task of a schedule")
    of_run = run.add_mutually_exclusive_group(required=True)
    of_run.add_argument("id", nargs="*", default=[], type=_job_id)
    of_run.add_argument(
        "--schedule", metavar="TASK", help="submit a job as the schedule of this task does"
    )
    run.add_argument(
        "--app", metavar="MODULE:NAME", help="with --schedule: an application that declares it"
    )

    action("queues", "list the queues with the numbers of their jobs")
    pause = action("pause", "let no worker begin jobs of a queue, or skip the times of a schedule")
    pause.add_argument("--wait", action="store_true", help="return when no job of the queue runs")
    for change in (pause, action("resume", "end the pause of a queue or a schedule")):
        paused = change.add_mutually_exclusive_group(required=True)
        paused.add_argument("queue", metavar="QUEUE", nargs="?")
        paused.add_argument("--schedule", metavar="TASK", help="the schedule of this task")

    action("schedules", "list the schedules of tasks, with their last and next times")

    submit = action("submit", "submit a job")
    submit.add_argument("task", help="the name of the task")
    submit.add_argument("payload", help="JSON; - reads it from standard input")
    submit.add_argument(
        "--app", metavar="MODULE:NAME", help="an ASGI application that declares the task"
    )
    submit.add_argument(
        "--queue",
        metavar="NAME",
        help="its queue (default: that of the task); also for a task that is declared elsewhere,"
        " whose options of @task are not known",
    )
    submit.add_argument(
        "--max-attempts", type=_attempts, metavar="N", help="attempts, in place of those of @task"
    )
    submit.add_argument(
        "--key", type=_key, help="idempotency key: repeated, it returns the first job"
    )
    submit.add_argument(
        "--priority", type=_priority, metavar="N", help="of the due jobs, higher numbers run first"
    )
    submit.add_argument(
        "--unique",
        choices=["waiting", "unfinished"],
        help="submit nothing while such a job of the same task and payload exists",
    )
    submit.add_argument(
        "--run-at", type=_moment, metavar="TIME", help="when to run it: 2026-01-31T08:00:00+01:00"
    )


def _add_audit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "audit",
        help="show the audit trail: which caller did what, the latest first",
        description="Reads the audit trail in DATABASE_URL; no service needs to run.",
    )
    parser.add_argument(
        "--since",
        type=_since,
        metavar="TIME",
        help="only events from this time on: 2026-01-31T08:00:00Z, or 30m, 24h, 7d ago",
    )
    parser.add_argument("--actor", metavar="NAME", help="only events of this actor")
    parser.add_argument(
        "--action", type=_action, metavar="NAME", help="only events of this action: logger.level"
    )
    parser.add_argument("--cursor", metavar="ID", type=_job_id, help="only events older than this")
    parser.add_argument(
        "--limit", type=_limit, default=50, metavar="N", help="the most events (default: 50)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_audit)


def _action(text: str) -> str:
    from viralfx.domain.audit import Action  # noqa: PLC0415

    if text in {*Action}:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no action; there are {', '.join(Action)}")


_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def _since(text: str) -> "datetime":
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415

    if found := re.fullmatch(r"([0-9]{1,5})([mhd])", text, re.ASCII):
        return datetime.now(UTC) - timedelta(**{_UNITS[found[2]]: int(found[1])})
    return _moment(text)


def _audit(options: argparse.Namespace) -> int:
    require_modules("viralfx audit", "postgres", "structlog")
    from viralfx.cli.audit import audit  # noqa: PLC0415

    return audit(options)


_STATES = ("waiting", "active", "completed", "failed", "cancelled")


def _limit(text: str) -> int:
    return _between(text, 1, 1000)


def _priority(text: str) -> int:
    from viralfx.jobs.model import MAX_PRIORITY, MIN_PRIORITY  # noqa: PLC0415

    return _between(text, MIN_PRIORITY, MAX_PRIORITY)


def _attempts(text: str) -> int:
    from viralfx.jobs.limits import MAX_ATTEMPTS  # noqa: PLC0415

    return _between(text, 1, MAX_ATTEMPTS)


def _between(text: str, least: int, most: int, what: str = "number") -> int:
    with contextlib.suppress(ValueError):  # int refuses more than some thousand digits
        if re.fullmatch(r"-?\d+", text, re.ASCII) and least <= int(text) <= most:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {least} to {most}")


def _key(text: str) -> str:
    from viralfx.core.keys import stored_key  # noqa: PLC0415

    if not text:
        raise argparse.ArgumentTypeError("an idempotency key is not empty; leave the option out")
    try:
        stored_key(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _job_id(text: str) -> str:
    from viralfx.core.ids import is_job_id  # noqa: PLC0415

    if not is_job_id(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a job")
    return text


def _moment(text: str) -> "datetime":
    from datetime import UTC, datetime  # noqa: PLC0415

    from viralfx.jobs.limits import FIRST_RUN_AT, LAST_RUN_AT  # noqa: PLC0415

    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None and FIRST_RUN_AT <= moment <= LAST_RUN_AT:
            return moment.astimezone(UTC)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a time with a time zone, such as 2026-01-31T08:00:00Z,"
        f" from {FIRST_RUN_AT.date()} to {LAST_RUN_AT.date()}"
    )


def _jobs(options: argparse.Namespace) -> int:
    require_modules("viralfx jobs", "postgres", "structlog")
    from viralfx.cli.jobs import jobs  # noqa: PLC0415

    return jobs(options)


def _port(text: str) -> int:
    return _between(text, 0, 65535, "whole number")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < 3600:  # noqa: PLR2004
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def _serve(options: argparse.Namespace) -> int:
    framework = ("litestar",) if options.app is None else ()  # an application brings its own
    with _starting("viralfx serve", *framework, app=options.app) as signals:
        from viralfx.runner.commands import serve  # noqa: PLC0415

        return serve(
            signals, app=options.app, host=options.host, port=options.port, worker=options.worker
        )


def _worker(options: argparse.Namespace) -> int:
    with _starting("viralfx worker", app=options.app) as signals:
        from viralfx.runner.commands import work  # noqa: PLC0415

        return work(signals, app=options.app, queues=options.queue)


@contextlib.contextmanager
def _starting(command: str, *extras: str, app: str | None) -> "Iterator[SignalWatch]":
    """Handle signals and do the slow imports."""
    from viralfx.runner.signals import SignalWatch  # noqa: PLC0415

    signals = SignalWatch()
    signals.install()  # before the slow imports
    require(command, "serve", *extras)
    from viralfx.settings.platform import require_memory  # noqa: PLC0415

    require_memory()

    # Garbage collection during imports finds nothing and takes a tenth of the start-up time. The
    # runner enables it again before it serves.
    gc.disable()
    try:
        from viralfx.telemetry import hide_packages  # noqa: PLC0415

        # structlog imports both if they are installed. An application may need them.
        with hide_packages("greenlet", "rich") if app is None else contextlib.nullcontext():
            import viralfx.runner.commands  # noqa: F401, PLC0415

        yield signals
    finally:
        gc.enable()


def _migrate(options: argparse.Namespace) -> int:
    import asyncio  # noqa: PLC0415
    import logging  # noqa: PLC0415

    require("viralfx migrate", "migrate")
    from viralfx.bootstrap.postgres import migrate_schema, schema_state  # noqa: PLC0415
    from viralfx.settings import read_settings  # noqa: PLC0415
    from viralfx.telemetry.logging.events import log_settings  # noqa: PLC0415
    from viralfx.telemetry.logging.handler import configure_logging  # noqa: PLC0415

    settings = read_settings(os.environ, strict=True)
    # The result goes to standard output, log lines for people to standard error. The last line
    # already names the cause of failed connection attempts.
    configure_logging(level="warn", console=True, stream=sys.stderr)
    logging.getLogger("viralfx.database").addFilter(lambda record: bool(record.exc_info))
    log_settings(settings)
    state = asyncio.run(schema_state(settings) if options.check else migrate_schema(settings))
    for revision, meaning in state.applied:
        print(f"applied {revision}: {meaning}")
    if state.newer:
        print(
            f"{state.address} is at {state.revision}, which a later version created; it is usable"
        )
    elif state.pending:
        pending = ", ".join(state.pending)
        note(f"{state.address} is behind: {pending} pending; run `viralfx migrate`")
        return EXIT_PENDING
    else:
        print(f"{state.address} is current at {state.revision}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    require("viralfx doctor", "serve")
    from viralfx.settings.platform import require_memory  # noqa: PLC0415

    require_memory()  # the doctor loads the same modules as the service
    from viralfx.cli.doctor import doctor  # noqa: PLC0415

    return doctor(app=options.app, as_json=options.json)


def _probe(options: argparse.Namespace) -> int:
    from viralfx.runner.probe import probe, probe_for  # noqa: PLC0415

    url = options.url
    if url is None:
        from viralfx.settings import read_settings  # noqa: PLC0415

        settings = read_settings(os.environ)
        given = settings.listen_host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(given, given)  # noqa: S104
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        port = settings.management_port or settings.port
        if options.worker:
            port = settings.worker_management_port
        url = f"http://{host}:{port}"
    if options.wait is None:
        passed, output = probe(options.kind, url, timeout=options.timeout)
    else:
        passed, output = probe_for(
            options.wait, options.kind, url, timeout=options.timeout, pid=options.pid
        )
    (print if passed else note)(output)
    return 0 if passed else EXIT_PROBE_FAILED


def _webhook_key(options: argparse.Namespace) -> int:
    from viralfx.domain.webhooks.signature import show_key  # noqa: PLC0415
    from viralfx.domain.webhooks.url import WebhookRefusedError, parse_destination  # noqa: PLC0415
    from viralfx.settings import read_settings  # noqa: PLC0415
    from viralfx.settings.model import webhook_keys  # noqa: PLC0415

    keys = webhook_keys(read_settings(os.environ, strict=True))
    try:
        destination = parse_destination(options.url)
    except WebhookRefusedError as error:
        raise ConfigurationError([str(error)]) from None
    found = (keys.of_alerts if options.alerts else keys.of_receiver)(destination)
    if not found:
        raise ConfigurationError(["WEBHOOK_SECRET is not set, so the receiver has no key"])
    for key in found:
        print(show_key(key))
    return 0


def _env(options: argparse.Namespace) -> int:
    from viralfx.settings import fields, read_settings, show, sources, typing_errors  # noqa: PLC0415

    # The list helps to correct a name, so a misspelt one does not prevent it.
    misspelt = {problem.variable: problem for problem in typing_errors(os.environ)}
    for problem in misspelt.values():
        note(f"viralfx: {problem}")
    environ = {name: value for name, value in os.environ.items() if name not in misspelt}
    settings, origins = read_settings(environ, strict=True), sources(environ)
    rows = [("name", "default", "value", "meaning", "source")]
    for each in fields():
        values = (show(each.default), show(each.of(settings)))
        rows.append((each.variable, *values, each.meaning, origins.get(each.variable, "default")))
    if options.markdown:
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row[:4]) + " |" for row in rows
        ]
        lines.insert(1, "|---|---|---|---|")
    else:
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True))
            for row in rows
        ]
    print("\n".join(line.rstrip() for line in lines))
    return 0
