"""Rules about what documents show: commands, examples, manifests, figures and numbers.

Each rule is as in :mod:`tests.architecture.claims`.
"""

import argparse
import ast
import builtins
import inspect
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import yaml
from tests.architecture.claims import (
    CODE,
    ROOT,
    blocks,
    code_words,
    is_path,
    operations,
    prose,
    statuses,
    tables,
)
from tests.deploy.program_rules import GRACE, PHASES

import viralfx
from viralfx.adapters.process_memory import FAIL_AT, WARN_AT
from viralfx.adapters.redis.retry import retry_policy
from viralfx.cli import _parser
from viralfx.domain import fleet
from viralfx.resilience.policy import BackoffPolicy
from viralfx.web.console import feed

# -- commands ------------------------------------------------------------------------------------

PROGRAMS = frozenset(
    {
        "alias",
        "amtool",
        "bash",
        "cat",
        "cd",
        "cp",
        "curl",
        "date",
        "do",
        "docker",
        "done",
        "echo",
        "env",
        "exit",
        "export",
        "fi",
        "for",
        "git",
        "grep",
        "head",
        "helm",
        "if",
        "install",
        "jq",
        "kill",
        "kubectl",
        "kustomize",
        "litestar",
        "openssl",
        "pip",
        "printf",
        "psql",
        "python",
        "python3",
        "redis-cli",
        "sleep",
        "sort",
        "sudo",
        "systemctl",
        "tail",
        "then",
        "timeout",
        "uniq",
        "useradd",
        "uv",
        "viralfx",
        "wait",
        "wc",
        "while",
    }
)
"""Programs that a shell block may start, beside those of this repository."""


@cache
def recipes() -> frozenset[str]:
    """Return the names of the recipes of the justfile."""
    text = (ROOT / "justfile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^([a-z][a-z-]*)(?: (?!:=).*)?:(?: .*)?$", text, re.MULTILINE))


@cache
def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command of the program."""
    found = nested(_parser())
    assert found, "the program has no commands"
    return found


def nested(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command below one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def commands(text: str) -> Iterator[str]:
    """Report recipes, commands and options that do not exist, in code and in shell blocks."""
    for code in CODE.findall(prose(text)):
        words = code.split()
        if words[0].endswith("just") and len(words) > 1 and words[1] not in recipes():
            yield f"command: there is no recipe {words[1]}"
        yield from _own(words)
    for block in blocks(text, "bash"):
        yield from _syntax(block)
        whole = re.sub(r"\\\n\s*", "", block)
        for line in re.sub(r"'[^']*'", "''", whole).splitlines():
            for part in re.split(r"\|\|?|&&|;|\$\(|<\(", line):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:
                    words = part.split()
                words = words[next((at for at, w in enumerate(words) if "=" not in w), 99) :]
                if words:
                    yield from _program(words)
        served = r"(?<![@/\w])(?:http://)?(?:localhost:\d+|127\.0\.0\.1:\d+|\$INSTANCE|\$PROCESS)(/[\w/.]*)"
        for path in re.findall(served, whole):
            if not is_path(path) and not _is_prefix(path):
                yield f"command: there is no path {path}"


@cache
def _syntax(block: str) -> tuple[str, ...]:
    """Return the lines of bash about a block that it cannot read."""
    read = subprocess.run(
        ["/bin/bash", "-n"], input=block, capture_output=True, text=True, check=False
    )
    return tuple(f"command: {line}" for line in read.stderr.splitlines())


def _is_prefix(path: str) -> bool:
    return path.endswith("/") and any(known.startswith(path) for _, known in operations())


def _program(words: list[str]) -> Iterator[str]:
    program = words[0]
    if program.startswith(".ci/"):
        if not (ROOT / program).exists():
            yield f"command: {program} does not exist"
    elif program.rpartition("/")[2] == "just" and len(words) > 1:
        if words[1] not in recipes():
            yield f"command: there is no recipe {words[1]}"
    elif program.startswith(".venv/bin/"):
        name = program.rpartition("/")[2]
        if name not in {"viralfx", "pytest", "ruff", "mypy", "lint-imports", "pip", "python"}:
            yield f"command: {program} does not exist"
    elif re.fullmatch(r"[\w.-]+", program) and program not in PROGRAMS:
        yield f"command: {program} is no program that a reader has"
    yield from _own(words)


def _own(words: list[str]) -> Iterator[str]:
    """Report commands and options that the program does not have."""
    at = next((i for i, word in enumerate(words) if word.rpartition("/")[2] == "viralfx"), None)
    if at is None or at + 1 >= len(words) or "@" in words:
        return
    command, *rest = words[at + 1 :]
    if command.startswith(("-", "$", "<", "...")) or not re.fullmatch(r"[a-z]+", command):
        return
    if command not in subcommands():
        if at == 0:
            yield f"command: there is no viralfx {command}"
        return
    parser = subcommands()[command]
    if (inner := nested(parser)) and rest and re.fullmatch(r"[a-z]+", rest[0]):
        if rest[0] not in inner:
            yield f"command: there is no viralfx {command} {rest[0]}"
            return
        parser = inner[rest[0]]
    known = parser._option_string_actions
    for word in rest:
        if word.startswith("--") and word.split("=")[0] not in known:
            yield f"command: viralfx {command} has no {word}"


# -- code and manifests --------------------------------------------------------------------------

STAND_INS = frozenset(
    {"Guest", "Report", "get", "http_get", "load_report", "sleep", "attempts", "task"}
)
"""Names of the application that an example belongs to."""


def python(text: str) -> Iterator[str]:
    """Report examples that do not compile, and names that they use and the package lacks."""
    known: set[str] = set(dir(builtins)) | STAND_INS | set(viralfx.__all__)
    for block in blocks(text, "python"):
        try:
            tree = compile(
                block, "example", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            )
        except SyntaxError as error:
            yield f"example: {error}"
            continue
        nodes = list(ast.walk(tree))
        for node in nodes:
            yield from _imports(node, known)
        known |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        known |= {n.arg for n in nodes if isinstance(n, ast.arg)}
        known |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
        known |= {
            n.name
            for n in nodes
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        for node in nodes:
            if isinstance(node, ast.Name) and node.id not in known and node.id not in code_words():
                yield f"example: the name {node.id} is not defined"
            if isinstance(node, ast.Attribute) and node.attr not in code_words():
                yield f"example: nothing has an attribute {node.attr}"
            if isinstance(node, ast.Call):
                yield from _call(node)


def _imports(node: ast.AST, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        known |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "viralfx":
        module = __import__(node.module or "", fromlist=["_"])
        for alias in node.names:
            if not hasattr(module, alias.name):
                yield f"example: {node.module} has no {alias.name}"


def _call(node: ast.Call) -> Iterator[str]:
    if not isinstance(node.func, ast.Name) or node.func.id not in viralfx.__all__:
        return
    called = getattr(viralfx, node.func.id)
    if isinstance(called, type) and issubclass(called, Exception):
        called = called.__init__  # an exception without its own one has no signature
    parameters = inspect.signature(called).parameters
    for keyword in node.keywords:
        if keyword.arg is not None and keyword.arg not in parameters:
            yield f"example: {node.func.id} has no argument {keyword.arg}"


@cache
def manifest_probes() -> dict[str, list[dict[str, Any]]]:
    """Return the probes of the base's containers by kind, with the numbers of their ports."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((ROOT / "deploy/kustomize/base").glob("*.yaml")):
        for container in _containers(list(yaml.safe_load_all(path.read_text(encoding="utf-8")))):
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for kind, probe in container.items():
                if kind.endswith("Probe"):
                    get = probe["httpGet"]
                    named = {**get, "port": ports.get(get["port"], get["port"])}
                    found.setdefault(kind, []).append({**probe, "httpGet": named})
    return found


def _containers(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield from (each for each in node.get("containers", []) if isinstance(each, dict))
        for value in node.values():
            yield from _containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from _containers(value)


PATHS_OF_OTHERS = frozenset({"/probe"})
"""Paths of blackbox_exporter."""


def manifests(text: str) -> Iterator[str]:
    """Report YAML that does not parse, and probes that no manifest has."""
    for block in blocks(text, "yaml"):
        try:
            shown = yaml.safe_load(block)
        except yaml.YAMLError as error:
            yield f"yaml: {error}"
            continue
        for kind, probe in shown.items() if isinstance(shown, dict) else ():
            if kind.endswith("Probe") and not any(
                probe.items() <= one.items() for one in manifest_probes().get(kind, [])
            ):
                yield f"yaml: no manifest has this {kind}: {probe}"
        for path in re.findall(r"\b(?:path|metrics_path): *'?(/[\w/{}]*)", block):
            if statuses("GET", path) is None and path not in PATHS_OF_OTHERS:
                yield f"yaml: there is no path {path}"


# -- figures -------------------------------------------------------------------------------------

FIGURES = {
    "`/health/live`": ("probes.py", "viralfx serve `/health/live` / bare ASGI `/health/live`"),
    "an ordinary handler": ("probes.py", "viralfx serve --app `/work` / bare Litestar `/work`"),
    "start of": ("shutdown.py", "start of viralfx serve / start of bare Litestar"),
    "requests lost": ("shutdown.py", "requests lost in 10 stops of viralfx serve under load"),
    "the same with bare uvicorn": (
        "shutdown.py",
        "requests lost in 10 stops of viralfx serve under load",
    ),
    "idle memory": ("memory.py", "idle RSS of viralfx serve / idle RSS of bare Litestar"),
    "metrics": ("telemetry.py", "metrics `/work` / all off `/work`"),
    "metrics, JSON log": ("telemetry.py", "metrics, JSON log `/work` / all off `/work`"),
    "metrics, JSON log, traces": (
        "telemetry.py",
        "metrics, JSON log, traces at 1 % `/work` / all off `/work`",
    ),
    "jobs processed": ("jobs.rates", "viralfx / taskiq RedisStream"),
    "the same, to procrastinate": ("jobs.rates", "viralfx / procrastinate"),
    "the same beside": (
        "jobs.rates",
        "viralfx, 1,000,000 finished / viralfx, 1,000 finished",
    ),
    "jobs accepted": ("jobs.accept", "viralfx serve, Postgres"),
    "a job accepted": (
        "jobs.accept",
        "viralfx serve, Postgres / bare Litestar, one INSERT, 1 client",
    ),
    "jobs that wait 20 ms": (
        "jobs.rates",
        "two worker processes / one, wait 20 ms jobs",
    ),
    "empty jobs": ("jobs.rates", "two worker processes / one, empty jobs"),
    "jobs accepted beside": (
        "ledger.py",
        "accepted, beside 10,000,000 finished / beside none",
    ),
    "jobs claimed beside": ("ledger.py", "claimed, beside 10,000,000 finished / beside none"),
    "counts of all queues": ("ledger.py", "counted, beside 1,000,000 scheduled / beside none"),
    "latest 1 % of jobs": ("jobs.wakeup", "p99 from acceptance to start without Redis"),
    "transactions a second of 100 idle workers": (
        "jobs.idle",
        "transactions a second of 100 idle workers, with Redis",
    ),
    "jobs that start more than 1 s": (
        "jobs.deployment",
        "jobs that start more than 1 s beyond the first able worker",
    ),
    "growth of the worker's memory": (
        "jobs.growth",
        "growth of the worker's RSS over 80,000 jobs",
    ),
}
"""The section and the row of RESULTS.md for each row of figures, by how the row begins."""


@cache
def results() -> dict[str, list[list[str]]]:
    """Return the rows of RESULTS.md for Python 3.11, by the script of their section."""
    text = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    found: dict[str, list[list[str]]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        script = re.match(r"`([^`]+)`", section)
        if script and "3.11" in section.splitlines()[0]:
            found[script[1]] = [row for table in tables(section) for row in table.rows]
    return found


def figures(text: str) -> Iterator[str]:
    """Report figures that are not in the row of RESULTS.md that they come from."""
    for table in tables(text):
        if len(table.header) < 2 or not table.header[1].startswith("ratio"):
            continue
        for row in table.rows:
            begins = [start for start in FIGURES if row[0].startswith(start)]
            if not begins:
                yield f"figure: {row[0]!r} names no row of RESULTS.md"
                continue
            script, name = FIGURES[max(begins, key=len)]
            lines = [line for line in results()[script] if line[0] == name]
            cells = {number for line in lines for cell in line[1:] for number in _numbers(cell)}
            wanted = _numbers(row[1])
            if not wanted or not set(wanted) <= cells:
                yield f"figure: {row[0]!r} is not {row[1]}: {lines}"


def _numbers(cell: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?", cell)]


# -- numbers in sentences ------------------------------------------------------------------------


def _replicas(name: str) -> tuple[str, ...]:
    text = (ROOT / "deploy/kustomize/overlays/production/autoscaling.yaml").read_text("utf-8")
    for scaler in yaml.safe_load_all(text):
        spec = scaler["spec"]
        if spec.get("scaleTargetRef", {}).get("name") == name:
            return (str(spec["minReplicas"]), str(spec["maxReplicas"]))
    return ()


def _alert(name: str) -> str:
    """Return the number that the expression of an alert is compared with, as a percentage."""
    text = (ROOT / "deploy/observability/rules.yml").read_text(encoding="utf-8")
    (rule,) = (
        rule
        for group in yaml.safe_load(text)["groups"]
        for rule in group["rules"]
        if rule.get("alert") == name
    )
    return f"{float(rule['expr'].rpartition('>')[2]):.0%}".rstrip("%")


def _limits(row: str) -> set[str]:
    text = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    return {cells[2] for table in tables(text) for cells in table.rows if cells[0] == row}


SENTENCES: dict[str, Callable[[], tuple[str, ...]]] = {
    r"retried (?:after )?([\d.]+), ([\d.]+) and ([\d.]+) s": lambda: tuple(
        f"{delay:g}" for delay in retry_policy().backoff.delays(4)
    ),
    r"four attempts, ([\d.]+), ([\d.]+) and ([\d.]+) s apart": lambda: tuple(
        f"{delay:g}" for delay in retry_policy().backoff.delays(4)
    ),
    r"`JOB_MAX_ATTEMPTS` attempts, ([\d.]+), ([\d.]+), ([\d.]+) \.\.\. s apart": lambda: tuple(
        f"{delay:g}" for delay in BackoffPolicy().backoff.delays(4)
    ),
    r"app=viralfx-backend, (\d+) to (\d+)": lambda: _replicas("viralfx-backend"),
    r"app=viralfx-worker, (\d+) to (\d+)": lambda: _replicas("viralfx-worker"),
    r"([\d.]+) s of readiness delay": lambda: (f"{PHASES[0]:g}",),
    r"([\d.]+) s of drain": lambda: (f"{PHASES[1]:g}",),
    r"([\d.]+) s for the state": lambda: (f"{PHASES[2]:g}",),
    r"([\d.]+) s for connections": lambda: (f"{PHASES[3]:g}",),
    r"of the ([\d.]+) s after which the watchdog": lambda: (f"{PHASES[4]:g}",),
    r"Chosen option: \"(\d+) s, and": lambda: (str(GRACE),),
    r"more than (\d+) % of its memory limit": lambda: (f"{WARN_AT:.0%}".rstrip("%"),),
    r"`degraded`, and `unhealthy` from (\d+) %": lambda: (f"{FAIL_AT:.0%}".rstrip("%"),),
    r"check `memory` warns at (\d+) %": lambda: (f"{WARN_AT:.0%}".rstrip("%"),),
    r"more than (\d+) % of its `maxmemory`": lambda: (_alert("ViralFXRedisMemoryHigh"),),
    r"Up to (\d+) pages see each stage": lambda: (f"{feed.FEW_PAGES}",),
    r"at most (\d+) ms for the last event": lambda: (f"{feed.LAST_EVENT_SECONDS * 1000:g}",),
    r"process of the fleet reports every (\d+) s": lambda: (f"{fleet.BEAT_SECONDS:g}",),
    r"writes its report every (\d+) s": lambda: (f"{fleet.BEAT_SECONDS:g}",),
    r"no report for (\d+) s, is silent": lambda: (f"{fleet.SILENT_AFTER_SECONDS:g}",),
    r"seen_at > now\(\) - interval '(\d+) seconds'": lambda: (f"{fleet.SILENT_AFTER_SECONDS:g}",),
}
"""Sentences with numbers, and the numbers that the code has; each sentence is in some document."""


def sentences(text: str) -> Iterator[str]:
    """Report sentences whose numbers are not those of the code."""
    joined = re.sub(r"\s+", " ", text)
    for pattern, expected in SENTENCES.items():
        for match in re.finditer(pattern, joined):
            if match.groups() != expected():
                yield f"number: {match[0]!r} should have {', '.join(expected())}"
    for match in re.finditer(r"`/health/live` reaches ([\d.]+) of the rate", joined):
        row = "viralfx serve `/health/live` / bare ASGI `/health/live`"
        if f"≥ {match[1]}" not in _limits(row):
            yield f"number: {match[0]!r} is no limit of RESULTS.md"


def missing_sentences(texts: Mapping[str, str]) -> Iterator[str]:
    """Report sentences that are in no document any more: their numbers are not compared."""
    joined = re.sub(r"\s+", " ", " ".join(texts.values()))
    yield from (f"number: no sentence matches {p}" for p in SENTENCES if not re.search(p, joined))
