"""Measures the effect of a dead, frozen, slow or failing trace collector on requests.

A steady 500 requests a second go to ``viralfx serve``, and every request is traced. The collector
works during the warm-up and then fails for the rest of the round. Rounds with a working collector
run in between; the difference between them is the noise.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.load import core_seconds, own_seconds, wait_for_calm
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import CLIENT_CORE, ROOT, Program, Server, on_core, viralfx
from benchmarks.trace_receiver import TraceReceiver

RATE = 500
SECONDS = 60.0
WARM_UP = 5.0
DELAY = 2.0
"""Seconds that a slow collector takes to answer."""
PATH = "/work"
MIB = 2**20
MAX_FOREIGN = 0.4
"""A round is repeated if other processes used more than this share of a core."""
MAX_REPEATS = 2
MAX_WAITING = 20.0
"""Seconds to wait before each round until other processes are idle."""
_POLL_SECONDS = 0.25
_CLIENT = Path(__file__).with_name("steady.py")

MAX_P99 = 1.5
MAX_GROWTH = 16.0
"""MiB of RSS: 2048 waiting spans, one batch in flight, and memory that the allocator keeps."""
MAX_LATE_GROWTH = 8.0
"""MiB of RSS in the second half; leaked spans of some 3 kB each would be 45 MiB."""
STOPS = {True: 5.0, False: 0.5}
"""Seconds that docs/tracing.md allows for the last spans, by whether the collector receives them.
"""
OTHER_SECONDS = 1.0
"""Seconds for the other parts of a stop."""

HEALTHY, OFF = "healthy", "no endpoint"
Break = Callable[[TraceReceiver], object]
FAULTS: Mapping[str, Break] = {
    "dead": lambda receiver: receiver.kill(),
    "frozen": lambda receiver: receiver.freeze(),
    f"slow, {DELAY:g} s": lambda receiver: receiver.behave(delay=DELAY),
    "erring, 503": lambda receiver: receiver.behave(status=503),
}
_FIRST, _SECOND, _THIRD, _FOURTH = FAULTS
ORDER = (OFF, HEALTHY, _FIRST, _SECOND, HEALTHY, _THIRD, _FOURTH, HEALTHY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One process under load, from start to stop."""

    state: str
    responses: Mapping[str, Any]
    """The client's results during the measurement."""
    rss: Sequence[float]
    """MiB, at equal intervals from the start of the load to its end."""
    spans_lost: int | None
    busy: float
    foreign: float
    stop: float
    code: int

    @property
    def works(self) -> bool:
        """Whether the collector received spans until the end."""
        return self.state in {HEALTHY, OFF}

    @property
    def errors(self) -> int:
        """Requests without a successful response."""
        return sum(self.responses["lost"].values())

    @property
    def late_growth(self) -> float:
        """Growth of RSS in the second half, in MiB."""
        return self.rss[-1] - self.rss[len(self.rss) // 2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-collector", description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="exit 1 when a limit is broken")
    add("--seconds", type=float, default=SECONDS, help=SHORT)
    options = parser.parse_args(arguments)
    seen = [_calm_life(state, options.seconds) for state in ORDER]
    targets = _targets(seen)
    lines = [
        *circumstances(
            command("bench-collector"),
            f"Load: {RATE} requests/s to `{PATH}`, independent of responses, for "
            f"{options.seconds:g} s after {WARM_UP:g} s with a collector that works; client and "
            "collector on one core, the server on the other",
            "Traces: OTLP by HTTP, every request recorded, and nothing else of OTEL_* set: the "
            "queue of 2048 spans is full after 4 s",
            f"Rounds in which others took more than {MAX_FOREIGN:.0%} of a core were repeated, up "
            f"to {MAX_REPEATS} times; the calmest count",
        ),
        "",
        *_table(seen),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    # A short run is only a rehearsal.
    recorded = options.seconds >= SECONDS
    return publish("collector.py", lines, targets, check=options.check, record=recorded)


SHORT = (
    f"of each state; default: {SECONDS:g}. Less is a rehearsal, not recorded; below 20 s "
    "memory is still filling up and a slow collector not yet known to be one"
)
READING = (
    "Times are from a request's sending to its answer. RSS is that of the server: when the fault "
    "begins, its peak, at the end, and by how much it grew in the second half. Spans are lost "
    "where the collector did not get them, out of one for each request, those of the warm-up "
    "included. Stop is from SIGTERM, sent at the end of the load, to the end of the process; of "
    f"that a collector may take {STOPS[True]:g} s where spans arrive and {STOPS[False]:g} s where "
    "they are known not to."
)


def _calm_life(state: str, seconds: float) -> Seen:
    lives: list[Seen] = []
    while not lives or (lives[-1].foreign > MAX_FOREIGN and len(lives) <= MAX_REPEATS):
        lives.append(_live(state, seconds))
    return min(lives, key=lambda seen: seen.foreign)


def _live(state: str, seconds: float) -> Seen:
    wait_for_calm(most_foreign=MAX_FOREIGN / 4, seconds=MAX_WAITING)
    with ExitStack() as stack:
        receiver = None if state == OFF else stack.enter_context(TraceReceiver())
        server = stack.enter_context(Server(_program(receiver)))
        server.wait_for_200(PATH)
        warm, _ = _load(server, WARM_UP)
        arrived = 0
        if receiver is not None and state in FAULTS:
            arrived = receiver.received()
            FAULTS[state](receiver)
        began, before = time.monotonic(), _seconds_used(server, receiver)
        responses, rss = _load(server, seconds)
        took, after = time.monotonic() - began, _seconds_used(server, receiver)
        server.terminate()
        code, stop = server.wait_for_exit()
        lost = None
        if receiver is not None:
            if state not in {"dead", "frozen"}:
                arrived = receiver.received()
            # Plus one for the first response.
            lost = 1 + warm["answered"] + responses["answered"] - arrived
    return Seen(
        state=state,
        responses=responses,
        rss=rss,
        spans_lost=lost,
        busy=(after[0] - before[0]) / took,
        foreign=max(0.0, (after[1] - before[1]) / took),
        stop=stop,
        code=code,
    )


def _program(receiver: TraceReceiver | None) -> Program:
    environment = {}
    if receiver is not None:
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{receiver.port}"
    return viralfx("viralfx serve --app", "benchmarks.peers.mounted", **environment)


def _load(server: Server, seconds: float) -> tuple[dict[str, Any], list[float]]:
    """Run the load; return the client's results, and samples of the server's RSS."""
    rss = [server.rss() / MIB]
    arguments = (str(server.port), PATH, str(RATE), str(seconds))
    with on_core(CLIENT_CORE):
        client = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{_CLIENT.stem}", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
    with client:
        while client.poll() is None:
            time.sleep(_POLL_SECONDS)
            rss.append(server.rss() / MIB)
        said = client.stdout.read() if client.stdout else ""
    return json.loads(said), rss


def _seconds_used(server: Server, receiver: TraceReceiver | None) -> tuple[float, float]:
    """Return the processor time of the server, and that of unrelated processes."""
    served = server.cpu_seconds()
    received = 0.0 if receiver is None else receiver.cpu_seconds()
    return served, core_seconds() - own_seconds() - served - received


def _targets(seen: Sequence[Seen]) -> list[Target]:
    healthy = [each.responses["p99"] for each in seen if each.state == HEALTHY]
    spread = f"healthy rounds: {min(healthy):.2f} to {max(healthy):.2f} ms"
    targets = [
        Target(
            what=f"p99, {each.state} / the slowest healthy round",
            measured=each.responses["p99"] / max(healthy),
            limit=MAX_P99,
            at_least=False,
            remark=spread,
        )
        for each in seen
        if each.state in FAULTS
    ]

    def at_most(what: str, measured: float, limit: float, unit: str = "") -> Target:
        return Target(what=what, measured=measured, limit=limit, at_least=False, unit=unit)

    growth = max(max(each.rss) - each.rss[0] for each in seen)
    stops = {works: [e.stop for e in seen if e.works is works] for works in STOPS}
    return [
        *targets,
        at_most("requests without a good answer", sum(each.errors for each in seen), 0),
        at_most("most growth of RSS", growth, MAX_GROWTH, " MiB"),
        at_most(
            "most growth of RSS in the second half",
            max(each.late_growth for each in seen),
            MAX_LATE_GROWTH,
            " MiB",
        ),
        at_most(
            "spans lost with a collector that works",
            sum(each.spans_lost or 0 for each in seen if each.works),
            0,
        ),
        at_most(
            "longest stop where spans arrive",
            max(stops[True]),
            STOPS[True] + OTHER_SECONDS,
            " s",
        ),
        at_most(
            "longest stop where they do not",
            max(stops[False]),
            STOPS[False] + OTHER_SECONDS,
            " s",
        ),
        at_most("exit codes other than 0", sum(each.code != 0 for each in seen), 0),
    ]


def _table(seen: Sequence[Seen]) -> list[str]:
    header = (
        "collector",
        "p50 ms",
        "p99 ms",
        "max ms",
        "requests",
        "errors",
        "RSS MiB: start",
        "peak",
        "end",
        "late growth",
        "spans lost",
        "server busy",
        "others' CPU",
        "stop s",
        "exit code",
    )
    return table(
        header,
        (
            (
                each.state,
                *(f"{each.responses[name]:.2f}" for name in ("p50", "p99", "max")),
                f"{each.responses['answered']:,}",
                str(each.errors),
                *(f"{value:.1f}" for value in (each.rss[0], max(each.rss), each.rss[-1])),
                f"{each.late_growth:+.1f}",
                "-" if each.spans_lost is None else f"{each.spans_lost:,}",
                f"{each.busy:.0%}",
                f"{each.foreign:.0%}",
                f"{each.stop:.2f}",
                str(each.code),
            )
            for each in seen
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
