"""Makes a release of the last commit in dist/: wheel, sdist, image, SBOM and checksums.

``just release`` runs it. It uploads nothing.
"""

import argparse
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
GIT = shutil.which("git") or "git"
UV = Path(sys.executable).with_name("uv")

TOOLS = {"twine": "twine==7.0.0", "cyclonedx-py": "cyclonedx-bom==7.5.0"}
"""Programs in environments of their own, so that those of the tests stay small."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def project() -> dict[str, object]:
    """Return the table ``project`` of pyproject.toml."""
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
        "project"
    ]
    return table


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


def _tool(name: str, *arguments: str | Path) -> None:
    command: list[str | Path] = [UV, "tool", "run", "--quiet", "--from", TOOLS[name], name]
    subprocess.run([*command, *arguments], check=True)


def _image(version: str) -> Path | None:
    """Build the image and save it; return None without a container engine."""
    engine = shutil.which("docker")
    if (
        engine is None
        or subprocess.run([engine, "version"], capture_output=True, check=False).returncode
    ):
        return None
    name = f"viralfx-backend:{version}"
    revision = subprocess.check_output([GIT, "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    command = [engine, "build", "--build-arg", f"REVISION={revision}", "--tag", name, "."]
    subprocess.run(command, cwd=ROOT, check=True)
    target = DIST / f"viralfx-backend-{version}.image.tar.gz"
    with (
        subprocess.Popen([engine, "save", name], stdout=subprocess.PIPE) as saved,
        gzip.GzipFile(target, "wb", mtime=0) as file,
    ):
        assert saved.stdout is not None
        shutil.copyfileobj(saved.stdout, file)
    if saved.returncode:
        raise subprocess.CalledProcessError(saved.returncode, saved.args)
    return target


def _sbom(version: str) -> Path:
    target = DIST / f"viralfx-{version}.cdx.json"
    lock, settings = ROOT / "requirements.lock", ROOT / "pyproject.toml"
    _tool(
        "cyclonedx-py",
        "requirements",
        "--pyproject",
        settings,
        "--output-reproducible",
        "--output-file",
        target,
        lock,
    )
    return target


def checksums(files: list[Path]) -> str:
    """Return lines that ``sha256sum --check`` reads."""
    digests = [(hashlib.sha256(file.read_bytes()).hexdigest(), file.name) for file in files]
    return "".join(f"{digest}  {name}\n" for digest, name in digests)


def main() -> int:
    """Make the release; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-image", action="store_true", help="build no image")
    options = parser.parse_args()
    changed = subprocess.check_output([GIT, "status", "--porcelain"], cwd=ROOT, text=True)
    if changed:
        print("release: commit these changes first, or remove them:", changed, sep="\n", end="")
        return 1
    version = str(project()["version"])
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        sources(Path(folder))
        files = build(Path(folder), DIST)
    _tool("twine", "check", "--strict", *files)
    files.append(_sbom(version))
    image = None if options.no_image else _image(version)
    if image is not None:
        files.append(image)
    (DIST / "SHA256SUMS").write_text(checksums(files), encoding="utf-8")
    for file in files:
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.relative_to(ROOT)}")
    if image is None:
        print("no image: " + ("--no-image" if options.no_image else "no container engine answers"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
