"""Calls of the services from places without the application's event loop.

Run it as a program: it prints the outcome of each call as JSON. The variables of the environment
decide between Postgres and memory.
"""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from litestar import Litestar

from viralfx import OperationsConfig, OperationsPlugin, task

CALLS = 50
SERVICE_CALLS = 8
OUTCOMES: dict[str, object] = {}


@task("foreign.note")
async def note(number: int) -> int:
    """Return the number."""
    return number


def outcome_of(call: Callable[[], object]) -> object:
    """Return ``accepted``, or the error, and whether the call took long."""
    began = time.monotonic()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - it is the outcome
        outcome = f"{type(error).__name__}: {error}"
    else:
        outcome = "accepted"
    return outcome if time.monotonic() - began < 10 else f"late: {outcome}"


def in_child(call: Callable[[], object]) -> object:
    """Return the outcome of a call in a forked process."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        os.write(writing, json.dumps(outcome_of(call)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        written = pipe.read()
    os.waitpid(child, 0)
    return json.loads(written) if written else "no outcome"


def in_handler(call: Callable[[], object]) -> object:
    """Return the outcome of a call in a signal handler, in the main thread."""
    found: list[object] = []
    earlier = signal.signal(signal.SIGUSR1, lambda *_: found.append(outcome_of(call)))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, earlier)
    return found[0] if found else "no outcome"


def at_once(call: Callable[[], object], calls: int = CALLS) -> object:
    """Return the different outcomes of many calls at once, each in a thread of its own."""
    with ThreadPoolExecutor(calls) as threads:
        return sorted({str(each) for each in threads.map(lambda _: outcome_of(call), range(calls))})


def services(plugin: OperationsPlugin) -> Mapping[str, Callable[[], Coroutine[Any, Any, object]]]:
    """Return a call of each service but the jobs, and one that only reads jobs."""

    async def load() -> int:
        return 1

    async def cache() -> object:
        return await plugin.cache.get_or_load_value("foreign", 60, load, int)

    async def database() -> object:
        return await plugin.database.execute_with_retry(
            lambda connection: connection.fetchval("SELECT 1")
        )

    async def redis() -> object:
        return await plugin.redis.redis.get("foreign")

    async def search() -> object:
        return await plugin.jobs.search()

    return {"cache": cache, "database": database, "redis": redis, "search": search}


def run_service(call: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Make a call on an event loop of this thread."""
    asyncio.run(call())


def record_services(when: str, plugin: OperationsPlugin) -> None:
    """Call each service from a fork, from threads with event loops, and from a signal handler."""
    for name, service in services(plugin).items():
        call = partial(run_service, service)
        OUTCOMES[f"{when}: {name}"] = {
            "forked": in_child(call),
            "in threads": at_once(call, SERVICE_CALLS),
            "in a handler": in_handler(call),
        }


def record(when: str, plugin: OperationsPlugin) -> None:
    """Make each kind of call, and note its outcome."""

    def awaited() -> None:
        asyncio.run(plugin.jobs.submit(note, 1))

    def blocking() -> None:
        plugin.jobs.submit_sync(note, 1)

    OUTCOMES[f"{when}: asyncio.run, forked"] = in_child(awaited)
    OUTCOMES[f"{when}: submit_sync, forked"] = in_child(blocking)
    OUTCOMES[f"{when}: asyncio.run, in threads"] = at_once(awaited)
    OUTCOMES[f"{when}: submit_sync, in threads"] = at_once(blocking)
    if threading.current_thread() is threading.main_thread():
        OUTCOMES[f"{when}: submit_sync, in a handler"] = in_handler(blocking)
        OUTCOMES[f"{when}: asyncio.run, in a handler"] = in_handler(awaited)


@contextmanager
def started(plugin: OperationsPlugin) -> Iterator[asyncio.AbstractEventLoop]:
    """Run an application with the plugin, on the loop of a thread."""
    app = Litestar(plugins=[plugin])
    begun, ended = threading.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        async with app.lifespan():
            loops.append(asyncio.get_running_loop())
            begun.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    begun.wait()
    try:
        yield loops[0]
    finally:
        ended.set()
        thread.join()


async def on_a_loop(plugin: OperationsPlugin) -> None:
    """Call from a handler that interrupts an event loop."""
    OUTCOMES["running: submit_sync, on a loop"] = in_handler(
        lambda: plugin.jobs.submit_sync(note, 1)
    )


def main() -> None:
    """Record all outcomes."""
    plugins = [OperationsPlugin(OperationsConfig(tasks=[note])) for _ in range(2)]
    first, second = plugins
    record("before", first)
    record_services("before", first)
    with started(first):
        record("running", first)
        record_services("running", first)
        asyncio.run(on_a_loop(first))
        with started(second):
            record("beside", second)
        OUTCOMES["running: submit_sync, again"] = outcome_of(
            lambda: first.jobs.submit_sync(note, 1)
        )
    record("after", first)
    record_services("after", first)
    json.dump(OUTCOMES, sys.stdout)


if __name__ == "__main__":
    main()
