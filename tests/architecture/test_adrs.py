"""The decision records: their form, their index, their links, and the evidence they name."""

import ast
import re
import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HEADINGS = [
    "## Context and Problem Statement",
    "## Decision Drivers",
    "## Considered Options",
    "## Decision Outcome",
    "### Consequences",
    "### Confirmation",
    "## More Information",
]
STATUS = re.compile(
    r"proposed|accepted|rejected|deprecated|superseded by \[ADR-\d{4}\]\(\d{4}-[a-z0-9-]+\.md\)"
)
HEAD = re.compile(r"---\nstatus: (.+)\ndate: \d{4}-\d\d-\d\d\ndecision-makers: .+\n---\n\n# (.+)\n")
FILE = re.compile(r"(\d{4})-[a-z0-9]+(?:-[a-z0-9]+)*\.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
REFERENCE = re.compile(r"ADR-(\d{4})")
ROW = re.compile(r"\| \[(\d{4})\]\(([^)]+)\) \| (.+?) \| (.+?) \| .+ \|")


@dataclass(frozen=True)
class Record:
    """One decision record, taken apart."""

    file: str
    text: str

    @property
    def number(self) -> str:
        """The four digits of the file's name."""
        return self.file[:4]

    @property
    def status(self) -> str:
        """The status of the front matter, or an empty string."""
        head = HEAD.match(self.text)
        return head[1] if head else ""

    @property
    def title(self) -> str:
        """The heading of the first level, or an empty string."""
        head = HEAD.match(self.text)
        return head[2] if head else ""

    @property
    def headings(self) -> list[str]:
        """The headings below the title, in order."""
        return re.findall(r"^##.*$", self.text, re.MULTILINE)

    def section(self, heading: str) -> str:
        """Return the text below a heading, up to the next one of any level."""
        _, _, after = self.text.partition(f"\n{heading}\n")
        return re.split(r"^##", after, maxsplit=1, flags=re.MULTILINE)[0]


def problems(project: Path) -> list[str]:
    """Return everything that is wrong with a project's decision records."""
    folder = project / "adr"
    files = sorted(path for path in folder.iterdir() if path.name != "README.md")
    records = [Record(path.name, path.read_text(encoding="utf-8")) for path in files]
    found = [*numbers(records), *index(records, folder), *supersession(records)]
    contracts = contract_names(project)
    found += cited(records, contracts)
    for name in contracts:
        known = {record.number for record in records}
        if any(number not in known for number in REFERENCE.findall(name)):
            found.append(f"pyproject.toml: {name!r} refers to no record")
    for record in records:
        rules = [*form(record), *outcome(record), *evidence(record, project, contracts)]
        rules += [
            f"{target!r} leads nowhere"
            for target in LINK.findall(record.text)
            if not target.startswith("http") and not (folder / target.split("#")[0]).exists()
        ]
        found += [f"{record.file}: {rule}" for rule in rules]
    return found


def contract_names(project: Path) -> list[str]:
    """Return the names of the import contracts."""
    tools = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    return [contract["name"] for contract in tools["importlinter"]["contracts"]]


def numbers(records: list[Record]) -> Iterator[str]:
    """Report a file that is not named by number and title, and a gap."""
    for record in records:
        if not FILE.fullmatch(record.file):
            yield f"{record.file} is not named like 0001-short-title.md"
    expected = [f"{number:04}" for number in range(1, len(records) + 1)]
    if (given := [record.number for record in records]) != expected:
        yield f"the numbers are not 0001 to {len(records):04} without a gap: {given}"


def form(record: Record) -> Iterator[str]:
    """Report a wrong front matter or section order, and a decision without a term."""
    if not HEAD.match(record.text):
        yield "the front matter or the title is missing or malformed"
    elif not STATUS.fullmatch(record.status):
        yield f"status {record.status!r} is none"
    if record.headings != HEADINGS:
        yield f"the sections are not as they must be: {record.headings}"
    if "Revisit when" not in record.section("## More Information"):
        yield "it does not say when to revisit it"


def outcome(record: Record) -> Iterator[str]:
    """Report a choice that was none, or that has no good or no bad side."""
    listed = re.split(r"^\* ", record.section("## Considered Options"), flags=re.MULTILINE)[1:]
    options = [" ".join(option.split()) for option in listed]
    if len(options) < 2:
        yield "there are fewer than two options"
    text = " ".join(record.section("## Decision Outcome").split())
    chosen = re.match(r'Chosen option: "(.+?)", because ', text)
    if chosen is None or chosen[1] not in options:
        yield f"the chosen option is none of the considered: {chosen and chosen[1]!r}"
    for kind in ("Good", "Bad"):
        if f"\n* {kind}, because " not in record.section("### Consequences"):
            yield f"no consequence is {kind.lower()}"


def evidence(record: Record, project: Path, contracts: list[str]) -> Iterator[str]:
    """Report files, functions in them and import contracts that do not exist."""
    named = CODE.findall(record.section("### Confirmation"))
    paths = [name for name in named if "/" in name or name.endswith((".py", ".toml"))]
    if not paths:
        yield "nothing confirms it"
    elif record.status == "accepted" and not any(
        p.startswith(("tests/", "benchmarks/")) for p in paths
    ):
        yield "no test or benchmark confirms it"
    for path, _, function in (name.partition("::") for name in paths):
        file = project / path
        if not file.exists():
            yield f"{path} does not exist"
        elif function and not re.search(rf"\bdef {re.escape(function)}\b", file.read_text()):
            yield f"{path} has no {function}"
        elif path.startswith("tests/") and file.name.startswith("test_"):
            yield from (f"{path}::{name} asserts nothing" for name in idle(file, function))
    for name in named:
        if name.startswith("ADR-") and name not in contracts:
            yield f"there is no contract {name!r}"


def idle(file: Path, function: str) -> list[str]:
    """Return the named test if it asserts nothing; without a name, all tests if none asserts."""
    tests = asserting(file.resolve())
    if function:
        return [] if tests.get(function) else [function]
    return [] if any(tests.values()) else [*tests]


@cache
def asserting(file: Path) -> dict[str, bool]:
    """Return the tests of a file, and whether each asserts, itself or by a helper of the file."""
    functions = {
        node.name: node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    direct = {name for name, node in functions.items() if asserts(node, ())}
    return {n: asserts(node, direct) for n, node in functions.items() if n.startswith("test_")}


def asserts(function: ast.AST, helpers: Collection[str]) -> bool:
    """Tell whether a function asserts, expects an error, or calls a helper that does."""
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and node.attr in {"raises", "warns"})
        or (isinstance(node, ast.Name) and node.id in helpers)
        or (isinstance(node, ast.Name) and node.id.startswith(("run_", "assert_", "check_")))
        for node in ast.walk(function)
    )


def cited(records: list[Record], contracts: list[str]) -> Iterator[str]:
    """Report import contracts that their record does not cite in back-ticks."""
    texts = {r.number: r.section("### Confirmation") for r in records}
    for name in contracts:
        number = name[len("ADR-") :].partition(":")[0]
        if number in texts and name not in CODE.findall(texts[number]):
            yield f"ADR-{number} does not cite the contract {name!r} in back-ticks"


def index(records: list[Record], folder: Path) -> Iterator[str]:
    """Report what the index has and the files have not, and the other way round."""
    rows = ROW.findall((folder / "README.md").read_text(encoding="utf-8"))
    expected = [(r.number, r.file, r.title, r.status) for r in records]
    yield from (f"README.md: {row} is not as in the file" for row in rows if row not in expected)
    yield from (f"README.md: {row[1]} is not listed so" for row in expected if row not in rows)
    if sorted(rows) != rows:
        yield "README.md: the rows are not in order"


def supersession(records: list[Record]) -> Iterator[str]:
    """Report a supersession that only one side knows of."""
    gone = {r.number: REFERENCE.findall(r.status) for r in records if "superseded" in r.status}
    new = {
        r.number: re.findall(r"Supersedes \[ADR-(\d{4})\]", r.section("## More Information"))
        for r in records
    }
    for old, by in gone.items():
        if any(old not in new.get(number, ()) for number in by):
            yield f"ADR-{old} is superseded by one that does not say so"
    for number, supersedes in new.items():
        if any(number not in gone.get(old, ()) for old in supersedes):
            yield f"ADR-{number} supersedes one that does not say so"


def test_the_records_are_in_order() -> None:
    """Form, numbers, options, evidence, links, index, supersession: nothing is wrong."""
    assert problems(ROOT) == []


def test_references_in_the_code_lead_to_records() -> None:
    """Each ADR number in a comment has a record."""
    known = {path.name[:4] for path in (ROOT / "adr").glob("[0-9]*.md")}
    code = (path for kind in ("*.py", "*.sql") for path in (ROOT / "src").rglob(kind))
    sources = [ROOT / "pyproject.toml", *code]
    referred = {n for path in sources for n in REFERENCE.findall(path.read_text("utf-8"))}

    assert referred - known == set()


# -- the rules bite ------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of the project whose records may be tampered with."""
    for path in ROOT.iterdir():
        if path.name not in {"adr", "pyproject.toml"}:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    (tmp_path / "adr").mkdir()
    for path in (ROOT / "adr").iterdir():
        (tmp_path / "adr" / path.name).write_text(path.read_text("utf-8"))
    return tmp_path


Tamper = Callable[[Path], None]


def change(pattern: str, replacement: str, file: str = "adr/0002-*.md") -> Tamper:
    """Make a tampering that replaces the first match in one file, and insists on a match."""

    def tamper(project: Path) -> None:
        (path,) = project.glob(file)
        text, count = re.subn(
            pattern, replacement, path.read_text("utf-8"), count=1, flags=re.MULTILINE
        )
        assert count, f"{pattern!r} is not in {path.name}"
        path.write_text(text)

    return tamper


def remove(project: Path) -> None:
    """Take away one record."""
    next(project.glob("adr/0003-*.md")).unlink()


def rename(project: Path) -> None:
    """Name one record in another way."""
    path = next(project.glob("adr/0003-*.md"))
    path.rename(path.with_name("0003_Ports.md"))


def supersede(project: Path) -> None:
    """Make the second record superseded by the third, which knows nothing of it."""
    new = next(project.glob("adr/0003-*.md")).name
    change("^status: accepted", f"status: superseded by [ADR-0003]({new})")(project)


TAMPERINGS: dict[str, tuple[Tamper, str]] = {
    "a gap": (remove, "without a gap"),
    "a file name": (rename, "is not named like"),
    "no front matter": (change(r"^decision-makers: .*\n", ""), "front matter"),
    "a status": (change("^status: accepted", "status: agreed"), "status 'agreed' is none"),
    "section order": (change("^## Decision Drivers", "## Zzz"), "sections are not"),
    "an extra section": (change("^## More", "## Aside\n\n## More"), "sections are not"),
    "never revisited": (change("Revisit when", "Later when"), "when to revisit"),
    "no second option": (
        change(r"(?s)(^## Considered Options\n\n\* [^\n]+\n).*?(?=^## )", r"\1\n"),
        "fewer than two options",
    ),
    "a choice": (
        change('(?s)^Chosen option: ".+?"', 'Chosen option: "Zzz"'),
        "none of the considered",
    ),
    "nothing good": (change(r"(?s)^\* Good,.*?(?=^\* Bad)", ""), "no consequence is good"),
    "nothing bad": (change(r"(?s)^\* Bad,.*?(?=^### )", "\n"), "no consequence is bad"),
    "no evidence": (change(r"(?s)(^### Confirmation\n).*?(?=^## )", r"\1\nTrust.\n\n"), "nothing"),
    "a missing file": (
        change("^### Confirmation\n", "### Confirmation\n\n* `tests/zzz.py`\n"),
        "tests/zzz.py does not exist",
    ),
    "a missing test": (
        change(
            "^### Confirmation\n",
            "### Confirmation\n\n* `tests/architecture/test_adrs.py::zzz_zzz`\n",
        ),
        "has no zzz_zzz",
    ),
    "a missing contract": (
        change("^### Confirmation\n", "### Confirmation\n\n* `ADR-0002: zzz`\n"),
        "no contract 'ADR-0002: zzz'",
    ),
    "a contract that is not cited": (
        change("`ADR-0004: Litestar stays in web`", "ADR-0004: Litestar stays", "adr/0004-*.md"),
        "ADR-0004 does not cite the contract",
    ),
    "no test": (
        change(
            r"(?s)(^### Confirmation\n).*?(?=^## )",
            r"\1\n* `src/viralfx/py.typed`\n\n",
        ),
        "no test or benchmark confirms it",
    ),
    "a link": (change(r"^# .+\n", r"\g<0>\n[there](nowhere.md)\n"), "'nowhere.md' leads nowhere"),
    "an unlisted record": (
        change(r"^\| \[0004\].*\n", "", "adr/README.md"),
        "is not listed so",
    ),
    "another title": (change("^# .+", "# Zzz"), "is not as in the file"),
    "another status": (change("^status: accepted", "status: proposed"), "is not as in the file"),
    "rows in disorder": (
        change(r"^(\| \[0004\].*\n)(\| \[0005\].*\n)", r"\2\1", "adr/README.md"),
        "rows are not in order",
    ),
    "superseded in silence": (supersede, "ADR-0002 is superseded by one that does not say so"),
    "superseding in silence": (
        change("Revisit when", "Supersedes [ADR-0001](README.md). Revisit when"),
        "ADR-0002 supersedes one that does not say so",
    ),
    "a contract of nothing": (
        change('^name = "ADR-0002: no cycles"', 'name = "ADR-0999: no cycles"', "pyproject.toml"),
        "'ADR-0999: no cycles' refers to no record",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_record_is_found_out(project: Path, name: str) -> None:
    """Each rule reports a record that breaks it."""
    tamper, expected = TAMPERINGS[name]
    tamper(project)

    assert [problem for problem in problems(project) if expected in problem] != []


def test_evidence_that_asserts_nothing_is_found(tmp_path: Path) -> None:
    """A test that only returns, or only calls such a function, is no evidence."""
    file = tmp_path / "test_it.py"
    file.write_text(
        "def check():\n    assert True\n"
        "def test_empty():\n    return\n"
        "def test_it():\n    check()\n"
        "def test_error():\n    with pytest.raises(ValueError): ...\n"
    )

    assert idle(file, "test_empty") == ["test_empty"]
    assert idle(file, "test_it") == idle(file, "test_error") == idle(file, "") == []


def test_a_supersession_linked_both_ways_is_in_order(project: Path) -> None:
    """A record may be superseded, if both sides and the index say so."""
    supersede(project)
    old = next(project.glob("adr/0002-*.md"))
    new = next(project.glob("adr/0003-*.md"))
    change("Revisit when", f"Supersedes [ADR-0002]({old.name}). Revisit when", "adr/0003-*.md")(
        project
    )
    change(
        r"^(\| \[0002\].*)\| accepted \|",
        rf"\1| superseded by [ADR-0003]({new.name}) |",
        "adr/README.md",
    )(project)

    assert problems(project) == []
