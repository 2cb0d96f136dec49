"""``viralfx doctor``: runs all checks of a deployment and prints the findings.

The checks of the process itself are here: its ports, and the application with its probes.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import math
import os
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from functools import partial
from http import HTTPStatus
from typing import TypeVar

import msgspec

from viralfx.bootstrap.doctor import doctor_checks, unmade, unreadable
from viralfx.core.clock import SystemClock, finished_within, ignore_error
from viralfx.core.errors import ConfigurationError, Problem, StartupError
from viralfx.core.extras import is_installed
from viralfx.domain.doctor import (
    Area,
    DoctorCheck,
    Finding,
    Verdict,
    diagnose,
    failed,
    finding_of,
    in_order,
    passed,
    skipped,
    warned,
    worst,
)
from viralfx.domain.fleet import FleetReporter
from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import HealthReport, ProcessUsage, Status
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.runner.applications import bare_application, find_application
from viralfx.server.http_server import listen
from viralfx.server.interface import ASGIApp, Message
from viralfx.settings import CredentialsCallable, Settings, read_settings
from viralfx.web.gate import Gate
from viralfx.web.layer import OperationsConfig, OperationsLayer

_PROBES = ("", "/live", "/startup", "/ready", "/detailed")
_PRIVILEGED = 1024
_WARN_MEMORY_SHARE, _FAIL_MEMORY_SHARE = 0.5, 0.75
"""Shares of the memory limit for an idle process; at the second one the memory check warns."""
_LIMIT_SHARE = 0.9
"""Share of the time limit after which the application's check says which step took so long."""
_MAX_TIMEOUT = 3.0
"""Timeout in seconds of a health check and a connection here, so that the findings come in time."""


class PortsDoctor:
    """Checks the ports by listening on them for a moment."""

    def __init__(self, host: str, port: int, management_port: int | None) -> None:
        """``host``: the address that the ports listen on."""
        self._host = host
        self._ports = {"PORT": port, "MANAGEMENT_PORT": management_port}

    async def check(self) -> Sequence[Finding]:
        """Listen on each port once, in a thread, because HOST may need a DNS look-up."""
        return await asyncio.to_thread(lambda: list(self._listen()))

    def _listen(self) -> Iterator[Finding]:
        host = self._host
        for variable, port in self._ports.items():
            if port is None:
                continue
            try:
                listen(variable, host, port).close()
            except StartupError as error:
                yield finding_of(Problem.of_line(str(error)), Area.PORTS)
                continue
            if 0 < port < _PRIVILEGED:
                yield warned(
                    Area.PORTS,
                    f"{variable}={port} is free, but other users may need privileges for ports"
                    f" below {_PRIVILEGED}",
                    f"set {variable} to {_PRIVILEGED} or above, and map the port outside",
                )
            else:
                yield passed(Area.PORTS, f"{variable}={port} on {host} is free")


class ApplicationDoctor:
    """Creates the application as ``viralfx serve`` does, runs its checks once and its probes.

    It opens no port, does not run the application's own start-up, and writes nothing: no report to
    the fleet, no alert and no state. Without Litestar the service has no application of its own, so
    the operations layer is examined alone.
    """

    def __init__(self, settings: Settings, app: str | None) -> None:
        """``app``: the application, as in ``viralfx serve --app``."""
        db = msgspec.structs.replace(
            settings.db,
            connection_timeout=min(settings.db.connection_timeout, _MAX_TIMEOUT),
            max_reconnect_attempts=1,
        )
        timeout = min(settings.health_check_timeout, _MAX_TIMEOUT)
        self._settings = msgspec.structs.replace(settings, db=db, health_check_timeout=timeout)
        self._app = app
        self._is_bare = app is None and not is_installed("litestar")
        self._loading: asyncio.Future[tuple[ASGIApp, OperationsLayer]] | None = None
        self._step = ""
        """The step that a limit of time interrupts, in words."""

    async def redis_credentials(self) -> CredentialsCallable | None:
        """Return the application's callable; None if it has none, or cannot be created."""
        config = await self._config()
        return None if config is None else config.redis_credentials

    async def database_password(self) -> CredentialsCallable | None:
        """Return the application's callable; None if it has none, or cannot be created."""
        config = await self._config()
        return None if config is None else config.database_password

    async def _config(self) -> OperationsConfig | None:
        try:
            _, plugin = await self._load()
        except ConfigurationError:
            return None
        return plugin.config

    async def _load(self) -> tuple[ASGIApp, OperationsLayer]:
        if self._loading is None:
            # In a thread, because slow imports would distort the timings of other checks.
            bare, named = bare_application, partial(find_application, spec=self._app)
            loading = asyncio.to_thread(bare if self._is_bare else named, self._settings)
            self._loading = asyncio.ensure_future(loading)
        return await asyncio.shield(self._loading)

    async def check(self) -> Sequence[Finding]:
        """Run the checks and the probes once."""
        limit, work = LIMIT * _LIMIT_SHARE, asyncio.ensure_future(self._examine())
        try:
            if await finished_within(work, limit, SystemClock()):
                return work.result()
        finally:
            work.cancel()
            work.add_done_callback(ignore_error)
        return [
            failed(
                Area.ENDPOINTS,
                f"{self._step} takes longer than {limit:.2g} s on this machine, so the probes were"
                " not tried",
                "run this again: the machine may be busy; otherwise find what it waits for",
            )
        ]

    async def _examine(self) -> Sequence[Finding]:
        self._step = "loading the application"
        try:
            application, plugin = await self._load()
        except ConfigurationError as error:
            return unmade(error.details, os.environ)
        self._step = "the first run of the checks"
        monitor = plugin.operations.monitor
        gate = Gate(plugin.endpoints.at_management_port(plugin.settings), application)
        try:
            # A resource that cannot be opened is reported by its health check.
            with contextlib.suppress(StartupError):
                for resource in plugin.operations.resources:
                    if not isinstance(resource, FleetReporter):
                        await resource.open()
            await _first_round(monitor)
            # Without `Operations.application_ready`, which would start the worker and the alerts.
            plugin.operations.lifecycle.application_ready()
            plugin.operations.lifecycle.follow(monitor.report())
            prefix = next(iter(plugin.endpoints.endpoints))
            token = plugin.settings.management_token
            statuses = {
                prefix + path: await _request(gate, prefix + path, token.value if token else "")
                for path in _PROBES
            }
            findings = [
                judge_memory(plugin.operations.usage()),
                _judge(statuses, monitor.report()),
            ]
            return [*findings, _NO_APPLICATION] if self._is_bare else findings
        finally:
            # This saves no state, because the application was never started.
            await asyncio.shield(plugin.operations.shutdown.run())


_NO_APPLICATION = skipped(
    Area.ENDPOINTS,
    "the routes of an application: the service's own needs viralfx[litestar]",
    "name your application: viralfx doctor --app package.module:app",
)


def judge_memory(usage: ProcessUsage) -> Finding:
    """Return the finding about the memory of an idle process."""
    used, limit = (f"{size / 2**20:.0f} MiB" for size in (usage.rss, usage.heap_total))
    found = f"with the application loaded, {used} of {limit} are in use before any request or job"
    if usage.ratio < _WARN_MEMORY_SHARE:
        return passed(Area.MEMORY, found)
    verdict = failed if usage.ratio >= _FAIL_MEMORY_SHARE else warned
    min_mib = 2 ** math.ceil(math.log2(usage.rss / 2**20 / _WARN_MEMORY_SHARE))
    return verdict(Area.MEMORY, found, f"raise the memory limit to {min_mib} MiB or more")


def _judge(statuses: dict[str, int], report: HealthReport) -> Finding:
    area = Area.ENDPOINTS
    causes = "; ".join(
        f"{name}: {' '.join(check.message.split())}"
        for name, check in report.checks.items()
        if check.status is not Status.PASS
    )
    wrong = [f"{path} {status}" for path, status in statuses.items() if status != HTTPStatus.OK]
    if wrong:
        found = f"statuses here: {', '.join(wrong)}" + (f" ({causes})" if causes else "")
        remedy = f"{_remedy(report)}; READINESS_REQUIRES and HEALTH_CRITICAL set their effect"
        return failed(area, found, remedy)
    if causes:
        return warned(area, f"all return 200 here, but degraded: {causes}", _remedy(report))
    return passed(area, f"{', '.join(statuses)} return 200 here, and every check passes")


def _remedy(report: HealthReport) -> str:
    failing = [check for check in report.checks.values() if check.status is not Status.PASS]
    if failing and all(check.code == "timeout" for check in failing):
        return "run this again: servers or this machine may be busy; or raise HEALTH_CHECK_TIMEOUT"
    return "fix the failing checks"


async def _first_round(monitor: HealthMonitor) -> None:
    """Start the monitor and wait until every check has run once."""
    complete = asyncio.Event()
    missing = set(monitor.checks)

    def on_event(event: object) -> None:
        if isinstance(event, CheckCompleted):
            missing.discard(event.check)
        elif not missing and isinstance(event, HealthReport):
            complete.set()

    monitor.subscribe(on_event)
    monitor.start()
    await complete.wait()


async def _request(gate: Gate, path: str, token: str) -> int:
    """Send a request to the gate without a network; return the status."""
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

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
    return int(messages[0]["status"])


EXIT_FAILED = 1
EXIT_UNREADABLE = 2

LIMIT = 8.0
"""Time limit in seconds for each check; all run concurrently."""

_LINE_CHARACTERS = 100
_EXIT_GRACE_SECONDS = 0.5
"""Time for remaining tasks and threads to end."""

T = TypeVar("T")


def doctor(*, app: str | None, as_json: bool) -> int:
    """Run all checks, print the findings and return the exit code.

    The code is 0 if no check fails, with or without warnings, and 1 if a check fails. For invalid
    settings there is one finding for each problem, the checks are skipped, and the code is 2, as
    for every command.

    If a hanging check would delay the exit, this function ends the process after printing.
    """
    try:
        with_api = app is None and is_installed("litestar")
        settings = read_settings(os.environ, strict=True, with_api=with_api)
    except ConfigurationError as error:
        findings = in_order(unreadable(error.details, os.environ))
        _print(findings, as_json=as_json)
        return EXIT_UNREADABLE
    application = ApplicationDoctor(settings, app)
    ask = () if app is None else (application.redis_credentials, application.database_password)
    everything: list[tuple[Area, DoctorCheck]] = [
        *doctor_checks(settings, os.environ, *ask),
        (
            Area.PORTS,
            PortsDoctor(settings.listen_host, settings.port, settings.management_port),
        ),
        (Area.ENDPOINTS, application),
    ]
    # The findings report each problem; log lines would repeat it.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        findings, hangs = _run(diagnose(everything, clock=SystemClock(), limit=LIMIT))
    finally:
        logging.disable(before)
    _print(findings, as_json=as_json)
    code = EXIT_FAILED if worst(findings) is Verdict.FAIL else 0
    if hangs:
        sys.stdout.flush()
        os._exit(code)
    return code


def _run(work: Awaitable[T]) -> tuple[T, bool]:
    """Return the result, and whether something hangs that would delay a regular exit.

    A DNS look-up, for example, cannot be cancelled, and ``asyncio.run`` waits for it.
    """
    loop = asyncio.new_event_loop()
    executor = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="doctor")
    loop.set_default_executor(executor)
    result = loop.run_until_complete(work)
    executor.shutdown(wait=False, cancel_futures=True)
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        _, left = loop.run_until_complete(asyncio.wait(left, timeout=_EXIT_GRACE_SECONDS))
    threads = [t for t in threading.enumerate() if t.name.startswith("doctor")]
    for thread in threads:
        thread.join(_EXIT_GRACE_SECONDS / len(threads))
    hangs = bool(left) or any(thread.is_alive() for thread in threads)
    if not hangs:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    return result, hangs


def _print(findings: Sequence[Finding], *, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                {
                    "status": worst(findings),
                    "findings": [
                        {"area": f.area, "status": f.verdict, "found": f.found, "remedy": f.remedy}
                        for f in findings
                    ],
                },
                indent=2,
            )
        )
        return
    for line in _table(findings):
        print(line)


def _table(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield lines of three columns: status, area, and the finding with its remedy."""
    first = max(len("status"), *(len(v) for v in Verdict)) + 2
    second = max(len(a) for a in Area) + 2
    yield f"{'status':{first}}{'area':{second}}found"
    for finding in findings:
        head = f"{finding.verdict:{first}}{finding.area:{second}}"
        yield from _wrapped(finding.found, head)
        if finding.remedy:
            yield from _wrapped(f"-> {finding.remedy}", " " * len(head))
    counts = Counter(finding.verdict for finding in findings)
    words = {
        Verdict.FAIL: "failed",
        Verdict.WARN: "warned",
        Verdict.PASS: "passed",
        Verdict.SKIP: "skipped",
    }
    yield ""
    yield ", ".join(f"{counts[verdict]} {word}" for verdict, word in words.items())


def _wrapped(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text,
        width=_LINE_CHARACTERS,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
