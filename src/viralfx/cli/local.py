"""Examines what runs in this process itself: its ports, and the application with its probes."""

import asyncio
import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from http import HTTPStatus

import msgspec

from viralfx.bootstrap.diagnosis import refused, unmade
from viralfx.domain.diagnosis import Area, Finding, failed, passed, warned
from viralfx.domain.errors import ConfigurationError, StartupError
from viralfx.domain.health import HealthReport, Status
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.usage import ProcessUsage
from viralfx.runner.sockets import listen
from viralfx.settings import Settings
from viralfx.web.asgi import Message
from viralfx.web.gate import Gate
from viralfx.web.load import find_application

_PROBES = ("", "/live", "/startup", "/ready", "/detailed")
_PRIVILEGED = 1024
_MUCH, _TOO_MUCH = 0.5, 0.75
"""Parts of the memory limit that an idle process may hold; from the second on its check warns."""
_LONGEST = 3000
"""Milliseconds that a check may take here, and a connection; ours are to be told in time."""


class PortsExamination:
    """Listens on the ports for a moment."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def examine(self) -> Sequence[Finding]:
        """Look once. In a thread: HOST may be a name that has to be looked up."""
        return await asyncio.to_thread(lambda: list(self._listen()))

    def _listen(self) -> Iterator[Finding]:
        host = self._settings.host
        ports = {"PORT": self._settings.port, "MANAGEMENT_PORT": self._settings.management_port}
        for variable, port in ports.items():
            if port is None:
                continue
            try:
                listen(variable, host, port).close()
            except StartupError as error:
                yield from refused([str(error)], Area.PORTS)
                continue
            if 0 < port < _PRIVILEGED:
                yield warned(
                    Area.PORTS,
                    f"{variable}={port} is free, and open to this user; to others below"
                    f" {_PRIVILEGED} it may not be",
                    f"set {variable} to one above {_PRIVILEGED - 1}, and map it outside",
                )
            else:
                yield passed(Area.PORTS, f"{variable}={port} on {host} is free")


class ApplicationExamination:
    """Makes the application as ``viralfx serve`` does, checks once, and asks its probes.

    No port is opened and the application's own start-up does not run.
    """

    def __init__(self, settings: Settings, app: str | None) -> None:
        """``app`` is as for ``viralfx serve --app``."""
        db = msgspec.structs.replace(
            settings.db,
            connection_timeout=min(settings.db.connection_timeout, _LONGEST),
            max_reconnect_attempts=1,
        )
        timeout = min(settings.health_check_timeout, _LONGEST)
        self._settings = msgspec.structs.replace(settings, db=db, health_check_timeout=timeout)
        self._app = app

    async def examine(self) -> Sequence[Finding]:
        """Look once."""
        try:
            # In a thread: importing takes its time, and others measure theirs meanwhile.
            application, plugin = await asyncio.to_thread(
                find_application, self._settings, self._app
            )
        except ConfigurationError as error:
            return unmade(error.problems, os.environ)
        monitor = plugin.operations.monitor
        gate = Gate(plugin.answers, application)
        try:
            # What cannot be had is told by its check.
            with contextlib.suppress(StartupError):
                for resource in plugin.operations.resources:
                    await resource.open()
            await _first_round(monitor)
            plugin.assembly.jobs.dismiss()  # nobody's work is done while somebody looks
            plugin.operations.application_ready()
            prefix = next(iter(plugin.answers.endpoints))
            token = plugin.settings.management_token
            answers = {
                prefix + path: await _ask(gate, prefix + path, token.value if token else "")
                for path in _PROBES
            }
            return [judge_memory(plugin.operations.usage()), _judge(answers, monitor.report())]
        finally:
            # Saves nothing: what was never started has no state.
            await asyncio.shield(plugin.operations.shutdown.run())


def judge_memory(usage: ProcessUsage) -> Finding:
    """Judge what is in use before there is anything to do."""
    used, limit = (f"{size / 2**20:.0f} MiB" for size in (usage.rss, usage.heap_total))
    found = f"with the application loaded, {used} of {limit} are in use before any request or job"
    if usage.ratio < _MUCH:
        return passed(Area.MEMORY, found)
    tell = failed if usage.ratio >= _TOO_MUCH else warned
    least = 2 ** math.ceil(math.log2(usage.rss / 2**20 / _MUCH))
    return tell(Area.MEMORY, found, f"raise the memory limit to {least} MiB or more")


def _judge(answers: dict[str, int], report: HealthReport) -> Finding:
    area = Area.ENDPOINTS
    causes = "; ".join(
        f"{name}: {' '.join(check.message.split())}"
        for name, check in report.checks.items()
        if check.status is not Status.PASS
    )
    wrong = [f"{path} {status}" for path, status in answers.items() if status != HTTPStatus.OK]
    if wrong:
        found = f"answers here: {', '.join(wrong)}" + (f" ({causes})" if causes else "")
        remedy = "mend what the checks find; READINESS_REQUIRES and HEALTH_CRITICAL say what counts"
        return failed(area, found, remedy)
    if causes:
        return warned(area, f"all answer 200 here, but degraded: {causes}", "mend what they find")
    return passed(area, f"{', '.join(answers)} answer 200 here, and every check passes")


async def _first_round(monitor: HealthMonitor) -> None:
    """Check everything once."""
    complete = asyncio.Event()

    def look(event: object) -> None:
        if isinstance(event, HealthReport) and all(
            check.checked_at is not None for check in event.checks.values()
        ):
            complete.set()

    monitor.subscribe(look)
    monitor.start()
    await complete.wait()


async def _ask(gate: Gate, path: str, token: str) -> int:
    """Ask without a network; return the status."""
    answer: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        answer.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer " + token.strip().encode())],
        "client": None,
        "server": None,
    }
    await gate(scope, receive, send)
    return int(answer[0]["status"])
