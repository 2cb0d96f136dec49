"""Makes a release of the last commit in dist/: wheel, sdist, image, SBOM and checksums.

``just release`` runs it. The files appear in dist/ once all of them have passed their checks. It
uploads nothing.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.results import circumstances, command, publish, table
from tests.deploy.distribution import GIT, ROOT, UV, build, locked, project, sources
from tests.deploy.wheels import from_lock

DIST = ROOT / "dist"
TOOLS = {"twine": "twine==7.0.0", "cyclonedx-py": "cyclonedx-bom==7.5.0"}
"""Programs in environments of their own, so that those of the tests stay small."""


def refused(checkout: Path, version: str) -> list[str]:
    """Return the reasons why the last commit of a checkout cannot be released as a version."""
    problems = []
    if changed := _git(checkout, "status", "--porcelain"):
        problems.append(f"commit these changes first, or remove them:\n{changed}")
    tag = f"v{version}"
    tagged = _git(
        checkout, "for-each-ref", "--format=%(*objectname)%(objectname)", f"refs/tags/{tag}"
    )
    head = _git(checkout, "rev-parse", "HEAD")
    if tagged and not tagged.startswith(head):
        problems.append(f"the tag {tag} names another commit: give this one a version of its own")
    return problems


def _git(checkout: Path, *arguments: str) -> str:
    return subprocess.check_output([GIT, *arguments], cwd=checkout, text=True).strip()


def _tool(name: str, *arguments: str | Path) -> None:
    tool: list[str | Path] = [UV, "tool", "run", "--quiet", "--from", TOOLS[name], name]
    subprocess.run([*tool, *arguments], check=True)


def _image(folder: Path, version: str, revision: str) -> Path | None:
    """Build the image, check it, and save it to a folder; return None without an engine."""
    engine = shutil.which("docker")
    if (
        engine is None
        or subprocess.run([engine, "version"], capture_output=True, check=False).returncode
    ):
        return None
    name = f"viralfx-backend:{version}"
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (tag,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    subprocess.run([engine, "pull", "--quiet", tag], check=False)  # the digest decides
    show = [engine, "image", "inspect", "--format={{json .RepoDigests}}", tag]
    base = by_digest(tag, json.loads(subprocess.check_output(show, text=True)) or [])
    given = (
        f"--build-arg=BASE_IMAGE={base}",
        f"--build-arg=REVISION={revision}",
        f"--build-arg=VERSION={version}",
    )
    subprocess.run([engine, "build", *given, "--tag", name, "."], cwd=ROOT, check=True)
    environment = subprocess.check_output([engine, "run", "--rm", name, "env"], text=True)
    if not re.search(rf"\bREVISION\b.*{revision}", environment):
        raise SystemExit(f"release: the image {name} does not show its commit {revision}")
    target = folder / f"viralfx-backend-{version}.image.tar.gz"
    with (
        subprocess.Popen([engine, "save", name], stdout=subprocess.PIPE) as saved,
        gzip.GzipFile(target, "wb", mtime=0) as file,
    ):
        assert saved.stdout is not None
        shutil.copyfileobj(saved.stdout, file)
    if saved.returncode:
        raise subprocess.CalledProcessError(saved.returncode, saved.args)
    return target


def by_digest(tag: str, digests: list[str]) -> str:
    """Return a base image by its tag and its digest, so that its content is certain.

    ``digests`` are those that the engine knows. Raises ``SystemExit`` if none is of a registry.
    """
    repository = tag.rpartition(":")[0]
    prefixes = ("", "docker.io/", "docker.io/library/")
    for each in digests:
        name, at, digest = each.partition("@")
        if at and name in {f"{prefix}{repository}" for prefix in prefixes}:
            return f"{tag}@{digest}"
    raise SystemExit(f"release: {tag} has no digest of a registry; use --no-image, or pull it")


def _sbom(folder: Path, version: str) -> Path:
    target = folder / f"viralfx-{version}.cdx.json"
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


def unlisted(bill: str, packages: Mapping[str, str]) -> Iterator[str]:
    """Yield each package that only one of a CycloneDX document and a lock has in its version."""
    listed = {(each["name"], each["version"]) for each in json.loads(bill).get("components", ())}
    for name, version in sorted(listed - set(packages.items())):
        yield f"{name} {version} is in the SBOM, and requirements.lock has no such version"
    for name, version in sorted(set(packages.items()) - listed):
        yield f"{name} {version} is in requirements.lock, and not in the SBOM"


def checksums(files: list[Path]) -> str:
    """Return lines that ``sha256sum --check`` reads."""
    digests = [(hashlib.sha256(file.read_bytes()).hexdigest(), file.name) for file in files]
    return "".join(f"{digest}  {name}\n" for digest, name in digests)


def make(folder: Path, version: str, *, image: bool) -> list[Path]:
    """Make the files of a release in a folder, and check them; return their paths.

    Raises ``SystemExit`` with the problems, and ``CalledProcessError`` where a program fails.
    """
    folder.mkdir()
    sources(folder.parent / "sources")
    files = build(folder.parent / "sources", folder)
    _tool("twine", "check", "--strict", *files)
    (wheel,) = folder.glob("*.whl")
    bill = _sbom(folder, version)
    problems = [
        *from_lock(wheel, folder.parent / "installed"),
        *unlisted(bill.read_text(encoding="utf-8"), locked()),
    ]
    if problems:
        raise SystemExit("\n".join(f"release: {each}" for each in problems))
    files.append(bill)
    if image and (saved := _image(folder, version, _git(ROOT, "rev-parse", "HEAD"))):
        files.append(saved)
    (folder / "SHA256SUMS").write_text(checksums(files), encoding="utf-8")
    return files


def main() -> int:
    """Make the release; return the exit code."""
    parser = argparse.ArgumentParser(prog="just release", description=__doc__)
    parser.add_argument("--no-image", action="store_true", help="build no image")
    parser.add_argument("--record", action="store_true", help="publish the files in RESULTS.md")
    options = parser.parse_args()
    version = str(project()["version"])
    if reasons := refused(ROOT, version):
        for reason in reasons:
            print(f"release: {reason}", file=sys.stderr)
        return 1
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        files = make(Path(folder, "dist"), version, image=not options.no_image)
        shutil.rmtree(DIST, ignore_errors=True)
        shutil.move(Path(folder, "dist"), DIST)
    rows = []
    for line in (DIST / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        size = (DIST / name).stat().st_size / 2**20
        rows.append((f"`{name}`", f"{size:.2f}", f"`{digest}`"))
    without = "--no-image" if options.no_image else "no container engine answers"
    image = any(file.name.endswith(".image.tar.gz") for file in files)
    lines = [
        *circumstances(
            command("release"),
            "Checked: twine check --strict, the wheel with the packages of requirements.lock, and"
            " the SBOM against them",
            "The image was run, and shows its commit" if image else f"No image: {without}",
            f"The links of its README need the tag v{version} at this commit",
        ),
        "",
        *table(("file in dist/", "MiB", "SHA-256"), rows),
    ]
    return publish("release.py", lines, (), check=False, record=options.record)


if __name__ == "__main__":
    sys.exit(main())
