"""Measures the time of jobs beside culprits: jobs in other queues that go wrong.

Three workers with an API, Postgres and Redis get bystanders at a steady pace, without and with each
kind of culprit in turn. A culprit that uses up a core is compared with a process that does, one
with a huge result with a task that makes the same and drops it, one that uses up the memory with a
task that takes as much, one that forks with a fork whose child ends, and one that ends its worker
with a restart: so the ratio shows the cost of what goes wrong. tests/system/test_culprits.py holds
the bystanders to their ends and numbers of runs, and not to a time.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.bystanders import BYSTANDERS, FINAL, WORKERS, Crew, crew, replacing
from tests.system.control_group import ControlGroup, control_group
from tests.system.culprits import CODE, CONTENT, CULPRITS, NEWER, OLDER, Culprit, refusing
from tests.system.jobs import JOBS
from tests.system.service import percentile

ROUNDS = 5
LEASE = 1.5
BLOCKED_LEASES = 10
INTERPRETER_LEASES = 2.5
PACE_SECONDS = 0.01
"""Time between two bystanders."""
FIRST, EVERY = 20, 25
"""Bystanders before the first culprit, and between two culprits."""
REPEATS = 2
"""Measurements of each control in a round, in which the culprits are measured once."""
MAX_RATIO = 1.5
"""Of a p99 beside culprits to the one without, unless two of the latter differ by more."""
SPARE_MEBIBYTES = 512
"""Memory that the workers may take beyond their present use before the kernel ends one."""
_UNLIMITED_MEBIBYTES = 2**20
TASKS = ("bystanders.notify", "bystanders.analyse")
SETTLED_SECONDS = 60.0
_COLUMNS = (
    "id::text",
    "state",
    "attempts",
    "crashes",
    "extract(epoch from finished_at - created_at)::float8",
)
READING = (
    "The time is from the acceptance of a bystander to its recorded end, by the server's clock. A"
    " bystander whose worker ended runs again once the lease of that worker is over; only the"
    " longest time includes these. A percentile is that of the bystanders of all rounds. In the"
    " rows without culprits the ratio is that of two equal halves of the measurements: the noise."
    " The limit of a ratio is 1.5, or the noise of the row of comparison."
    " No limit holds for the C loop: it stops all threads of its worker. A task"
    " that computes in a thread shares the interpreter with the other jobs of its worker, and one"
    " that allocates all memory blocks the event loop meanwhile."
)


@contextmanager
def _busy_core() -> Iterator[None]:
    """Run a process that does nothing but use a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _restarting(workers: Crew) -> Iterator[None]:
    """Stop a worker, as a deployment does, and start another one."""
    with replacing(workers) as end:
        workers.workers[0].signal(signal.SIGTERM)
        yield
        wait_until(lambda: len(workers.exits) > 0, what="the worker ends")
        workers.exits.clear()
        end()


@contextmanager
def _short_of_memory(workers: Crew) -> Iterator[None]:
    """Let the kernel end a worker that takes much memory, and start another one."""
    assert workers.group is not None  # noqa: S101 - else the case is left out
    workers.group.limit(workers.group.used() + SPARE_MEBIBYTES)
    try:
        with replacing(workers):
            yield
    finally:
        workers.group.limit(_UNLIMITED_MEBIBYTES)


@dataclass(frozen=True)
class Case:
    """A kind of culprit."""

    name: str
    culprits: Sequence[Culprit] = ()
    repeated: bool = False
    """Whether they come again and again while the bystanders run."""
    during: Callable[[Crew], AbstractContextManager[object]] = lambda _: nullcontext()
    """Is entered while they run."""
    without: str = "none"
    """The name of the case that it is compared with."""
    holds_interpreter: bool = False
    """Whether they stop all threads of a worker, which may cost it the lease, as documented."""
    ends_first: bool = False
    """Whether ``during`` lasts until they are final, too."""
    once: bool = False
    """Whether they run once, and count no crash."""
    needs_group: bool = False
    """Whether the kernel must limit the memory of the workers."""


NONE = Case("none")
BUSY = Case("none, beside a busy core", during=lambda _: _busy_core())


def _dropped(what: str) -> Culprit:
    return Culprit("culprits.dropped", what, "completed", None)


RESTART = Case("a worker that restarts", during=_restarting)
TEXTS = Case("10 texts of 60 MB, dropped", [_dropped("big")] * 10)
LISTS = Case("lists, 100,000 deep, dropped", [_dropped("recursive")], repeated=True)
MEMORY = Case("256 MB of memory, dropped", [_dropped("exhaust")], repeated=True)
STEPS = Case(
    f"{SPARE_MEBIBYTES} MB of memory in steps, dropped, and a worker that restarts",
    [_dropped("devour")],
    during=_restarting,
)
FORKS = Case("forks whose children end", [_dropped("fork")] * 2, repeated=True)
CONTROLS = (NONE, BUSY, TEXTS, LISTS, MEMORY, STEPS, FORKS, RESTART)
"""Nothing that goes wrong."""


def _listed(task: str, *payloads: object) -> list[Culprit]:
    return [
        each
        for each in (*CONTENT, *CODE)
        if each.task == f"culprits.{task}" and (not payloads or each.payload in payloads)
    ]


def _quick(name: str, task: str, *payloads: object, without: Case = NONE) -> Case:
    return Case(name, _listed(task, *payloads), repeated=True, without=without.name)


def _blocks(name: str, task: str, how: str, *, core: bool = True) -> Case:
    payload = {"how": how, "seconds": BLOCKED_LEASES * LEASE}
    culprit = Culprit(f"culprits.{task}", payload, state="completed", code=None)
    return Case(name, [culprit], without=(BUSY if core else NONE).name, once=True)


CASES = (
    Case("10 results of 60 MB at once", _listed("big"), without=TEXTS.name),
    _quick("`msgspec.Raw`, 100,000 deep", "deep"),
    _quick("lists, 100,000 deep", "recursive", without=LISTS),
    _quick("lone surrogates", "text", "surrogate", "raw surrogate"),
    _quick("NUL", "text", "nul", "raw nul"),
    _quick("NaN", "text", "nan", "raw nan"),
    _quick("1e400", "text", "1e400"),
    _quick("an encoder that raises", "object", "raises", "exits", "interrupts"),
    _quick("a generator", "object", "generator"),
    _blocks("`time.sleep` on the loop", "block", "sleep", core=False),
    _blocks("Python on the loop", "block", "python"),
    _blocks("`hashlib` on the loop", "block", "hashlib"),
    Case(
        "a C loop on the loop",
        [
            Culprit(
                "culprits.block",
                {"how": "interpreter", "seconds": INTERPRETER_LEASES * LEASE},
                state="completed",
                code=None,
            )
        ],
        without=BUSY.name,
        holds_interpreter=True,
    ),
    _blocks("`time.sleep` in a thread", "block_thread", "sleep", core=False),
    _blocks("Python in a thread", "block_thread", "python"),
    _blocks("`hashlib` in a thread", "block_thread", "hashlib"),
    _quick("fork", "fork", without=FORKS),
    _quick("fork in a thread", "fork_in_thread", without=FORKS),
    _quick("`SystemExit`, `KeyboardInterrupt`", "end"),
    _quick("`SystemExit` in a thread", "end_thread"),
    _quick("the end of a thread from C", "vanish"),
    _quick("`CancelledError`, a task that cancels itself", "cancel"),
    _quick("no memory left", "exhaust", without=MEMORY),
    _quick("swallows cancellation", "swallow"),
    _quick("a thread beyond its timeout", "stuck"),
    _quick("100 tasks left behind", "spawn"),
    Case(
        "a trigger refuses its result",
        [Culprit("culprits.refused", None)],
        repeated=True,
        during=lambda crew: refusing(crew.database, "refused", "completed"),
    ),
    Case(
        "a trigger refuses each outcome",
        [Culprit("culprits.unrecordable", None, state="completed", code=None)],
        during=lambda crew: refusing(crew.database, "unrecordable"),
    ),
    Case(
        "a task and a payload of a newer version",
        [
            Culprit("versions.new", 1, state="cancelled", code=None),
            Culprit("versions.changed", {"amount": "1.00"}, state="cancelled", code="payload"),
        ],
        repeated=True,
    ),
    Case(
        "`os._exit`",
        [Culprit("culprits.end", "exit", code="crashed")],
        during=replacing,
        without=RESTART.name,
        ends_first=True,
    ),
    Case(
        "SIGKILL",
        [Culprit("culprits.end", "kill", code="crashed")],
        during=replacing,
        without=RESTART.name,
        ends_first=True,
    ),
    Case(
        "memory beyond the limit of the kernel",
        [Culprit("culprits.devour", None, code="crashed")],
        during=_short_of_memory,
        without=STEPS.name,
        ends_first=True,
        needs_group=True,
    ),
)


@dataclass
class Seen:
    """The bystanders of one case in one round."""

    seconds: list[float]
    """Without those that ran again because their worker ended."""
    longest: float
    """In seconds, of all."""
    not_completed: int
    again: int
    """Runs beyond the first of each bystander."""
    unexplained: int
    """Of these, those that no crash explains."""
    otherwise: list[str] = field(default_factory=list)
    """The culprits that did not end as documented."""
    repeated: list[str] = field(default_factory=list)
    """The culprits that ran again or count a crash although they must not."""


def _at(share: float, measured: Iterable[Seen]) -> float:
    """Return a percentile of all bystanders in milliseconds."""
    return 1000 * percentile([each for seen in measured for each in seen.seconds], share)


Found = dict[str, list[list[Seen]]]
"""By the name of a case: the times that it was measured in each round."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-bystanders", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--only", nargs="+", default=[], metavar="TEXT", help="culprits with a text in the name")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    cases = [
        case
        for case in CASES
        if not options.only or any(text in case.name for text in options.only)
    ]
    with testbed() as bed, ExitStack() as stack:
        if (group := _control_group(stack)) is None:
            cases = [case for case in cases if not case.needs_group]
        found, exits = _measure(bed, cases, options.rounds, group)
        where = str(bed)
    everything = [each for rounds in found.values() for seen in rounds for each in seen]
    otherwise = [text for each in everything for text in each.otherwise]
    repeated = [text for each in everything for text in each.repeated]
    targets = [
        *(
            Target(
                what=f"p99 beside: {case.name} / {case.without}",
                measured=_ratio(found, case),
                limit=max(MAX_RATIO, round(_noise(found[case.without]), 2)),
                at_least=False,
            )
            for case in cases
            if not case.holds_interpreter
        ),
        *(
            Target(what=what, measured=measured, limit=0, at_least=False, remark=remark)
            for what, measured, remark in (
                ("bystanders that did not complete", sum(e.not_completed for e in everything), ""),
                (
                    "bystanders run again without a crash",
                    sum(e.unexplained for e in everything),
                    "",
                ),
                ("culprits that did not end as documented", len(otherwise), "; ".join(otherwise)),
                ("blocking culprits run again or crashed", len(repeated), "; ".join(repeated)),
                ("workers that SIGTERM did not end with 0", sum(map(bool, exits)), ""),
            )
        ),
    ]
    names = list(found)
    lines = [
        *circumstances(
            command("bench-bystanders"),
            where,
            f"{WORKERS} workers; {BYSTANDERS} bystanders of 10 ms in two queues, one every"
            f" {1000 * PACE_SECONDS:g} ms, in each of {options.rounds} rounds; culprits in the"
            f" queue `default`; JOB_LEASE {LEASE:g} s",
        ),
        "",
        *table(
            ("beside", "p50 ms", "p99 ms", "longest ms", "p99 / without", "run again"),
            (_row(name, found, cases) for name in names),
        ),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("jobs.bystanders", lines, targets, check=options.check, record=not options.dry)


def _row(name: str, found: Found, cases: Sequence[Case]) -> Sequence[str]:
    seen = [each for rounds in found[name] for each in rounds]
    case = next((each for each in cases if each.name == name), None)
    ratio = _noise(found[name]) if case is None else _ratio(found, case)
    return (
        name,
        f"{_at(0.5, seen):.1f}",
        f"{_at(0.99, seen):.1f}",
        f"{1000 * max(each.longest for each in seen):.1f}",
        f"{ratio:.2f}",
        str(sum(each.again for each in seen)),
    )


def _noise(rounds: Sequence[Sequence[Seen]]) -> float:
    """Return the ratio of the p99 of two equal measurements, the larger one to the other."""
    halves = [_at(0.99, half) for half in zip(*rounds, strict=True)]
    return max(halves) / min(halves)


def _ratio(found: Found, case: Case) -> float:
    beside, without = (chain.from_iterable(found[name]) for name in (case.name, case.without))
    return _at(0.99, beside) / _at(0.99, without)


def _control_group(stack: ExitStack) -> ControlGroup | None:
    """Return a group for the workers; None, with the reason printed, without permission."""
    try:
        return stack.enter_context(control_group())
    except pytest.skip.Exception as reason:
        print(f"without the kernel's limit of memory: {reason}", file=sys.stderr)
        return None


def _measure(
    bed: Testbed, cases: Sequence[Case], rounds: int, group: ControlGroup | None
) -> tuple[Found, Sequence[int]]:
    rng = random.Random(rounds)  # noqa: S311 - the same order in each run
    wanted = {case.without for case in cases}
    controls = [case for case in CONTROLS if case.name in wanted]
    with _crew(bed, group) as workers:
        _one(workers, NONE)  # fills caches and pools
        found: Found = {case.name: [] for case in (*controls, *cases)}
        for _ in range(rounds):
            seen: dict[str, list[Seen]] = {name: [] for name in found}
            # Some several times, so that the difference of two shows the noise.
            order = [*cases, *controls * REPEATS]
            for case in rng.sample(order, len(order)):
                one = _one(workers, case)
                seen[case.name].append(one)
                print(
                    f"{case.name}: {_at(0.5, [one]):.1f} {_at(0.99, [one]):.1f}"
                    f" {1000 * one.longest:.1f} ms, run again {one.again}",
                    file=sys.stderr,
                )
            for name, each in seen.items():
                found[name].append(each)
        exits = workers.stop()
    return found, exits


@contextmanager
def _crew(bed: Testbed, group: ControlGroup | None) -> Iterator[Crew]:
    name = bed.ledger()
    environment = {
        **bed.our_environment(name),
        "TASK_MODULES": f"{CULPRITS},{OLDER}",
        "JOB_LEASE": f"{LEASE * 1000:.0f}",
        "JOB_SWEEP_INTERVAL": f"{LEASE * 500:.0f}",
        "JOB_MAX_ATTEMPTS": "1",
        "JOB_MAX_CRASHES": "3",
        "LOG_LEVEL": "info",
    }
    del environment["JOB_CONCURRENCY"]
    with (
        tempfile.TemporaryDirectory() as folder,
        crew(
            Database(bed.postgres, name),
            environment,
            Path(folder),
            group=group,
            service_modules=f"{CULPRITS},{NEWER}",
        ) as workers,
    ):
        yield workers


def _one(workers: Crew, case: Case) -> Seen:
    """Measure the bystanders of one case; return once its culprits are final."""
    ((begun,),) = workers.execute("select clock_timestamp()")
    culprits: list[tuple[str, Culprit]] = []
    base = f"http://127.0.0.1:{workers.service.port}"
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=base, timeout=30))
        stack.enter_context(case.during(workers))
        due = time.monotonic()
        for number in range(BYSTANDERS):
            if number == FIRST or (case.repeated and number % EVERY == FIRST):
                culprits += [
                    (_submit(client, each.task, each.payload), each) for each in case.culprits
                ]
            _submit(client, TASKS[number % len(TASKS)], number)
            due += PACE_SECONDS
            time.sleep(max(0.0, due - time.monotonic()))
        rows = wait_until(
            lambda: _final(workers, begun), seconds=SETTLED_SECONDS, what="bystanders end"
        )
        for each, culprit in culprits:
            if culprit.state == "cancelled":
                client.post(f"{JOBS}/{each}/cancel").raise_for_status()
        if case.ends_first:
            _otherwise(workers, culprits)
    otherwise = _otherwise(workers, culprits)
    if case.holds_interpreter:
        otherwise = [text for text in otherwise if "crashed" not in text]
    for worker in workers.workers:
        worker.wait_ready()
    wait_until(workers.is_well, seconds=SETTLED_SECONDS, what=lambda: str(workers.health()))
    notes = workers.notes()
    ends = {each: workers.final(each) for each, _ in culprits} if case.once else {}
    repeated = [
        f"{case.name}: {notes[each, 'begun']} runs, {shown['crashes']} crashes"
        for each, shown in ends.items()
        if (notes[each, "begun"], shown["crashes"]) != (1, 0)
    ]
    again = [(notes[row[0], "begun"] - 1, row[3]) for row in rows]
    return Seen(
        [row[4] for row in rows if not row[3]],
        max(row[4] for row in rows),
        sum(row[1] != "completed" for row in rows),
        sum(runs for runs, _ in again),
        sum(not 0 <= runs <= crashes for runs, crashes in again),
        otherwise,
        repeated,
    )


def _submit(client: httpx.Client, task: str, payload: object) -> str:
    answer = client.post(JOBS, json={"task": task, "payload": payload})
    answer.raise_for_status()
    return str(answer.json()["id"])


def _final(workers: Crew, begun: object) -> list[tuple[Any, ...]] | None:
    """Return the bystanders since a moment, once all are final."""
    states = ", ".join(f"'{state}'" for state in FINAL)
    rows = workers.execute(
        f"select {', '.join(_COLUMNS)} from viralfx_all_jobs where task like 'bystanders.%'"  # noqa: S608 - of this script
        f" and created_at >= '{begun}' and state in ({states})"
    )
    return rows if len(rows) == BYSTANDERS else None


def _otherwise(workers: Crew, culprits: Sequence[tuple[str, Culprit]]) -> list[str]:
    """Wait for the end of culprits; return those that did not end as documented."""
    otherwise = []
    for each, culprit in culprits:
        shown = workers.final(each, seconds=SETTLED_SECONDS)
        end = shown["state"], shown["error"] and shown["error"]["code"]
        if end != (culprit.state, culprit.code):
            otherwise.append(f"{culprit} {end}")
    return otherwise


if __name__ == "__main__":
    sys.exit(main())
