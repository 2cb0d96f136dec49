"""Rules about the files of the repository."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

ADDRESS = re.compile(
    r"https?://\S*(?:pypi|pythonhosted|artifactory|nexus|devpi|/simple\b)"
    r"|^\s*(?:--(?:extra-)?index-url|--find-links|--trusted-host|-i)\b",
    re.IGNORECASE | re.MULTILINE,
)
HOME = re.compile(r"(?<![\w.])/(?:home|Users|root)/\w+")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Return the files that git knows; skip where there is no git or no repository."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("only a checkout knows which files are tracked")
    listed = subprocess.run(
        [git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def text_of(path: Path) -> str:
    """Return a file's text; nothing for one that is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_file_names_a_package_index(tracked: list[Path]) -> None:
    """The index is configured by the machine."""
    found = {p.relative_to(ROOT).as_posix(): ADDRESS.findall(text_of(p)) for p in tracked}

    assert {name: addresses for name, addresses in found.items() if addresses} == {}


def test_no_file_holds_a_home_directory(tracked: list[Path]) -> None:
    """No absolute path is specific to one machine."""
    found = {p.relative_to(ROOT).as_posix(): HOME.findall(text_of(p)) for p in tracked}

    assert {name: paths for name, paths in found.items() if paths} == {}


@pytest.mark.parametrize(
    "line",
    [
        "--index-url http://mirror.internal/pip",
        "    --find-links ./wheels",
        "see https://" + "files.pythonhosted" + ".org/packages/x",
        "http://mirror.internal/root/" + "simple" + "/viralfx",
    ],
)
def test_an_address_is_recognised(line: str) -> None:
    """The pattern matches."""
    assert ADDRESS.search(line)


@pytest.mark.parametrize("user", ["/home/", "/Users/", "/root/"])
def test_a_home_is_recognised(user: str) -> None:
    """The pattern matches."""
    assert HOME.search(f"cd {user}user/viralfx")


def test_the_lock_of_one_tool_is_not_tracked(tracked: list[Path]) -> None:
    """uv.lock records addresses, so it stays private."""
    assert [path for path in tracked if path.name == "uv.lock"] == []
    assert "uv.lock" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    "name", ["requirements.lock", "requirements-dev.lock", "requirements-build.lock"]
)
def test_every_locked_requirement_is_hashed(name: str) -> None:
    """Each requirement has one version and at least one hash."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", "")
    requirements = [line for line in text.splitlines() if line and not line.startswith("#")]
    locked = re.compile(r"[a-z0-9][a-z0-9.-]*==\S+ .*--hash=sha256:[0-9a-f]{64}")

    assert requirements
    assert [line for line in requirements if not locked.match(line)] == []


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-build.lock"])
def test_the_lock_for_developers_holds_the_others(name: str) -> None:
    """Tests run on the versions that the service runs on, and the image is built with."""
    pinned = [
        set(re.findall(r"^(\S+==\S+)", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE))
        for lock in (name, "requirements-dev.lock")
    ]

    assert pinned[0] - pinned[1] == set()


@pytest.mark.parametrize("name", ["lock", "run", "venv"])
def test_a_script_can_be_run(name: str) -> None:
    """Each script of .ci is executable and stops at the first error."""
    script = ROOT / ".ci" / name

    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")


def _fields_of_log_lines(tree: ast.AST) -> list[str]:
    """Return the keys of ``extra=``, ``extra = {...}`` and ``extra["..."] =``."""
    given: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "extra":
            given.append(node.value)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(
                "extra" in {n.id for n in ast.walk(t) if isinstance(n, ast.Name)} for t in targets
            ):
                given += [*targets, node.value]
    return [
        part.value
        for root in given
        for node in ast.walk(root)
        for part in (node.keys if isinstance(node, ast.Dict) else [getattr(node, "slice", None)])
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def test_fields_of_log_lines_are_in_camel_case() -> None:
    """docs/operations.md documents the form; no field comes from the names of a class."""
    fields = {
        (path.name, field)
        for path in SOURCES
        for field in _fields_of_log_lines(ast.parse(path.read_text(encoding="utf-8")))
    }
    unnamed = [path.name for path in SOURCES if "extra=asdict(" in path.read_text(encoding="utf-8")]

    assert len(fields) > 20
    assert {name for name in fields if not re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", name[1])} == set()
    assert unnamed == []


STARTERS = {"concurrent", "multiprocessing", "signal", "subprocess", "threading"}
"""Modules that start threads and processes, or signal them."""
SHARED = {
    *("tests.manual_clock", "tests.virtual_time", "tests.soak"),
    *("tests.unit", "tests.simulation"),
}
"""The modules of the tests that pure ones may import."""


@pytest.mark.parametrize("layer", ["unit", "simulation"])
def test_pure_tests_start_nothing(layer: str) -> None:
    """Such a test never runs again after a failure, so it must not depend on the machine."""
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "tests" / layer).rglob("*.py")
        for name in _imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.partition(".")[0] in STARTERS
        or (name.startswith("tests.") and ".".join(name.split(".")[:2]) not in SHARED)
    }

    assert found == set()


def _imported(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module
    }
