"""Builds wheel and sdist, and reads the project file, the lock and the README for them."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIT = shutil.which("git") or "git"
UV = Path(sys.executable).with_name("uv")

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def project() -> dict[str, object]:
    """Return the table ``project`` of pyproject.toml."""
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
        "project"
    ]
    return table


def locked() -> dict[str, str]:
    """Return the version of each package of requirements.lock."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE))


def repository() -> str:
    """Return the address of the repository."""
    urls = project()["urls"]
    assert isinstance(urls, dict)
    return str(urls["Repository"])


def with_absolute_links(readme: str, version: str) -> str:
    """Return the README for a package index, where relative links lead nowhere.

    The links lead to the files of this version.
    """
    home = repository()
    raw = home.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def absolute(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        kind = "tree" if (ROOT / target.partition("#")[0]).is_dir() else "blob"
        start = f"{raw}/v{version}" if image else f"{home}/{kind}/v{version}"
        return f"{image}[{text}]({start}/{target})"

    return _LINK.sub(absolute, readme)


def sources(folder: Path) -> None:
    """Write the files of the last commit to a folder, with the README for a package index."""
    packed = subprocess.run(
        [GIT, "archive", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    publish_readme(folder)


def publish_readme(folder: Path) -> None:
    """Make the links of the README in a folder absolute."""
    readme = folder / "README.md"
    version = str(project()["version"])
    readme.write_text(with_absolute_links(readme.read_text("utf-8"), version), "utf-8")


def build(folder: Path, dist: Path) -> list[Path]:
    """Build wheel and sdist of the sources in a folder; return their paths."""
    subprocess.run([UV, "build", "--quiet", "--out-dir", dist, folder], check=True)
    (dist / ".gitignore").unlink(missing_ok=True)
    return sorted([*dist.glob("*.whl"), *dist.glob("*.tar.gz")])
