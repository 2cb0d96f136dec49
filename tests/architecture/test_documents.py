"""The documents name only files, commands, tests, terms and numbers that exist."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml
from tests.deploy.program_rules import GRACE, PHASES, PROBES

from viralfx import OperationsConfig
from viralfx.bootstrap.assembly import BUILT_IN
from viralfx.domain.doctor import Area
from viralfx.domain.health.model import Health, Status
from viralfx.postgres.migrate import description_of
from viralfx.postgres.migrations import REVISIONS
from viralfx.settings import Settings
from viralfx.settings.groups import POOL_PROFILES
from viralfx.settings.model import WORKER_MANAGEMENT_PORT
from viralfx.telemetry.logging.lines import LEVELS, line_level

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/viralfx"
DOCUMENTS = [
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/glossary.md",
    "docs/operations.md",
    "docs/resilience-rules.md",
    "tests/README.md",
]
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TERM = re.compile(r"^\| [\w -]+ \| .+ \| (`.+`.*) \|$", re.MULTILINE)
FOLDERS = ("adr", "deploy", "docs", "src", "tests")
SUFFIXES = {".json", ".md", ".py", ".toml", ".yaml", ".yml"}
COMMANDS = {"bash": r"```bash\n(.*?)```", "code": r"`((?:\.venv/bin/)?(?:just|pytest) [^`\n]+)`"}


def read(name: str) -> str:
    """Return a file's text by its path in the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def problems(document: str, text: str) -> list[str]:
    """Return each name in a document that does not exist."""
    return [
        *_links(document, text),
        *_files(text),
        *_commands(text),
        *_tests(text),
        *_contracts(text),
    ]


def _links(document: str, text: str) -> Iterator[str]:
    for target in LINK.findall(text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        if not file.exists():
            yield f"link {target}"
        elif anchor and anchor not in _anchors(file.read_text(encoding="utf-8")):
            yield f"heading {target}"


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def _files(text: str) -> Iterator[str]:
    """Find files that are named by a path from the root or the package, or without a folder."""
    for name in CODE.findall(text):
        if " " in name or name.startswith(("/", ".venv", "application/", "build/")):
            continue
        if "/" in name and not re.fullmatch(r"[\w./*-]+", name):
            continue
        if "/" not in name and Path(name).suffix not in SUFFIXES:
            continue
        found = [*ROOT.glob(name), *PACKAGE.glob(name)]
        if "/" not in name:
            found += [path for folder in FOLDERS for path in (ROOT / folder).rglob(name)]
        if not found:
            yield f"file {name}"


def _commands(text: str) -> Iterator[str]:
    recipes = set(
        re.findall(r"^([a-z][a-z-]*)(?: (?!:=).*)?:(?: .*)?$", read("justfile"), re.MULTILINE)
    )
    for command in re.findall(COMMANDS["code"], text):
        program, *arguments = command.split()
        if program.endswith("just") and arguments[0] not in recipes:
            yield f"recipe {arguments[0]}"
        paths = [argument for argument in arguments if argument.startswith("tests/")]
        yield from (f"path {path}" for path in paths if not (ROOT / path).exists())
    command = re.search(r"^\.ci/venv --dev && \.ci/test$", read("README.md"), re.MULTILINE)
    for block in re.findall(COMMANDS["bash"], text, re.DOTALL):
        if command is None or block.strip() != command[0]:
            yield f"command {block.strip()}"


def _tests(text: str) -> Iterator[str]:
    named = {name for name in CODE.findall(text) if re.fullmatch(r"test_\w+[a-z]", name)}
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    yield from (f"test {name}" for name in sorted(named - defined))


def _contracts(text: str) -> Iterator[str]:
    tools = tomllib.loads(read("pyproject.toml"))["tool"]
    contracts = [contract["name"] for contract in tools["importlinter"]["contracts"]]
    for name in CODE.findall(text):
        if re.match(r"ADR-\d{4}", name) and not any(each.startswith(name) for each in contracts):
            yield f"contract {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_in_a_document_exists(document: str) -> None:
    """Links, headings, files, recipes, commands, tests and import contracts."""
    text = read(document)

    assert CODE.search(text)
    assert problems(document, text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[there](nowhere.md)", "link nowhere.md"),
        ("[there](README.md#no-heading)", "heading README.md#no-heading"),
        ("`src/viralfx/nothing.py`", "file src/viralfx/nothing.py"),
        ("`domain/nothing.py`", "file domain/nothing.py"),
        ("`tests/unit/nothing`", "file tests/unit/nothing"),
        ("`sorts.py`", "file sorts.py"),
        ("`.venv/bin/just nothing`", "recipe nothing"),
        ("`just nothing`", "recipe nothing"),
        ("`.venv/bin/pytest tests/nothing`", "path tests/nothing"),
        ("```bash\n.ci/venv --dev && pytest\n```", "command .ci/venv --dev && pytest"),
        ("`test_nothing_of_the_kind`", "test test_nothing_of_the_kind"),
        ("`ADR-0002: the domain knows all`", "contract ADR-0002: the domain knows all"),
    ],
)
def test_an_unknown_name_is_reported(text: str, found: str) -> None:
    """Each rule reports a text that breaks it."""
    assert problems("CONTRIBUTING.md", text) == [found]


def test_the_migrations_of_a_new_database_are_shown() -> None:
    """docs/deployment.md has the line of each migration, and the last one is the current one."""
    shown = re.findall(r"^applied (\d{4}): (.+)$", read("docs/deployment.md"), re.MULTILINE)

    assert shown == [(revision, description_of(revision)) for revision in REVISIONS]
    assert f" is current at {shown[-1][0]}\n" in read("docs/deployment.md")


# -- the documentation site ----------------------------------------------------------------------


def test_each_page_has_a_place_in_the_site() -> None:
    """docs/toc.yml names it below its kind; the build of the site fails without."""
    named = set(re.findall(r"^ *- file: docs/([\w-]+)$", read("docs/toc.yml"), re.MULTILINE))

    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == {*named, "index"}


# -- pictures ------------------------------------------------------------------------------------


def test_no_page_has_a_picture_as_source() -> None:
    """The site has no viewer of Mermaid, which would be 3 MB of script."""
    pages = [path for folder in ("docs", "adr") for path in (ROOT / folder).glob("*.md")]

    assert [path.name for path in pages if "```mermaid" in path.read_text(encoding="utf-8")] == []


def test_the_picture_of_the_cluster_is_that_of_the_manifests() -> None:
    """Labels of pods, numbers of replicas, and ports."""
    picture = ET.fromstring(read("docs/cluster.svg"))  # noqa: S314 - of this repository
    shown = {text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    scaled = {
        document["spec"]["scaleTargetRef"]["name"]: document["spec"]
        for document in yaml.safe_load_all(
            read("deploy/kustomize/overlays/production/autoscaling.yaml")
        )
        if document["kind"] == "HorizontalPodAutoscaler"
    }
    pods = {
        f"pod app={name}, {spec['minReplicas']} to {spec['maxReplicas']}"
        for name, spec in scaled.items()
    }
    (management,) = set(
        re.findall(
            r"name: MANAGEMENT_PORT, value: \"(\d+)\"",
            read("deploy/kustomize/base/deployment.yaml"),
        )
    )

    assert len(pods) == 2
    assert pods <= shown
    assert f"viralfx serve :{Settings().port}, :{management}" in shown
    assert f"viralfx worker :{WORKER_MANAGEMENT_PORT}" in shown
    assert "(cluster.svg)" in read("docs/architecture.md")


# -- promises ------------------------------------------------------------------------------------


def test_the_promise_about_jobs_names_its_condition() -> None:
    """A commit may be on one server alone: each page that promises says so in that paragraph."""
    promise = re.compile(r"accepted job is (?:never )?lost")
    paragraphs = [
        (path.name, " ".join(each.split()))
        for path in (ROOT / "docs").glob("*.md")
        for each in path.read_text(encoding="utf-8").split("\n\n")
    ]
    promises = [(name, text) for name, text in paragraphs if promise.search(text)]

    assert {"jobs.md", "postgres.md"} <= {name for name, _ in promises}
    assert [name for name, text in promises if "synchronous replication" not in text] == []


# -- the glossary --------------------------------------------------------------------------------


def terms(text: str) -> list[str]:
    """Return the third column of each term."""
    return [cell for cell in TERM.findall(text) if "in the code" not in cell]


def missing(cell: str) -> list[str]:
    """Return the identifiers that are not in the file beside them."""
    found = []
    for names, file in re.findall(r"((?:`\w+`(?:, | of )?)+) in `([\w/.]+)`", cell):
        code = (PACKAGE / file).read_text(encoding="utf-8")
        identifiers = CODE.findall(names)
        found += [name for name in identifiers if not re.search(rf"\b{name}\b", code)]
    return found


def test_each_term_is_found_in_the_code() -> None:
    """Each identifier of the third column occurs in the file beside it."""
    cells = terms(read("docs/glossary.md"))

    assert 25 <= len(cells) <= 50
    assert [cell for cell in cells if " in `" not in cell] == []
    assert {cell: missing(cell) for cell in cells if missing(cell)} == {}


def test_an_unknown_identifier_of_a_term_is_reported() -> None:
    """An identifier that was renamed is missing."""
    assert missing("`Notice`, `JobNotification` in `jobs/notifier.py`") == ["Notice"]


# -- the rules of resilience ---------------------------------------------------------------------


def test_the_rules_and_situations_that_tests_name_are_listed() -> None:
    """Each number of a test, and each letter and digit that a docstring begins with."""
    text = read("docs/resilience-rules.md")
    rules = set(re.findall(r"^\| (\d+) \|", text, re.MULTILINE))
    situations = set(re.findall(r"^\| ([BR]\d\w?):", text, re.MULTILINE))
    tests = "".join(read(f"tests/unit/resilience/test_{n}_rules.py") for n in ("breaker", "retry"))

    assert {str(int(n)) for n in re.findall(r"def test_rule_(\d+)", tests)} == rules
    assert set(re.findall(r'"""([BR]\d\w?):', tests)) == situations


# -- the operations guide ------------------------------------------------------------------------


GUIDE = read("docs/operations.md")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the tables below a heading of the operations guide, without heads."""
    section = re.split(r"^## ", GUIDE, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    tables = re.findall(r"^\|(?: [^\n]*\|)\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    lines = "".join(tables).splitlines()
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_details_of_each_built_in_check_are_described() -> None:
    """The second table of the health endpoints has a row for each."""
    described = [name for name, *cells in rows("Health endpoints") if len(cells) == 1]

    assert described == list(BUILT_IN)


def test_the_options_of_the_plugin_are_described() -> None:
    """The table of docs/plugin.md has each field of ``OperationsConfig``."""
    section = read("docs/plugin.md").partition("| field of `OperationsConfig` | takes |\n")[2]
    lines = section.partition("\n\n")[0].splitlines()[1:]
    described = [name for line in lines for name in CODE.findall(line.split(" | ")[0])]

    assert sorted(described) == sorted(field.name for field in fields(OperationsConfig))


def test_the_page_of_the_doctor_names_each_area() -> None:
    """In its first paragraphs."""
    named = " ".join(read("docs/doctor.md").partition("\n- ")[0].lower().split())

    assert [area for area in Area if str(area) not in named] == []


def test_the_pool_sizes_are_those_of_the_settings() -> None:
    """Each profile with its minimum and maximum of connections."""
    shown = {name: (int(low), int(high)) for name, _, low, high in rows("Connection pool")}

    assert shown == POOL_PROFILES


def test_the_phases_are_those_of_settings_and_manifests() -> None:
    """Budgets in seconds, by their variables, and the grace period of a pod."""
    shown = {variable: int(budget.split(" ")[0]) for _, variable, budget in rows("Shutdown")}
    budgets = Settings().shutdown_budgets

    assert shown == {
        "SHUTDOWN_READINESS_DELAY": budgets.readiness_delay,
        "SHUTDOWN_DRAIN_TIMEOUT": budgets.drain,
        "SHUTDOWN_STATE_TIMEOUT": budgets.state,
        "SHUTDOWN_CONNECTION_TIMEOUT": budgets.connections,
        "SHUTDOWN_FORCE_TIMEOUT": budgets.force,
    }
    assert f"{PHASES[0]:g} s in the manifests" in GUIDE
    assert f"A pod gets {GRACE} s between" in GUIDE


def test_the_probes_are_those_of_the_manifests() -> None:
    """Path, initial delay, period, timeout and threshold."""
    keys = ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold")
    shown = {
        f"{kind}Probe": (
            path,
            dict(zip(keys, (int(n.split(" ")[0]) for n in numbers), strict=True)),
        )
        for kind, path, *numbers in rows("Probes")
    }

    assert shown == {name: probe for name, probe in PROBES.items() if probe[1]}


def test_the_words_for_levels_and_status_are_those_of_the_code() -> None:
    """Levels with the word in a line, and the values of a check and of the service."""
    levels = {setting: written for setting, written, _ in rows("Logs")}
    values = [(value, of) for value, of, *_ in rows("Status values")]

    assert levels == {name: line_level(level) for name, level in LEVELS.items()}
    assert values == [
        *((str(each), "the service") for each in Health),
        *((str(each), "a check") for each in Status),
    ]


def test_the_checklist_names_each_area_of_the_doctor() -> None:
    """Beside the items, or in the sentence after them."""
    named = {
        area
        for cells in rows("Deployment checklist")
        for area in re.findall(r"[a-z][a-z ]+[a-z]", cells[2].partition(":")[0])
    }
    also = re.findall(r"`([a-z ]+)`", GUIDE.rpartition("has two areas more:")[2])

    assert named | set(also) == {str(area) for area in Area}
    assert named & set(also) == set()
