"""The commands of this package below ``litestar viralfx``."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from viralfx.settings.doctor import plain_environment

COMMANDS = {
    "doctor": "check the settings and the dependencies",
    "env": "list every environment variable and its value",
    "jobs": "list, show, submit, retry, cancel and run jobs; list queues and schedules",
    "migrate": "apply the migrations of the database",
}


def add_commands(cli: click.Group, env_prefix: str) -> None:
    """Add the commands to Litestar's; ``env_prefix`` is that of the plugin's settings."""
    group = click.Group("viralfx", help="Operate the application: doctor, migrations, jobs.")
    for name, what in COMMANDS.items():
        group.add_command(_command(name, what, env_prefix))
    cli.add_command(group)


def _command(name: str, what: str, env_prefix: str) -> click.Command:
    @click.pass_context
    def run(context: click.Context, arguments: tuple[str, ...]) -> NoReturn:
        environ = plain_environment(os.environ, env_prefix)
        # The application that Litestar's command has found, and the folder that it is in.
        found: Any = context.obj
        folder = str(getattr(found, "cwd", Path.cwd()))
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, environ.get("PYTHONPATH"))))
        given = [name, *arguments]
        takes_app = name == "doctor" or given[:2] in (["jobs", "submit"], ["jobs", "run"])
        if takes_app and not any(each.partition("=")[0] == "--app" for each in arguments):
            given += ["--app", str(found.app_path)]
        sys.stdout.flush()
        # In place of this process: signals, exit codes and the terminal are those of the command.
        os.execve(sys.executable, [sys.executable, "-m", "viralfx", *given], environ)  # noqa: S606

    return click.Command(
        name,
        callback=run,
        short_help=what,
        add_help_option=False,  # the command itself answers --help
        context_settings={"ignore_unknown_options": True},
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
    )
