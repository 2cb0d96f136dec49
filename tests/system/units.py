"""A stand-in for systemd that obeys the directives of unit files about processes."""

import os
import shlex
import signal
import socketserver
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.servers.sockets import socket_folder
from tests.system.service import ROOT

UNITS = ROOT / "deploy/systemd"

_ELSEWHERE = {
    "AmbientCapabilities",
    "CapabilityBoundingSet",
    "LimitNOFILE",
    "LockPersonality",
    "NoNewPrivileges",
    "PrivateDevices",
    "PrivateTmp",
    "ProtectClock",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectProc",
    "ProtectSystem",
    "RemoveIPC",
    "Restart",
    "RestartPreventExitStatus",
    "RestartSec",
    "RestrictAddressFamilies",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "SystemCallArchitectures",
    "SystemCallErrorNumber",
    "SystemCallFilter",
    "UMask",
    "User",
}
"""Directives that need the rights of systemd, or act after a crash."""
_WITHOUT_NEW_CODE = """
import ctypes, os, sys
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
# Without effect before Linux 6.3.
ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
_CLIENT = """#!{python}
import socket, sys
with socket.socket(socket.AF_UNIX) as manager:
    manager.connect({path!r})
    manager.sendall(" ".join(sys.argv[1:]).encode())
    manager.shutdown(socket.SHUT_WR)
    sys.exit(int(manager.recv(16)))
"""


def installed(
    folder: Path, environment: dict[str, str], migrating: dict[str, str] | None = None
) -> None:
    """Copy the units, with paths of this checkout in place of those of an installation.

    ``migrating`` has the variables of migrations alone; None: their file is missing.
    """
    for name, variables in (("viralfx.env", environment), ("migrate.env", migrating)):
        if variables is not None:
            lines = [f"{each}={value}\n" for each, value in variables.items()]
            (folder / name).write_text("".join(lines), encoding="utf-8")
    paths = {
        "/opt/viralfx/bin/": f"{Path(sys.executable).parent}/",
        "=/opt/viralfx\n": f"={ROOT}\n",
        "/etc/viralfx/": f"{folder}/",
    }
    for unit in UNITS.glob("*.service"):
        text = unit.read_text(encoding="utf-8")
        for there, here in paths.items():
            assert there in text, f"{unit.name} does not name {there}"
            text = text.replace(there, here)
        (folder / unit.name).write_text(text, encoding="utf-8")


class Unit:
    """The directives of one unit; an instance has the text after the ``@`` in its name."""

    def __init__(self, folder: Path, name: str) -> None:
        stem, at, self.instance = name.removesuffix(".service").partition("@")
        self._directives: dict[str, list[str]] = {}
        for line in (folder / f"{stem}{at}.service").read_text(encoding="utf-8").splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                self._directives.setdefault(key, []).append(value.replace("%i", self.instance))
        self.oneshot = self.one("Type") == "oneshot"

    def one(self, key: str, default: str = "") -> str:
        """Return the last value of a directive."""
        return self._directives.get(key, [default])[-1]

    def unknown(self) -> set[str]:
        """Return the directives that neither have an effect here nor are known to have none."""
        here = {"Environment", "EnvironmentFile", "ExecStart", "ExecStartPost", "KillMode"}
        here |= {"KillSignal", "TimeoutStartSec", "TimeoutStopSec", "Type", "WorkingDirectory"}
        here.add("MemoryDenyWriteExecute")
        general = {"After", "Description", "StartLimitBurst", "StartLimitIntervalSec"}
        general |= {"WantedBy", "Wants"}
        return self._directives.keys() - here - general - _ELSEWHERE

    def environment(self, **more: str) -> dict[str, str]:
        """Return the variables; those of a file win. A file after ``-`` may be missing."""
        found = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **more}
        lines = " ".join(self._directives.get("Environment", [])).split()
        for name in self._directives["EnvironmentFile"]:
            file = Path(name.removeprefix("-"))
            if file.exists() or file == Path(name):
                lines += file.read_text(encoding="utf-8").splitlines()
        for line in lines:
            name, _, value = line.partition("=")
            found[name] = value
        return found

    def command(self, key: str, **more: str) -> list[str]:
        """Return the command of a directive: a variable alone is split into words."""
        environment = self.environment(**more)
        words = shlex.split(self.one(key))
        return [
            part
            for word in words
            for part in (environment[word[1:]].split() if word.startswith("$") else [word])
        ]

    def main_command(self) -> list[str]:
        """Return the command of the main process, with the limits that need no rights."""
        command = self.command("ExecStart")
        if self.one("MemoryDenyWriteExecute") == "yes":
            return [sys.executable, "-c", _WITHOUT_NEW_CODE, *command]
        return command

    def seconds(self, key: str) -> float | None:
        """Return a time limit."""
        value = self.one(key)
        return None if value == "infinity" else float(value)


class Manager:
    """Starts and stops units of a folder; ``codes`` has the exit code of each stop."""

    def __init__(self, folder: Path) -> None:
        self.codes: list[tuple[str, int]] = []
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()

    def start(self, name: str) -> bool:
        """Start a unit; return whether it and its ``ExecStartPost`` succeeded."""
        unit = Unit(self._folder, name)
        assert unit.unknown() == set(), "the stand-in has to learn them"
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                unit.main_command(),
                cwd=unit.one("WorkingDirectory"),
                env=unit.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            if unit.oneshot:
                return process.wait(unit.seconds("TimeoutStartSec")) == 0
            self._running[name] = process
            # Like systemd, collect the exit code at once, so that its id no longer exists.
            threading.Thread(target=process.wait, daemon=True).start()
            after = subprocess.run(
                unit.command("ExecStartPost", MAINPID=str(process.pid)),
                env=unit.environment(),
                stdout=log,
                stderr=log,
                timeout=unit.seconds("TimeoutStartSec"),
                check=False,
            )
        if after.returncode != 0:
            self.stop(name)
        return after.returncode == 0

    def stop(self, name: str) -> None:
        """Stop a unit: its signal to the main process, and SIGKILL to all after the time."""
        unit, process = Unit(self._folder, name), self._running.pop(name)
        process.send_signal(signal.Signals[unit.one("KillSignal")])
        try:
            process.wait(unit.seconds("TimeoutStopSec"))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.codes.append((name, process.returncode))

    def restart(self, name: str) -> bool:
        """Stop a unit if it runs, and start it."""
        if name in self._running:
            self.stop(name)
        return self.start(name)

    @contextmanager
    def systemctl(self) -> Iterator[Path]:
        """Yield a folder with a command ``systemctl`` that restarts units of this manager."""
        manager = self

        class Call(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                """Obey one command."""
                verb, name = self.rfile.read().decode().split()
                assert verb == "restart"
                self.wfile.write(b"0" if manager.restart(name) else b"1")

        with socket_folder() as sockets:
            address, program = sockets / "manager.sock", sockets / "bin/systemctl"
            program.parent.mkdir()
            text = _CLIENT.format(python=sys.executable, path=str(address))
            program.write_text(text, encoding="utf-8")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
            with socketserver.UnixStreamServer(str(address), Call) as server:
                thread = threading.Thread(target=server.serve_forever, args=(0.05,))
                thread.start()
                yield program.parent
                server.shutdown()
                thread.join()
