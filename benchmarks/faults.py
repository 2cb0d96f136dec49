"""Measures probes before and during faults of Postgres, of Redis and of a check.

Each fault has a process of its own under an open-loop load. The control is the same process before
the fault. The server has one core and the load the other one.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import CLIENT_CORE, Program, Server, on_core
from tests.servers import supply
from tests.servers.postgres import PostgresServer, postgres_server
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import wait_until
from tests.system.load import Load
from tests.system.service import command as viralfx
from tests.system.service import percentile, request

SECONDS, RATE = 20.0, 200.0
PROBES, PROBE_MS, MAX_MEDIAN = ("/health/live", "/health/ready"), 50.0, 2.0
RATES = dict.fromkeys(PROBES, 40.0)
WATCH_RATE = 50.0
"""Requests a second to the endpoint that shows the fault; the rest of ``RATE`` is work."""
TIMEOUT, INTERVAL, MARGIN = 1.0, 0.5, 1.0
"""Seconds: of a check, between two runs of it, and beyond these until it shows."""
HEADER = ("p50 ms before", "during", "ratio", "p99 ms before", "during", "ratio")
READING = (
    "Times of probes are from connect to the end of the answer, each over a new connection. The"
    " time until 503 is from the begin of the fault, and that until 200 from its end: for a killed"
    " server from when it accepts connections again. They are those of `/health/ready` for"
    " Postgres, and of the check's own endpoint for others. The check hangs without end."
)

FAULTS = {
    "Postgres frozen": ("freeze", "thaw"),
    "Postgres killed": ("kill", "start"),
    "Postgres refusing": ("stop", "start"),
    "Redis frozen": ("freeze", "thaw"),
    "Redis killed": ("kill", "start"),
    "check hangs": None,
}
"""The methods of a server that begin and end a fault."""


class Place(NamedTuple):
    """A process, its work, the endpoint that shows its fault, and begin and end of the fault."""

    port: int
    work: str
    watched: str
    begin: Callable[[], object]
    end: Callable[[], object] | None


@contextmanager
def _place(fault: str, seconds: float) -> Iterator[Place]:
    if (ways := FAULTS[fault]) is None:
        passes = round(seconds / INTERVAL) + 6
        planted = {"PLANTED_CHECK": "hang", "PLANTED_PASSES": str(passes)}
        with _serving("tests.system.apps:planted", planted) as port:
            attempts = partial(request, port, "/attempts")
            hangs = partial(wait_until, lambda: attempts().json()["attempts"] > passes)
            yield Place(port, "/work", "/health/planted", hangs, None)
        return
    with ExitStack() as stack:
        server: PostgresServer | RedisServer
        if fault.startswith("Postgres"):
            server, paths = stack.enter_context(postgres_server()), ("/query", PROBES[1])
            environment = {"DATABASE_URL": server.url()}
            viralfx("migrate", environment=environment).check_returncode()
        else:
            server = stack.enter_context(redis_server())
            environment = {"REDIS_HOST": server.host, "REDIS_PORT": str(server.port)}
            paths = ("/cached", "/health/redis")
        port = stack.enter_context(_serving("tests.system.backend_app:app", environment))
        begin, end = (getattr(server, way) for way in ways)
        yield Place(port, *paths, begin, end)


@contextmanager
def _serving(app: str, environment: Mapping[str, str]) -> Iterator[int]:
    names = ("HEALTH_CHECK_INTERVAL", "DB_HEALTH_CHECK_INTERVAL")
    times = {**dict.fromkeys(names, "500"), "HEALTH_CHECK_TIMEOUT": "1000"}
    arguments = ("-m", "viralfx", "serve", "--host", "127.0.0.1", "--port", "{port}", "--app", app)
    program = Program(name=app, arguments=arguments, environment={**times, **environment})
    with Server(program) as server:
        server.wait_for_200("/health/ready", seconds=60)
        yield server.port


class Seen(NamedTuple):
    """The times of the probes in seconds before and during a fault, and until it is shown."""

    times: Sequence[Mapping[str, list[float]]]
    not_alive: int
    until: Mapping[int, float]

    def figures(self, path: str, share: float) -> tuple[float, float, float]:
        """Return a percentile in milliseconds before and during the fault, and the ratio."""
        before, during = (1000 * percentile(each[path], share) for each in self.times)
        return before, during, during / before


def _measure(fault: str, seconds: float) -> Seen:
    with _place(fault, seconds) as place, ExitStack() as stack:
        rates = {**RATES, place.watched: RATES.get(place.watched, WATCH_RATE)}
        rates[place.work] = RATE - sum(rates.values())
        with on_core(CLIENT_CORE):
            load = stack.enter_context(Load(place.port, rates))
        wait_until(lambda: len(load.responses) > RATE, what="traffic")
        began = time.monotonic()
        time.sleep(seconds)
        broken = time.monotonic()
        place.begin()
        if place.end is None:  # it began during the call
            broken = time.monotonic()
        until = {503: _until(load, place.watched, 503, broken)}
        time.sleep(max(0.0, broken + seconds - time.monotonic()))
        mended = time.monotonic()
        if place.end is not None:
            place.end()
            until[200] = _until(load, place.watched, 200, time.monotonic())
    times = [
        {path: [a.seconds for a in load.of(path) if since <= a.at < to] for path in PROBES}
        for since, to in ((began, broken), (broken, mended))
    ]
    return Seen(times, sum(a.status != 200 for a in load.of(PROBES[0])), until)


def _until(load: Load, path: str, status: int, since: float) -> float:
    """Return the seconds until the end of the first response with a status."""

    def ends() -> list[float]:
        return [a.at + a.seconds for a in load.of(path, since=since) if a.status == status]

    return wait_until(ends, seconds=60, what=f"{path} answers {status}")[0] - since


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-faults", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, help=f"before and of a fault; default: {SECONDS}")
    add("--only", nargs="+", default=[""], metavar="TEXT", help="faults with a text in the name")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    names = [name for name in FAULTS if any(text in name for text in options.only)]
    seen = {name: _measure(name, options.seconds) for name in names}
    targets = list(_targets(list(seen.values())))
    lines = [
        *circumstances(
            command("bench-faults"),
            f"Postgres {supply.chosen().postgres}, Redis {supply.chosen().redis}",
            f"{RATE:g} requests/s, of which {RATES[PROBES[0]]:g} to each probe, for"
            f" {options.seconds:g} s before the fault and as long during it;"
            f" HEALTH_CHECK_TIMEOUT {TIMEOUT:g} s, intervals {INTERVAL:g} s",
        ),
        "",
        *table(
            ("fault", "probe", *HEADER, "s until 503", "s until 200"),
            (_row(name, each, path) for name, each in seen.items() for path in PROBES),
        ),
        *("", *target_table(targets), "", READING),
    ]
    return publish("faults.py", lines, targets, check=options.check, record=not options.dry)


def _row(fault: str, seen: Seen, path: str) -> Sequence[str]:
    figures = (*seen.figures(path, 0.5), *seen.figures(path, 0.99))
    times = (f"{seen.until[each]:.2f}" if each in seen.until else "-" for each in (503, 200))
    return (fault, f"`{path}`", *(f"{each:.2f}" for each in figures), *times)


def _at_most(what: str, measured: Iterable[float], limit: float, unit: str = "") -> Target:
    found = max(measured, default=0.0)
    return Target(what=what, measured=found, limit=limit, at_least=False, unit=unit)


def _targets(seen: Sequence[Seen]) -> Iterator[Target]:
    for path in PROBES:
        latest = [each.figures(path, 0.99)[1] for each in seen]
        medians = [each.figures(path, 0.5)[2] for each in seen]
        yield _at_most(f"p99 of `{path}` during a fault, at most", latest, PROBE_MS, " ms")
        yield _at_most(f"median of `{path}` during a fault / before, at most", medians, MAX_MEDIAN)
    yield _at_most("probes of one process that were not alive", [e.not_alive for e in seen], 0)
    for status, limit in ((503, TIMEOUT + INTERVAL + MARGIN), (200, INTERVAL + MARGIN)):
        times = [each.until[status] for each in seen if status in each.until]
        yield _at_most(f"time until {status}, at most", times, limit, " s")


if __name__ == "__main__":
    sys.exit(main())
