"""Where pip takes the package from, in README, documents and units: ``just source`` renews it.

One variable of the code says it, ``SOURCE`` of viralfx/core/extras.py. Each document sets the
variable ``VIRALFX`` to it before its first command. No command has the name of the package alone.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.deploy.distribution import ROOT, project

from viralfx.core.extras import SOURCE

VARIABLE = "VIRALFX"
_SET = re.compile(rf"^((?:export |ARG )?{VARIABLE}=)(\S+)$", re.MULTILINE)
_INSTALL = re.compile(r"\binstall\b(?! -D)[^`\n]*", re.MULTILINE)
_BY_NAME = re.compile(r"(?<![\w./@{$-])viralfx(?![\w./-])")
"""The name as a requirement, not a part of a path or of another word."""


def source() -> str:
    """Return what the documents give pip in this version."""
    return SOURCE.format(version=project()["version"])


def documents() -> Iterator[Path]:
    """Yield each file that a reader installs by."""
    yield ROOT / "README.md"
    yield ROOT / "CONTRIBUTING.md"
    yield from sorted((ROOT / "docs").glob("*.md"))
    yield from sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file())


def sources_of(text: str) -> list[str]:
    """Return what a text sets the variable to."""
    return [value for _, value in _SET.findall(text)]


def by_name(text: str) -> list[str]:
    """Return the commands of a text that install the package by its name alone."""
    found = (each[0] for each in _INSTALL.finditer(text))
    return [each for each in found if _BY_NAME.search(each)]


def renewed(text: str) -> str:
    """Return a text with the source of this version."""
    return _SET.sub(lambda found: f"{found[1]}{source()}", text)


def main() -> int:
    """Renew each document; return the exit code."""
    for path in documents():
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        if (new := renewed(text)) != text:
            path.write_text(new, encoding="utf-8", errors="surrogateescape")
            print(f"{path.relative_to(ROOT)}: {VARIABLE}={source()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
