"""The command line: each command imports only what it needs, so that a probe stays cheap."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence

from viralfx.domain.errors import ConfigurationError, StartupError

EXIT_PROBE_FAILED = 1
EXIT_CONFIGURATION = 2
EXIT_STARTUP = 3
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        if sys.stdout is not None:  # it is None when the descriptor was closed
            sys.stdout.flush()  # here, where a reader that went away is expected
    except ConfigurationError as error:
        for line in error.problems:
            print(f"viralfx: {line}", file=sys.stderr)
        return EXIT_CONFIGURATION
    except StartupError as error:
        print(f"viralfx: {error}", file=sys.stderr)
        return EXIT_STARTUP
    except KeyboardInterrupt:
        print("viralfx: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; leave nothing for the interpreter to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="viralfx", description="The ViralFX backend, and any Litestar app run the same way."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser("serve", help="serve the HTTP API until told to stop")
    serve.add_argument("--app", metavar="MODULE:NAME", help="a Litestar application of your own")
    serve.add_argument("--host", help="address to listen on (default: HOST, or 0.0.0.0)")
    serve.add_argument("--port", type=_port, help="port to listen on (default: PORT, or 3000)")
    serve.add_argument(
        "--worker",
        action=argparse.BooleanOptionalAction,
        help="run jobs in this process, too, or do not (default: only jobs in memory)",
    )
    serve.set_defaults(run=_serve)

    worker = commands.add_parser("worker", help="run jobs until told to stop")
    worker.add_argument(
        "--queue",
        action="append",
        default=[],
        metavar="NAME",
        help="only the jobs of this queue; may be given several times (default: all of QUEUES)",
    )
    worker.set_defaults(run=_worker)

    migrate = commands.add_parser(
        "migrate",
        help="bring the database's schema up to date",
        description="Brings the database's schema up to date. Of several runs at once one does it,"
        " and the others wait for up to 60 s; then they exit 3.",
    )
    migrate.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if something is pending"
    )
    migrate.set_defaults(run=_migrate)

    doctor = commands.add_parser(
        "doctor", help="look for what is wrong before a deployment; exit 0 if nothing fails"
    )
    doctor.add_argument("--json", action="store_true", help="for programs, instead of a table")
    doctor.add_argument("--app", metavar="MODULE:NAME", help="the application, as for serve")
    doctor.set_defaults(run=_doctor)

    probe = commands.add_parser("probe", help="ask a running service; exit 0 if it says yes")
    probe.add_argument("kind", choices=["live", "ready", "startup"])
    probe.add_argument(
        "--url", help="where it listens (default: this machine, MANAGEMENT_PORT or PORT)"
    )
    probe.add_argument(
        "--worker",
        action="store_true",
        help="ask `viralfx worker`: MANAGEMENT_PORT, which is 3001 there if it is not set",
    )
    probe.add_argument("--timeout", type=_seconds, default=2.0, help="seconds to wait (default: 2)")
    probe.set_defaults(run=_probe)

    env = commands.add_parser("env", help="list every environment variable and its value")
    env.add_argument("--markdown", action="store_true", help="as a table for a document")
    env.set_defaults(run=_env)
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:  # noqa: PLR2004
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3600:  # noqa: PLR2004
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _serve(options: argparse.Namespace) -> int:
    from viralfx.runner.signals import SignalWatch  # noqa: PLC0415

    signals = SignalWatch()
    signals.install()  # before the slow imports: see there
    _require_memory()

    # Collecting while modules load finds nothing and takes a tenth of the start; the runner turns
    # it on again before it serves.
    gc.disable()
    try:
        from viralfx.runner.serve import serve  # noqa: PLC0415

        return serve(
            signals,
            app=options.app,
            host=options.host,
            port=options.port,
            worker=options.worker,
        )
    finally:
        gc.enable()


def _worker(options: argparse.Namespace) -> int:
    from viralfx.runner.signals import SignalWatch  # noqa: PLC0415

    signals = SignalWatch()
    signals.install()  # as for serve
    _require_memory()

    gc.disable()
    try:
        from viralfx.runner.worker import work  # noqa: PLC0415

        return work(signals, queues=options.queue)
    finally:
        gc.enable()


def _require_memory() -> None:
    from viralfx.runner.memory import require_memory  # noqa: PLC0415

    require_memory()


def _migrate(options: argparse.Namespace) -> int:
    from viralfx.cli.migrate import migrate  # noqa: PLC0415

    return migrate(check=options.check)


def _doctor(options: argparse.Namespace) -> int:
    _require_memory()  # it loads what the service does
    from viralfx.cli.doctor import doctor  # noqa: PLC0415

    return doctor(app=options.app, as_json=options.json)


def _probe(options: argparse.Namespace) -> int:
    from viralfx.runner.probe import probe  # noqa: PLC0415

    url = options.url
    if url is None:
        from viralfx.settings import read_settings  # noqa: PLC0415

        settings = read_settings(os.environ)
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        port = settings.management_port or settings.port
        if options.worker:
            port = settings.worker_management_port
        url = f"http://{host}:{port}"
    passed, said = probe(options.kind, url, timeout=options.timeout)
    print(said, file=sys.stdout if passed else sys.stderr)
    return 0 if passed else EXIT_PROBE_FAILED


def _env(options: argparse.Namespace) -> int:
    from viralfx.settings import fields, read_settings, show, source  # noqa: PLC0415

    settings = read_settings(os.environ)
    rows = [("name", "default", "value", "meaning", "source")]
    rows += [
        (
            field.variable,
            show(field.default),
            show(field.of(settings)),
            field.meaning,
            source(field.variable, os.environ),
        )
        for field in fields()
    ]
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
