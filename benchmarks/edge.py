"""Measures the cost of hostile and idle clients: memory, descriptors, and probe times.

The server has one core. The probes have the other one; the attacker uses the rest of it.
"""

import argparse
import json
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import BARE_LITESTAR, CLIENT_CORE, Program, Server, on_core, viralfx
from tests.edge.flood import MIB
from tests.edge.test_exhaustion import PeakMemory
from tests.edge.wire import silent
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.system.control_group import control_group
from tests.system.service import Prober, percentile, request

CONNECTIONS = 1000
TOTAL_MIB = 600
LIMIT_MIB = 256
RATE_MIB = 60
"""MiB a second of the flood with targets: 600 MiB in 10 s, which used 3 GiB before the limits."""
CHUNKING, CHUNK_MIB = 20, 200
"""Connections that send bodies in chunks of one byte, and the MiB of all together."""
DESCRIPTORS = 256
HEAD_TIMEOUT = 2.0
IDLE = 10_000
FIRST = 1000
"""Idle connections before the first measurement of memory; the first ones reuse free memory."""
ROUNDS = 3
CALM_SECONDS = 5.0
LINE = "HTTP request rejected"
PROBE_MS = 50.0
# The same timeout as viralfx serve: uvicorn's 5 s would close most connections too early.
PATIENT_LITESTAR = replace(
    BARE_LITESTAR, arguments=(*BARE_LITESTAR.arguments, "--timeout-keep-alive", "75")
)
READING = (
    "The targets are for the limited flood. An attacker without a limit fills the core that it "
    "shares with the probes, so their times are those of a busy machine, not of the server. "
    "Growth is the peak of RSS over that before the attack. Times of probes are from connect to "
    "the end of the answer, each over a new connection. Memory per idle connection is how much RSS "
    "grows from the first thousand of them to the last one; medians of the rounds."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-edge", description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    add("--mebibytes", type=int, default=TOTAL_MIB, help=f"default: {TOTAL_MIB}")
    add("--idle", type=int, default=IDLE, help=f"default: {IDLE}")
    options = parser.parse_args(arguments)
    _raise_descriptors(options.idle + 500)
    with on_core(CLIENT_CORE):
        flooded = _flooded(options.mebibytes, RATE_MIB)
        fastest = _flooded(options.mebibytes, 0)
        chunks = _flooded(CHUNK_MIB, -1, CHUNKING)
        calm = _flooded(0, 0)
        starved = _starved()
        pairs = [
            [_idle(program, options.idle) for program in (_serve(), PATIENT_LITESTAR)]
            for _ in range(ROUNDS)
        ]
    ours, bare = (_median([pair[side] for pair in pairs]) for side in (0, 1))
    targets = [
        *_flood_targets(flooded),
        *_chunk_targets(chunks),
        *_starved_targets(starved),
        *_idle_targets(ours, bare),
    ]
    lines = [
        *circumstances(
            command("bench-edge"),
            f"Flood: {CONNECTIONS} connections at once, each of which is replaced when the server "
            f"ends it; {options.mebibytes} MiB in all, {RATE_MIB} MiB a second; {flooded.limit}",
            f"Chunks: {CHUNKING} connections send bodies in chunks of one byte, {CHUNK_MIB} MiB in "
            "all, as fast as the server reads; the path has no handler",
            f"Descriptors: `ulimit -n {DESCRIPTORS}`, 1000 silent connections, "
            f"`HTTP_HEAD_TIMEOUT={HEAD_TIMEOUT * 1000:.0f}`",
            f"Idle: {options.idle} connections, each after one answer",
        ),
        "",
        *_flood_table(calm, flooded, fastest, chunks),
        "",
        *_idle_table(ours, bare),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("edge.py", lines, targets, check=options.check, record=not options.dry)


def _raise_descriptors(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        sys.exit(f"the hard limit of open files is {hard}, and this needs {wanted}: raise it")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _serve(**environment: str) -> Program:
    return viralfx("viralfx serve", ACCESS_LOG="false", **environment)


@contextmanager
def _with_management(before: str, **environment: str) -> Iterator[tuple[Server, int]]:
    management = free_port()
    program = _serve(MANAGEMENT_PORT=str(management), **environment)
    with Server(program, before=before) as server:
        server.wait_for_200("/health/ready", seconds=60)
        yield server, management


def _lines(server: Server) -> Counter[str]:
    """Return the number of log lines for each reason."""
    lines = [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]
    return Counter(str(line["reason"]) for line in lines if line["message"] == LINE)


def _p99(prober: Prober) -> float:
    """Return milliseconds; infinite if a probe got no response."""
    failed = any(sighting.status != 200 for sighting in prober.seen)
    return float("inf") if failed else 1000 * percentile([s.seconds for s in prober.seen], 0.99)


# -- requests without end ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flooded:
    """A server under a flood of endless requests."""

    limit: str
    seconds: float
    growth: float
    """MiB."""
    ends: dict[str, int]
    p99: tuple[float, float]
    """Milliseconds, of the API port and the management port."""
    lines: Counter[str]


def _flooded(mebibytes: int, each_second: int, connections: int = CONNECTIONS) -> Flooded:
    """Measure under a flood of this size and rate; a size of 0 means no flood, a rate of -1 chunks.

    The server rejects requests without end, and reads bodies in chunks to their end.
    """
    with ExitStack() as stack:
        before, limit = "", "no control group could be made"
        try:
            group = stack.enter_context(control_group())
        except pytest.skip.Exception as reason:
            print(reason, file=sys.stderr)
        else:
            group.limit(LIMIT_MIB)
            before = f"echo $$ > {group.path}/cgroup.procs"
            limit = f"in a control group of {LIMIT_MIB} MiB"
        server, management = stack.enter_context(_with_management(before))
        memory = stack.enter_context(PeakMemory(server.pid))
        probers = [
            stack.enter_context(Prober(port, "/health/live", period=0.005, timeout=5.0))
            for port in (server.port, management)
        ]
        if not mebibytes:
            time.sleep(CALM_SECONDS)
            return Flooded(
                limit, CALM_SECONDS, 0.0, {}, (_p99(probers[0]), _p99(probers[1])), Counter()
            )
        began = time.monotonic()
        attacker = [sys.executable, "-m", "benchmarks.edge_attacker", str(server.port)]
        done = subprocess.run(
            [*attacker, str(connections), str(mebibytes), str(each_second)],
            cwd=Path(__file__).resolve().parents[1],
            check=True,
            capture_output=True,
            text=True,
        )
        seconds = time.monotonic() - began
        if each_second >= 0:
            wait_until(lambda: _lines(server), what="a line")
        p99 = _p99(probers[0]), _p99(probers[1])
        ends: dict[str, int] = json.loads(done.stdout)
        return Flooded(limit, seconds, memory.growth / MIB, ends, p99, _lines(server))


def _flood_table(*floods: Flooded) -> list[str]:
    names = (
        "none",
        f"{RATE_MIB} MiB/s",
        "as fast as it goes, for orientation",
        "chunks of one byte",
    )
    return table(
        ("flood", "s", "growth, MiB", "p99 API, ms", "p99 management, ms", "connections ended by"),
        (
            (
                name,
                f"{flooded.seconds:.1f}",
                f"{flooded.growth:.1f}",
                *(f"{p99:.1f}" for p99 in flooded.p99),
                ", ".join(f"{count} x {how}" for how, count in sorted(flooded.ends.items())),
            )
            for name, flooded in zip(names, floods, strict=True)
        ),
    )


def _flood_targets(flooded: Flooded) -> list[Target]:
    kept = sum(count for how, count in flooded.ends.items() if how == "open")
    minutes = 1 + flooded.seconds // 60
    api, management = flooded.p99
    return [
        _at_most("flood: growth of RSS", flooded.growth, 64, " MiB"),
        _at_most("flood: p99 of live, API port", api, PROBE_MS, " ms"),
        _at_most("flood: p99 of live, management port", management, PROBE_MS, " ms"),
        _at_most("flood: connections that stay open", kept, 0),
        _at_most("flood: lines a minute of one reason", max(flooded.lines.values()) / minutes, 1),
    ]


def _chunk_targets(flooded: Flooded) -> list[Target]:
    api, management = flooded.p99
    return [
        _at_most("chunks: growth of RSS", flooded.growth, 64, " MiB"),
        _at_most("chunks: p99 of live, API port", api, PROBE_MS, " ms"),
        _at_most("chunks: p99 of live, management port", management, PROBE_MS, " ms"),
        _at_most("chunks: connections that end", CHUNKING - flooded.ends.get("open", 0), 0),
    ]


# -- no descriptor left --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Starved:
    """A server with fewer descriptors than silent connections."""

    back_after: float
    """Seconds from the last silent connection to a response of the API port."""
    lost: int
    """Failed probes of the management port."""
    memory_failures: int
    lines: Counter[str]


def _starved() -> Starved:
    environment = {
        "HTTP_HEAD_TIMEOUT": f"{HEAD_TIMEOUT * 1000:.0f}",
        "HEALTH_CHECK_INTERVAL": "500",
    }
    with (
        _with_management(f"ulimit -n {DESCRIPTORS}", **environment) as (server, management),
        Prober(management, "/health/live", timeout=5.0) as live,
        Prober(management, "/health/memory", timeout=5.0) as memory,
        silent(server.port, 1000),
    ):
        began = time.monotonic()
        wait_until(lambda: _status(server.port) == 200, seconds=60, what="the API port answers")
        back_after = time.monotonic() - began
        wait_until(lambda: _lines(server)["connections"], what="a line about connections")
        failures = [sum(seen.status != 200 for seen in p.seen) for p in (live, memory)]
        return Starved(back_after, failures[0], failures[1], _lines(server))


def _status(port: int) -> int | None:
    try:
        return request(port, "/health/live", timeout=1.0).status
    except OSError:
        return None


def _starved_targets(starved: Starved) -> list[Target]:
    return [
        _at_most("descriptors: probes of the management port that fail", starved.lost, 0),
        _at_most("descriptors: check `memory` that fails", starved.memory_failures, 0),
        _at_most("descriptors: API port answers after", starved.back_after, HEAD_TIMEOUT + 1, " s"),
        _at_most("descriptors: lines about connections", starved.lines["connections"], 1),
    ]


# -- idle connections ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Idle:
    """A server with many idle connections."""

    program: Program
    each: float
    """KiB per connection."""
    p99: float
    """Probe time beside them, in milliseconds."""
    stop: float
    """Seconds."""
    code: int


def _idle(program: Program, count: int) -> Idle:
    head = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with Server(program) as server, ExitStack() as held:
        server.wait_for_200("/health/live", seconds=60)
        before, first = 0, min(FIRST, count // 2)
        for number in range(count):
            if number == first:
                before = server.rss()
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            held.callback(connection.close)
            connection.sendall(head)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")  # noqa: S101 - else useless
        each = (server.rss() - before) / (count - first) / 1024
        with Prober(server.port, "/health/live", period=0.002) as prober:
            wait_until(lambda: len(prober.seen) > 300, seconds=30, what="probes")
        server.terminate()
        code, stop = server.wait_for_exit(seconds=60)
    return Idle(program, each, _p99(prober), stop, code)


def _median(rounds: Sequence[Idle]) -> Idle:
    return Idle(
        rounds[0].program,
        statistics.median(each.each for each in rounds),
        statistics.median(each.p99 for each in rounds),
        max(each.stop for each in rounds),
        max((each.code for each in rounds), key=abs),
    )


def _idle_targets(ours: Idle, bare: Idle) -> list[Target]:
    return [
        _at_most("idle: memory per connection", ours.each, round(bare.each, 2), " KiB"),
        _at_most("idle: time of a stop", ours.stop, 1, " s"),
        _at_most("idle: exit code of a stop", ours.code, 0),
    ]


def _idle_table(*idle: Idle) -> list[str]:
    return table(
        ("idle connections", "KiB each", "p99 of live, ms", "stop, s", "exit code"),
        (
            (
                each.program.name,
                f"{each.each:.2f}",
                f"{each.p99:.2f}",
                f"{each.stop:.2f}",
                str(each.code),
            )
            for each in idle
        ),
    )


def _at_most(what: str, measured: float, limit: float, unit: str = "") -> Target:
    return Target(what=what, measured=measured, limit=limit, at_least=False, unit=unit)


if __name__ == "__main__":
    sys.exit(main())
