"""``viralfx doctor``: the list of things to look at before a deployment, looked at."""

import asyncio
import concurrent.futures
import json
import logging
import os
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from typing import TypeVar

from viralfx.bootstrap.diagnosis import examinations, unreadable
from viralfx.cli.local import ApplicationExamination, PortsExamination
from viralfx.domain.clock import SystemClock
from viralfx.domain.diagnosis import (
    Area,
    Examination,
    Finding,
    Verdict,
    diagnose,
    in_order,
    worst,
)
from viralfx.domain.errors import ConfigurationError
from viralfx.settings import read_settings

EXIT_FAILED = 1
EXIT_UNREADABLE = 2

LIMIT = 8.0
"""Seconds for each examination; they run at the same time."""

_WIDTH = 100
_GRACE = 0.5
"""Seconds for what was left behind to end by itself."""

T = TypeVar("T")


def doctor(*, app: str | None, as_json: bool) -> int:
    """Examine everything and print the findings. Returns the exit code.

    0 when nothing fails, warnings or not; 1 when something does. Settings that cannot be read are
    findings, one for each problem, whatever needs them is skipped, and the code is 2, as that of
    every command is then.

    It may end the process itself, after printing, when something that hangs would keep it.
    """
    try:
        settings = read_settings(os.environ, with_api=app is None)
    except ConfigurationError as error:
        findings = in_order(unreadable(error.problems, os.environ))
        _print(findings, as_json=as_json)
        return EXIT_UNREADABLE
    everything: list[tuple[Area, Examination]] = [
        *examinations(settings, os.environ),
        (Area.PORTS, PortsExamination(settings)),
        (Area.ENDPOINTS, ApplicationExamination(settings, app)),
    ]
    # What is found is told once, by the findings; the log of a service would tell it again.
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
    """Run to the end; tell also whether something is left that an orderly exit would wait for.

    A look-up of a name, for example, cannot be cancelled, and ``asyncio.run`` waits for it.
    """
    loop = asyncio.new_event_loop()
    executor = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="examination")
    loop.set_default_executor(executor)
    result = loop.run_until_complete(work)
    executor.shutdown(wait=False, cancel_futures=True)
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        _, left = loop.run_until_complete(asyncio.wait(left, timeout=_GRACE))
    threads = [t for t in threading.enumerate() if t.name.startswith("examination")]
    for thread in threads:
        thread.join(_GRACE / len(threads))
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
    """Yield lines of three columns: status, area, and what was found with what to do about it."""
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
        Verdict.WARN: "warned of",
        Verdict.PASS: "passed",
        Verdict.SKIP: "skipped",
    }
    yield ""
    yield ", ".join(f"{counts[verdict]} {word}" for verdict, word in words.items())


def _wrapped(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
