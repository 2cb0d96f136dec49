"""A cluster of one machine: Deployments as processes, and a ``kubectl`` that works on them."""

import json
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.fault_proxy import FaultProxy
from tests.servers.sockets import socket_folder
from tests.system.service import Service, running

BACKEND = ("viralfx-backend", "backend")
BESIDE = ("viralfx-backend", "queue-worker")
WORKER = ("viralfx-worker", "queue-worker")
"""Deployment and container, as the manifests call them."""

_CLIENT = """#!/bin/sh
exec {python} -S -E - "$@" <<'END'
import json, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    server.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
    reply = json.loads(server.makefile().read())
sys.stdout.write(reply["text"])
sys.exit(reply["code"])
END
"""


@dataclass
class _Container:
    """One container of every pod of a Deployment."""

    arguments: tuple[str, ...]
    program: str
    revisions: list[dict[str, str]]
    """All environments of the container; the last one is in force."""
    replicas: int = 1
    processes: list[tuple[Service, AbstractContextManager[Service]]] = field(default_factory=list)


class Cluster:
    """Starts processes as a cluster starts containers, and replaces them one by one.

    ``joined`` is called with each process of a backend, to move it below a memory limit.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.joined: Callable[[int], None] = lambda _pid: None
        self.limited: Callable[[int], None] = lambda _mebibytes: None
        self.environment = dict(environment)
        self._containers: dict[tuple[str, str], _Container] = {}
        self._service: FaultProxy | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        path = self._stack.enter_context(socket_folder()) / "api"
        server = _Api(str(path), _Handler)
        server.answer = self._answer
        self._stack.callback(server.server_close)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(server.shutdown)
        kubectl = self.folder / "kubectl"
        kubectl.write_text(_CLIENT.format(python=sys.executable, path=str(path)), encoding="utf-8")
        kubectl.chmod(0o755)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for container in self._containers.values():
            for _, context in container.processes:
                context.__exit__(kind, error, trace)
        self._stack.close()

    # -- processes ---------------------------------------------------------------------------

    def deploy(
        self,
        name: tuple[str, str],
        *arguments: str,
        replicas: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a container of a Deployment in ``replicas`` pods."""
        program = "worker" if name[1] == "queue-worker" else "serve"
        variables = {**self.environment, **(environment or {})}
        self._containers[name] = _Container(arguments, program, [variables], replicas)
        self._scale(name, replicas)

    def update(self, name: tuple[str, str], **environment: str) -> None:
        """Roll out a new revision with these variables changed."""
        revisions = self._containers[name].revisions
        revisions.append({**revisions[-1], **environment})
        self._replace(name)

    def processes(self, name: tuple[str, str]) -> list[Service]:
        """Return the processes that run, or ran last."""
        return [service for service, _ in self._containers[name].processes]

    @property
    def instance(self) -> str:
        """The address of the backend, independent of its process: the runbook's INSTANCE."""
        assert self._service is not None
        return f"localhost:{self._service.port}"

    def _scale(self, name: tuple[str, str], replicas: int) -> None:
        container = self._containers[name]
        container.replicas = replicas
        started = [self._start(container) for _ in range(replicas - len(container.processes))]
        for service, context in started:
            container.processes.append((service.wait_ready(), context))
        self._route(name)

    def _start(self, container: _Container) -> tuple[Service, AbstractContextManager[Service]]:
        context = running(
            *container.arguments,
            program=container.program,
            management=container.program == "worker",
            environment=container.revisions[-1],
        )
        service = context.__enter__()
        if container.program == "serve":
            self.joined(service.process.pid)
        return service, context

    def _replace(self, name: tuple[str, str]) -> None:
        """Replace the processes: a new one is ready before an old one gets SIGTERM."""
        container = self._containers[name]
        old, container.processes = container.processes, []
        self._scale(name, container.replicas)
        for service, _ in old:
            if service.process.poll() is None:
                service.signal(signal.SIGTERM)
        for service, context in old:
            assert service.exit_code(seconds=30) == 0, service.errors
            context.__exit__(None, None, None)

    def _route(self, name: tuple[str, str]) -> None:
        if name != BACKEND:
            return
        port = self.processes(name)[0].port
        if self._service is None:
            self._service = self._stack.enter_context(FaultProxy(port))
        self._service.upstream = ("127.0.0.1", port)

    # -- commands of kubectl -----------------------------------------------------------------

    def _answer(self, words: list[str]) -> tuple[int, str]:
        match words:
            case ["logs", target, *options]:
                reply = 0, self._logs(self._named(target, options))
            case ["rollout", "restart", target]:
                reply = self._rolled(target, lambda _: None)
            case ["rollout", "undo", target]:
                reply = self._rolled(target, lambda container: container.revisions.pop())
            case ["set", "env", target, "-c", container, setting]:
                key, _, value = setting.partition("=")
                reply = self._rolled(
                    target, lambda c: c.revisions.append({**c.revisions[-1], key: value}), container
                )
            case ["set", "resources", target, "-c", container, limits]:
                self.limited(int(limits.removeprefix("--limits=memory=").removesuffix("Mi")))
                reply = self._rolled(target, lambda _: None, container)
            case ["scale", "deployment/viralfx-worker", replicas]:
                self._scale(WORKER, int(replicas.removeprefix("--replicas=")))
                reply = 0, "deployment.apps/viralfx-worker scaled\n"
            case ["patch", "horizontalpodautoscaler/viralfx-worker", "-p", patch]:
                self._scale(WORKER, int(json.loads(patch)["spec"]["minReplicas"]))
                reply = 0, "horizontalpodautoscaler.autoscaling/viralfx-worker patched\n"
            case ["exec", target, "-c", container, "--", *command]:
                reply = self._run(self._named(target, ["-c", container]), command)
            case _:
                reply = 1, f"error: this cluster knows no kubectl {' '.join(words)}\n"
        return reply

    def _named(self, target: str, options: list[str]) -> tuple[str, str]:
        deployment = target.removeprefix("deployment/")
        container = options[1] if options[:1] == ["-c"] else None
        names = [name for name in self._containers if name[0] == deployment]
        return next(name for name in names if container in {None, name[1]})

    def _logs(self, name: tuple[str, str]) -> str:
        service = self.processes(name)[0]
        threading.Event().wait(0.05)  # the process writes log lines in batches
        return "".join([*service.errors, *service.output])

    def _rolled(
        self, target: str, change: Callable[[_Container], object], container: str | None = None
    ) -> tuple[int, str]:
        deployment = target.removeprefix("deployment/")
        for name, found in self._containers.items():
            if name[0] == deployment and container in {None, name[1]}:
                change(found)
                self._replace(name)
        return 0, f"deployment.apps/{deployment} rolled\n"

    def _run(self, name: tuple[str, str], command: list[str]) -> tuple[int, str]:
        """Run a command in which process 1 is the container's."""
        pid = self.processes(name)[0].process.pid
        words = [word.replace("-USR2 1", f"-USR2 {pid}") for word in command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr


class _Api(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    answer: Callable[[list[str]], tuple[int, str]]


class _Handler(socketserver.StreamRequestHandler):
    server: _Api

    def handle(self) -> None:
        """Run one command; an error becomes its output."""
        try:
            code, text = self.server.answer(json.loads(self.rfile.readline()))
        except Exception as error:  # noqa: BLE001 - the console shows it
            code, text = 1, f"error: {type(error).__name__}: {error}\n"
        self.wfile.write(json.dumps({"code": code, "text": text}).encode())
