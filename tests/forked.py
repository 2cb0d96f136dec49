"""Runs commands in processes of their own, forked from one that has imported what they need.

The imports are most of what a short command costs; what a command does, and how it ends, is the
same. Those of the system tests start the program from nothing.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "viralfx.cli.doctor",
        "viralfx.web.plugin",
        "viralfx.adapters.taskiq",
        "viralfx.adapters.http",
        "viralfx.adapters.postgres.examination",
        "viralfx.adapters.postgres.migrate",
        "viralfx.adapters.redis.examination",
    ]
)


def viralfx(
    *arguments: str, environ: Mapping[str, str], seconds: float = 30.0
) -> subprocess.CompletedProcess[str]:
    """Run one command in an environment that holds nothing else.

    Raises :class:`subprocess.TimeoutExpired` when it does not end in time.
    """
    with TemporaryDirectory() as name:
        output, errors = Path(name, "output"), Path(name, "errors")
        process = _FORKS.Process(
            target=_run, args=(arguments, dict(environ), str(output), str(errors))
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


def _run(arguments: Sequence[str], environ: dict[str, str], output: str, errors: str) -> None:
    for descriptor, path in ((1, output), (2, errors)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[1:1] = [folder for folder in environ.get("PYTHONPATH", "").split(os.pathsep) if folder]

    from viralfx.cli import main  # noqa: PLC0415 - it is there already, in the process forked from

    sys.exit(main(arguments))
