"""The public names are those of their description, so that no change of them goes unnoticed."""

import difflib
import shutil
from pathlib import Path

from tests.architecture.public_api import DESCRIPTION, MODULES, ROOT, description

CHANGES = {
    "resilience/policy.py": ("attempts: int | None = 3", "attempts: int | None = 4"),
    "resilience/bulkhead.py": ("queue: int = 0", "waiting: int = 0"),
    "resilience/deadline.py": ("def remaining(", "def left("),
    "core/errors.py": ("ConfigurationError(ViralFXError)", "ConfigurationError(Exception)"),
}
"""A default value, a parameter, a member and a base class, before and after a change."""


def difference(old: str, new: str) -> list[str]:
    """Return the lines that were removed and added."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def test_the_public_names_are_described() -> None:
    """The description is that of the code; `just api` renews it."""
    described = DESCRIPTION.read_text(encoding="utf-8")

    assert difference(described, description()) == [], "run `just api`, see CONTRIBUTING.md"


def test_each_public_module_is_described() -> None:
    """Modules at the top of the package are those that applications import."""
    modules = {path.stem for path in (ROOT / "src/viralfx").glob("[a-z]*.py")}

    assert {f"viralfx.{name}" for name in modules} <= set(MODULES)


def test_changes_are_noticed(tmp_path: Path) -> None:
    """Each kind of change that breaks applications changes the description."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for file, (before, after) in CHANGES.items():
        changed = tmp_path / "src/viralfx" / file
        text = changed.read_text(encoding="utf-8")
        assert before in text
        changed.write_text(text.replace(before, after), encoding="utf-8")
    found = difference(DESCRIPTION.read_text(encoding="utf-8"), description(tmp_path))

    for before, after in CHANGES.values():
        parts = before.removeprefix("def "), after.removeprefix("def ")
        for sign, part in zip("-+", parts, strict=True):
            assert any(line.startswith(sign) and part in line for line in found), part
