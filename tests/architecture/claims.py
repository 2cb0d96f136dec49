"""Rules about the claims that README, docs and decision records make about the code.

Each rule reads the text of one document and yields one line for each claim that the code does not
bear out. A claim is found by its shape (a table by its header, code in back-ticks, a fenced block),
so that text can move between documents.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.observability.wired import described, wired

import viralfx
from viralfx.settings import Secret, Settings, fields, milliseconds
from viralfx.web.app import create_app

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
METHODS = "GET|HEAD|POST|PUT|DELETE|PATCH"


@cache
def documents() -> Mapping[str, str]:
    """Return the text of each document by its path."""
    paths = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("adr/*.md"),
        ROOT / "tests/README.md",
    ]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(paths)
        if path.name != "CHANGELOG.md"
    }


# -- the parts of a document ---------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One table of a document."""

    header: list[str]
    rows: list[list[str]]


def prose(text: str) -> str:
    """Return a document without its fenced blocks."""
    return FENCE.sub("", text)


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return [body for name, body in FENCE.findall(text) if name == language]


def tables(text: str) -> list[Table]:
    """Return the tables of a document."""
    found = re.findall(r"^(\|.*\|)\n\|[-|: ]+\|\n((?:\|.*\|\n?)+)", text, re.MULTILINE)
    return [Table(_cells(head), [_cells(row) for row in body.splitlines()]) for head, body in found]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


# -- endpoints -----------------------------------------------------------------------------------


@cache
def operations() -> dict[tuple[str, str], set[str]]:
    """Return the status codes of each operation, by method and path; HEAD goes with GET."""
    settings = Settings(
        api_token=Secret("api"), management_token=Secret("own"), health_details="authorized"
    )
    paths = create_app(settings).openapi_schema.to_schema()["paths"]
    found = {
        (method.upper(), path): set(operation["responses"])
        for path, methods in paths.items()
        for method, operation in methods.items()
    }
    # Three that the document does not describe, and one of applications that have groups.
    found["GET", "/health/group/{group}"] = {"200", "401", "404", "503"}
    # The page of the console uses these; they are no part of the OpenAPI document.
    found["GET", "/health/ui"] = found["GET", "/health/ui/{file}"] = {"200", "404"}
    found["GET", "/health/events"] = {"200", "401", "503"}
    found["GET", "/health/ui/session"] = {"200"}
    found["POST", "/health/ui/session"] = {"204", "400", "401", "403"}
    found["DELETE", "/health/ui/session"] = {"204", "403"}
    found["GET", "/health/ui/data/{view}"] = {"200", "400", "401", "404", "422"}
    found["GET", "/health/ui/data/jobs/{id}"] = {"200", "401", "404"}
    acting = {"200", "202", "400", "401", "403", "404", "409", "413", "422", "503"}
    found["POST", "/health/ui/data/{view}/{id}/{action}"] = acting
    found["GET", "/metrics"] = {"200", "401"}
    found["GET", "/api/docs"] = found["GET", "/api/docs/openapi.json"] = {"200"}
    return found


def statuses(method: str, path: str) -> set[str] | None:
    """Return the status codes of an operation; None if there is no such operation."""
    path = re.sub(r"[?#].*", "", path).rstrip(".") or "/"
    for (known, template), codes in operations().items():
        pattern = re.sub(r"\\\{\w+\\\}", r"(?:\\{\\w+\\}|[^/{}]+)", re.escape(template))
        if known == method and re.fullmatch(pattern, path):
            return codes
    return None


def endpoints(text: str) -> Iterator[str]:
    """Report operations and paths that do not exist."""
    for code in CODE.findall(prose(text)):
        if named := re.match(rf"({METHODS}) (/(?:health|api|metrics)\b\S*)", code):
            if statuses(named[1], named[2]) is None:
                yield f"endpoint: there is no {named[1]} {named[2]}"
        elif re.fullmatch(
            r"/(?:health|metrics|api/v1|api/docs)\b[\w/{}?=&.-]*", code
        ) and not is_path(code):
            yield f"endpoint: there is no path {code}"


def is_path(path: str) -> bool:
    """Return whether any operation has the path."""
    return any(statuses(method, path) for method in METHODS.split("|"))


def answers(text: str) -> Iterator[str]:
    """Report status codes that an operation does not have; a row of two paths has those of both."""
    for table in tables(text):
        if table.header[0] not in {"endpoint", "request"}:
            continue
        for row in table.rows:
            named = re.match(rf"`({METHODS}) (/[^\s`]+)", row[0])
            paths = [named[2], *re.findall(r"`(/[^\s`]+)`", row[0])] if named else []
            known = {code for path in paths if named for code in statuses(named[1], path) or ()}
            for status in re.findall(r"\b[2-5]\d\d\b", " ".join(row[1:])):
                if known and status not in known:
                    yield f"endpoint: {row[0]} has no status {status}"


def missing_endpoints(texts: Mapping[str, str]) -> Iterator[str]:
    """Report operations of the service that no table of endpoints lists."""
    cells = [
        code
        for text in texts.values()
        for table in tables(text)
        if table.header[0] in {"endpoint", "request"}
        for row in table.rows
        for code in CODE.findall(row[0])
    ]
    for method, path in operations():
        listed = {re.sub(r"\{\w+\}", "{}", re.sub(r"\?.*", "", cell)) for cell in cells}
        plain = re.sub(r"\{\w+\}", "{}", path)
        there = f"{method} {plain}" in listed or (method == "GET" and plain in listed)
        if not there and method != "HEAD" and not path.startswith("/api/docs"):
            yield f"endpoint: no table lists {method} {path}"


# -- exit codes ----------------------------------------------------------------------------------


@cache
def exit_codes() -> frozenset[int]:
    """Return the values of all constants that are named ``EXIT_...``."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        found |= {
            int(value)
            for value in re.findall(r"^EXIT_\w+ = (\d+)$", path.read_text("utf-8"), re.MULTILINE)
        }
    return frozenset(found)


def exits(text: str) -> Iterator[str]:
    """Report exit codes that no constant holds, and a table of the service that lacks one."""
    for table in tables(text):
        if table.header[0] == "exit code":
            listed = {int(row[0].strip("`")) for row in table.rows}
            yield from (f"exit code: {code} is no constant" for code in listed - exit_codes())
            if len(listed) > 3:  # one command has fewer
                yield from (f"exit code: {code} is not listed" for code in exit_codes() - listed)
    for code in re.findall(r"\bexit(?:s|ed)?(?: code| with(?: code)?)? (\d+)\b", prose(text)):
        # An init, a shell or a test may end by a signal: 128 and its number.
        if int(code) not in exit_codes() and int(code) < 128:
            yield f"exit code: {code} is no constant"


# -- variables and their values ------------------------------------------------------------------

FOREIGN_VARIABLES = frozenset(
    {
        "BUILT_IN",
        "DB_HOST",
        "DB_NAME",
        "DB_PORT",
        "GRPC_ENABLE_FORK_SUPPORT",
        "HALF_OPEN",
        "DATABASE_URI",
        "JOB_COMPLETION_INDEX",
        "JOB_DIR",
        "JOB_NAME",
        "KUBERNETES_SERVICE_HOST",
        "LAME_DUCK",
        "MAX_PIPELINED",
        "NAME_FILE",
        "OPS_DATABASE_URL",
        "PIPE_BUF",
        "REDISCLI_AUTH",
        "SO_REUSEPORT",
        "TINI_SUBREAPER",
        "TRACES_ENDPOINT",
        "VIRALFX_TEST_FRESH",
        "VIRALFX_TEST_MEMORY",
        "VIRALFX_TEST_SERVERS",
        "VIRALFX_TEST_SOAK",
    }
)
"""Variables of other programs, constants of C and of the code, and examples of names."""

UNITS = {"ms": 1, "s": 1000, "": None, "min": 60_000, "h": 3_600_000, "KiB": 1024, "MiB": 1 << 20}


@cache
def settings() -> dict[str, Any]:
    """Return the settings by the names of their variables."""
    return {field.variable: field for field in fields()}


def _is_known(name: str) -> bool:
    name = name.removesuffix("_FILE") if name.removesuffix("_FILE") in settings() else name
    return name in settings() or name in FOREIGN_VARIABLES or name.startswith("OTEL_")


def variables(text: str) -> Iterator[str]:
    """Report names of variables that are no settings, and values that a setting refuses."""
    for code in CODE.findall(prose(text)):
        for name in re.findall(r"(?<![\w$./-])[A-Z][A-Z0-9]*_[A-Z0-9_]*[A-Z0-9](?![\w(*])", code):
            if not _is_known(name):
                yield f"variable: {name} is no setting"
        if given := re.fullmatch(r"([A-Z][A-Z0-9_]+)=([\w.,:-]+)", code):
            yield from _refused(given[1], given[2])
    for block in blocks(text, "bash"):
        for line in block.splitlines():
            for name, value in re.findall(r"(?<!\S)([A-Z][A-Z0-9]*_[A-Z0-9_]+)=([\w.-]+)", line):
                if not _is_known(name) and f"viralfx {name}" in f"viralfx {line}":
                    continue
                yield from _refused(name, value)


def _refused(name: str, value: str) -> Iterator[str]:
    if name not in settings() or value in {"...", "value"}:
        return
    try:
        settings()[name].parse(value)
    except ValueError as error:
        yield f"value: {name}={value}: {error}"


def values(text: str) -> Iterator[str]:
    """Report a default or budget beside the name of its setting that is not the setting's."""
    number = r"(\d[\d,]*(?:\.\d+)?)(?: ?(ms|s|min|h|KiB|MiB)\b)?"
    for name, value, unit in re.findall(rf"`([A-Z][A-Z0-9_]+)`\s+\({number}\)", prose(text)):
        yield from _other(name, value, unit)
    for name, value, unit in re.findall(rf"`([A-Z][A-Z0-9_]+)` {number}(?= \||,| \.|$)", text):
        yield from _other(name, value, unit)
    for table in tables(text):
        where = [at for at, head in enumerate(table.header) if head in {"default", "budget"}]
        for row in table.rows if where else []:
            before = " ".join(row[: where[0]])
            named = re.findall(r"`([A-Z][A-Z0-9_]+)`", before)
            cell = re.fullmatch(number, row[where[0]].strip("`")) if len(named) == 1 else None
            if cell:
                yield from _other(named[0], cell[1], cell[2] or "")


def _other(name: str, value: str, unit: str) -> Iterator[str]:
    if name not in settings():
        return
    default = settings()[name].default
    if name == "MANAGEMENT_PORT":
        default = Settings().worker_management_port
    if isinstance(default, float):
        default = milliseconds(default)
    if not isinstance(default, int) or isinstance(default, bool):
        return
    given = float(value.replace(",", "")) * (UNITS[unit] or 1)
    if given != default:
        yield f"value: {name} is {default}, not {value} {unit}".rstrip()


# -- names of the code ---------------------------------------------------------------------------

NAMES_OF_PEERS = frozenset(
    {
        "AsyncResult",
        "CronJob",
        "InMemoryConnector",
        "_defer_by",
        "_defer_until",
        "ack_type",
        "acks_late",
        "apply_async",
        "autoretry_for",
        "batch_defer_async",
        "beat_schedule",
        "cancel_consumer",
        "cancel_job_by_id_async",
        "countdown",
        "cron_jobs",
        "dont_autoretry_for",
        "group_key",
        "job_timeout",
        "queueing_lock",
        "retry_job_by_id_async",
        "schedule_at",
        "schedule_in",
        "soft_time_limit",
        "stalled_worker_timeout",
        "task_always_eager",
        "time_limit",
        "update_state",
        "visibility_timeout",
    }
)
"""Names of other job queues, with which docs/migrating.md compares."""
FOREIGN_NAMES = frozenset(
    {
        "CreateContainerConfigError",
        "EventSource",
        "InMemoryBroker",
        "ProcessPoolExecutor",
        "ProcessorFormatter",
        "QueueHandler",
        "QueueListener",
        "_CERTIFICATE",
        "_COMPRESSION",
        "_debugmallocstats",
        "bufsize",
        "capture_signals",
        "client_body_timeout",
        "client_header_timeout",
        "h11_max_incomplete_event_size",
        "keepalive_timeout",
        "large_client_header_buffers",
        "limit_conn",
        "limit_concurrency",
        "main_loop",
        "maxhdr",
        "on_tick",
        "pylock",
        "shareProcessNamespace",
        "timeout_graceful_shutdown",
        "timeout_keep_alive",
        "tune",
    }
)
"""Names of libraries, nginx, HAProxy and Kubernetes that our code does not use."""

MESSAGES_OF_OTHERS = frozenset({"Invalid HTTP request received."})


@cache
def code_text() -> str:
    """Return all code but that of these guards, whose cases hold wrong names."""
    folders = ("src", "tests", "benchmarks", "deploy", ".ci", "docs/examples")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    paths += [ROOT / name for name in ("pyproject.toml", "justfile", "Dockerfile")]
    texts = []
    for path in paths:
        ours = path.is_file() and path.suffix in {
            ".py",
            ".sql",
            ".toml",
            ".yaml",
            ".yml",
            ".json",
            "",
            ".cfg",
        }
        if ours and "architecture" not in path.parts and "node_modules" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(texts)


@cache
def code_words() -> frozenset[str]:
    """Return the words of the code, and of the names of its files."""
    stems = {part for path in (ROOT / "src").rglob("*.py") for part in path.with_suffix("").parts}
    stems |= {path.stem for path in (ROOT / "tests").rglob("*.py")}
    stems |= {
        name
        for path in (ROOT / "tests/architecture").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    return frozenset(re.findall(r"[A-Za-z_]\w*", code_text())) | stems


@cache
def known_words() -> frozenset[str]:
    """Return the words that a document may use as names."""
    return code_words() | FOREIGN_NAMES | NAMES_OF_PEERS


@cache
def source_text() -> str:
    """Return the text of the package, with its string literals joined where they are implicit."""
    text = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


@cache
def metrics() -> frozenset[str]:
    """Return the names of all metrics of an assembly with everything in it."""
    return frozenset(metric.name for metric in described(wired()))


def names(text: str) -> Iterator[str]:
    """Report metrics, spans, events and log messages that the code does not have."""
    for code in CODE.findall(prose(text)):
        if re.fullmatch(r"viralfx(?:\.[a-z_]+)+(?:\.\*)?", code):
            if code.removesuffix("*") not in source_text() and not _is_module(code):
                yield f"name: {code} is no name of a span, event, logger or module"
        elif re.fullmatch(r"(?:viralfx|process|http_server|db_client)_\w+(?:\{.*\})?", code):
            name = code.partition("{")[0]
            base = re.sub(r"_(?:bucket|count|sum|created)$", "", name)
            if base not in metrics() and name not in code_words():
                yield f"name: {name} is no metric"
        elif (
            re.fullmatch(r"[A-Z][a-z]+(?: [\w=/.,-]+)+\.?", code)
            and code not in source_text()
            and code not in code_text()
            and code not in MESSAGES_OF_OTHERS
        ):
            yield f"name: {code!r} is no message"


def identifiers(text: str) -> Iterator[str]:
    """Report identifiers that are not in the code."""
    shape = re.compile(r"[a-z0-9]_[a-z0-9]|[a-z][A-Z]|\w\.\w")
    for code in CODE.findall(prose(text)):
        if not re.fullmatch(r"@?[\w.]+(?:\([^)]*\))?", code) or not shape.search(code):
            continue
        plain = re.sub(r"(['\"]).*?\1", "", code)
        for word in re.findall(r"(?<![\w'\"])[A-Za-z_]\w*", plain):
            begins = word.endswith("_") and word in code_text()
            if not begins and word not in known_words():
                yield f"name: {word} of `{code}` is not in the code"


def _is_module(name: str) -> bool:
    path = ROOT / "src" / name.removesuffix(".*").replace(".", "/")
    parent = path.parent.with_suffix(".py")
    return (
        path.is_dir()
        or path.with_suffix(".py").is_file()
        or (
            parent.is_file()
            and re.search(rf"\b{path.name}\b", parent.read_text("utf-8")) is not None
        )
    )


def arguments(text: str) -> Iterator[str]:
    """Report rows of an argument table that are no argument, or have another default."""
    for table in tables(text):
        called = re.fullmatch(r"`@?(\w+)\(\.\.\.\)`", table.header[0])
        if called is None:
            continue
        parameters = inspect.signature(getattr(viralfx, called[1])).parameters
        for row in table.rows:
            for name in CODE.findall(row[0]):
                if name not in parameters:
                    yield f"argument: {called[1]} has no {name}"
                elif (shown := re.fullmatch(r"`(True|False|None|[\d.]+|\w+)`", row[-1])) and shown[
                    1
                ] not in {repr(parameters[name].default), str(parameters[name].default)} | set(
                    settings()
                ):
                    yield f"argument: {name} of {called[1]} is not {shown[1]} by default"
