"""Runs commands in child processes, forked from a server that has already imported their modules.

Imports are most of the cost of a start. The command itself behaves as in a new process. Tests of
the start itself run the program without this module; VIRALFX_TEST_FRESH=1 makes all of them do so.
"""

import contextlib
import io
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO

from tests.servers import sockets

Main = Callable[[Sequence[str]], int | None]

FRESH = bool(os.environ.get("VIRALFX_TEST_FRESH"))
"""Whether each service is a new process that imports its modules itself."""

_PRELOADED = [
    "tests.forked",
    "viralfx.cli.doctor",
    "viralfx.runner.commands",
    "viralfx.web.app",
    "viralfx.web.plugin",
    "viralfx.adapters.taskiq",
    "viralfx.adapters.http",
    "viralfx.adapters.postgres.doctor",
    "viralfx.postgres.migrate",
    "viralfx.adapters.redis.doctor",
    "tests.preloaded",  # the last one
]


@cache
def forks() -> ForkServerContext:
    """Return the context whose processes the fork server of this test process makes."""
    # It listens in a folder that ``multiprocessing`` makes once, below TMPDIR. Where that is a long
    # path, the address would be longer than 107 bytes.
    before = tempfile.gettempdir()
    tempfile.tempdir = str(sockets.PLACE)
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def viralfx(
    *arguments: str, environ: Mapping[str, str], seconds: float = 30.0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one command with ``environ`` as its whole environment, in the folder ``cwd`` if any.

    Raises :class:`subprocess.TimeoutExpired` if it does not end within ``seconds``.
    """
    return _ended(_viralfx, arguments, environ, seconds, cwd)


def litestar(
    *arguments: str, environ: Mapping[str, str], seconds: float = 60.0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Litestar's own command as :func:`viralfx` runs that of the project."""
    return _ended(_litestar, arguments, environ, seconds, cwd)


def _ended(
    main: Main,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    seconds: float,
    cwd: Path | None,
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as name:
        output, errors = Path(name, "output"), Path(name, "errors")
        process = forks().Process(
            target=_run, args=(main, arguments, dict(environ), str(output), str(errors), cwd)
        )
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, seconds, output.read_text())
        code = process.exitcode
        process.close()
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


class ForkedProcess:
    """A running command, with the interface of :class:`subprocess.Popen` that the tests use."""

    def __init__(self, arguments: Sequence[str], *, environ: Mapping[str, str], cwd: Path) -> None:
        """Start a command with ``environ`` as its whole environment."""
        readers, writers = zip(*(forks().Pipe(duplex=False) for _ in range(2)), strict=True)
        self._process = forks().Process(
            target=_serve, args=(tuple(arguments), dict(environ), str(cwd), writers)
        )
        self._process.start()
        self.args = arguments
        self.pid: int = self._process.pid or 0
        self.stdout, self.stderr = (self._text(reader.fileno()) for reader in readers)
        for connection in (*readers, *writers):
            connection.close()

    @staticmethod
    def _text(descriptor: int) -> IO[str]:
        return os.fdopen(os.dup(descriptor), encoding="utf-8")

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises :class:`subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return both outputs, which must fit into a pipe, once the process has ended."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            # The fork server may have reaped it, and not yet said so.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(  # noqa: PLR0917 - the arguments of a process
    main: Main,
    arguments: Sequence[str],
    environ: dict[str, str],
    output: str,
    errors: str,
    cwd: Path | None,
) -> None:
    if cwd is not None:
        os.chdir(cwd)
        sys.path[0:0] = [str(cwd)]
    for descriptor, path in ((1, output), (2, errors)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    _adopt(environ)
    sys.exit(main(arguments))


def _viralfx(arguments: Sequence[str]) -> int:
    from viralfx.cli import main  # noqa: PLC0415 - the fork server has imported it

    return main(arguments)


def _litestar(arguments: Sequence[str]) -> None:
    from litestar.__main__ import run_cli  # noqa: PLC0415 - few tests need it

    sys.argv = ["litestar", *arguments]
    run_cli()


def _serve(
    arguments: Sequence[str],
    environ: dict[str, str],
    cwd: str,
    writers: "Sequence[multiprocessing.connection.Connection]",
) -> None:
    for descriptor, writer in zip((1, 2), writers, strict=True):
        os.dup2(writer.fileno(), descriptor)
        writer.close()
    # Without a buffer, as PYTHONUNBUFFERED makes them.
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            os.fdopen(descriptor, "wb", 0, closefd=False), "utf-8", errors, write_through=True
        )
        for descriptor, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    os.chdir(cwd)
    _adopt(environ)
    sys.argv = ["viralfx", *arguments]

    from viralfx.__main__ import main  # noqa: PLC0415 - after the environment is set

    sys.exit(main())


def _adopt(environ: Mapping[str, str]) -> None:
    # The fork server has the signal handlers of its start, in which a shell may ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[1:1] = [folder for folder in environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
