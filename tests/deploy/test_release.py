"""The wheel and the sdist: their metadata, their files, and links that lead somewhere."""

import email
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from tests.deploy.distribution import (
    GIT,
    ROOT,
    UV,
    build,
    locked,
    project,
    publish_readme,
    repository,
    with_absolute_links,
)
from tests.deploy.extras import declared
from tests.deploy.release import by_digest, checksums, refused, unlisted
from tests.deploy.wheels import Environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
VERSION = str(project()["version"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the wheel and the sdist of this checkout."""
    folder, dist = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for notices in ROOT.glob("THIRD_PARTY*"):
        shutil.copy(notices, folder)
    shutil.copytree(
        ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    publish_readme(folder)
    sdist, wheel = sorted(build(folder, dist), key=lambda path: path.suffix)
    return wheel, sdist


def metadata(wheel: Path) -> Message:
    """Return the metadata of a wheel; its payload is the README."""
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"viralfx-{VERSION}.dist-info/METADATA"))


def test_the_metadata_is_complete(built: tuple[Path, Path]) -> None:
    """An index shows authors, addresses, licence, versions of Python and every extra."""
    found = metadata(built[0])
    urls = dict(str(each).split(", ") for each in found.get_all("Project-URL", ()))

    assert (found["Name"], found["Version"]) == ("viralfx", VERSION)
    assert found["License-Expression"] == "MIT"
    assert found["Author"] == "ViralFX Backend maintainers"
    assert "LICENSE" in found.get_all("License-File", ())
    assert {"Documentation", "Repository", "Changelog", "Issues"} == urls.keys()
    assert {url for url in urls.values() if not url.startswith(repository())} == set()
    assert set(found.get_all("Provides-Extra", ())) == declared().keys() - {""}
    assert found["Description-Content-Type"] == "text/markdown"


def test_the_classifiers_name_supported_versions() -> None:
    """Each version of Python that they name satisfies ``requires-python``."""
    named = re.findall(r":: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    assert named
    assert list(SpecifierSet(str(project()["requires-python"])).filter(named)) == named


def test_the_links_of_the_readme_lead_somewhere(built: tuple[Path, Path]) -> None:
    """In the wheel and the sdist each link is absolute, and leads to a file of this version."""
    with tarfile.open(built[1]) as archive:
        member = archive.extractfile(f"viralfx-{VERSION}/README.md")
        assert member is not None
        in_sdist = member.read().decode()
    links = re.findall(r"\]\(([^)]+)\)", in_sdist)
    ours = re.compile(re.escape(repository()) + rf"/(?:blob|tree)/v{re.escape(VERSION)}/([^#]+)")

    assert str(metadata(built[0]).get_payload()).strip() == in_sdist.strip()
    assert [link for link in links if not link.startswith("https://")] == []
    paths = [found[1] for link in links if (found := ours.match(link))]
    assert len(paths) >= 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_become_absolute() -> None:
    """Files, folders, headings and pictures; other addresses stay."""
    text = "[a](docs/jobs.md#the-api) [b](adr/) ![c](docs/dashboard.png) [d](https://x.y) [e](#f)"
    home = repository()
    raw = home.replace("github.com", "raw.githubusercontent.com")

    assert with_absolute_links(text, "9.9.9").split() == [
        f"[a]({home}/blob/v9.9.9/docs/jobs.md#the-api)",
        f"[b]({home}/tree/v9.9.9/adr/)",
        f"![c]({raw}/v9.9.9/docs/dashboard.png)",
        "[d](https://x.y)",
        "[e](#f)",
    ]


def test_the_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    """Every file of the package is in it, with its licences, and nothing of the repository."""
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
    package = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/viralfx").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }

    assert {n for n in names if not n.startswith(f"viralfx-{VERSION}.dist-info/")} == package | {
        n for n in names if n.endswith("/") and n.startswith("viralfx/")
    }
    assert "viralfx/py.typed" in names
    assert f"viralfx-{VERSION}.dist-info/licenses/LICENSE" in names


BASE = ("msgspec", "psutil", "prometheus-client")
"""The packages that the distribution needs without an extra."""

LIBRARY = """
import viralfx
from viralfx import CircuitBreaker, Deadline, HealthCheck, JobContext, RetryPolicy, retry, task
from viralfx.asgi import OperationsMiddleware
from viralfx import OperationsConfig

calls = []

@retry(attempts=2, base_delay=0.0)
@CircuitBreaker(failure_threshold=5, open_for=60.0)
def flaky():
    calls.append(1)
    if len(calls) == 1:
        raise ConnectionError
    return "done"

assert flaky() == "done"
OperationsMiddleware(print, OperationsConfig())
print(viralfx.__file__)
"""


@pytest.fixture(scope="module")
def alone(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an environment with the wheel and what it needs, and nothing else.

    The packages are those of this environment: the gate asks no index, and the cache of uv may be
    empty. Their versions are those of the lock, or the test skips.
    """
    folder = tmp_path_factory.mktemp("alone") / "venv"
    quiet = ("--quiet", "--offline", "--no-config")
    subprocess.run([UV, "venv", *quiet, "--python", sys.executable, folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in BASE:
        found = distribution(name)
        if found.version != locked()[name]:
            pytest.skip(f"{name} {found.version} is here, and requirements.lock has another one")
        for file in found.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                target = packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)
    install = ("pip", "install", *quiet, "--no-deps", "--python")
    subprocess.run([UV, *install, folder, built[0]], check=True)
    return folder


def ran(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of an environment, with no variable of this process."""
    return subprocess.run(
        [folder / "bin" / command[0], *command[1:]],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )


def test_the_wheel_alone_has_what_it_needs(alone: Path) -> None:
    """Three packages satisfy its metadata, and there is nothing else to import."""
    listed = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
    checked = subprocess.run(
        [UV, "pip", "check", "--offline", "--no-config", "--python", alone],
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stderr
    names = ran(alone, "python", "-c", listed).stdout.split()
    assert [name.replace("_", "-") for name in names] == sorted((*BASE, "viralfx"))


def test_a_package_that_is_missing_is_a_problem(alone: Path) -> None:
    """The wheel alone does not do the job of an extra."""
    (found,) = Environment(alone).problems("litestar")

    assert "No module named 'litestar'" in found


def test_the_wheel_alone_is_a_library(alone: Path) -> None:
    """Resilience and the layer work, from the installed files."""
    used = ran(alone, "python", "-W", "error", "-c", LIBRARY)

    assert (used.returncode, used.stderr) == (0, "")
    assert used.stdout.startswith(str(alone))


def test_the_wheel_alone_names_the_extra_of_a_command(
    alone: Path, built: tuple[Path, Path]
) -> None:
    """In one line that can be pasted into a shell, with exit code 2: pip takes the same wheel."""
    ended = ran(alone, "viralfx", "serve")

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"viralfx: viralfx serve needs viralfx[serve]: pip install '{built[0]}[serve]'\n"
    )


def test_the_changelog_has_this_version() -> None:
    """Its newest release is that of the project."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)

    assert releases[0][0] == VERSION


def test_checksums_can_be_verified(tmp_path: Path) -> None:
    """``sha256sum --check`` accepts them."""
    (tmp_path / "a.whl").write_bytes(b"wheel")
    (tmp_path / "SHA256SUMS").write_text(checksums([tmp_path / "a.whl"]), encoding="utf-8")
    checked = subprocess.run(
        [shutil.which("sha256sum") or "sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (checked.returncode, checked.stdout) == (0, "a.whl: OK\n")


def test_a_release_is_refused_with_the_reasons(tmp_path: Path) -> None:
    """Changes that are not committed, and a tag of the version at another commit."""

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=Tests", "-c", "user.email=tests@example.com")
        subprocess.run([GIT, *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "First")
    git("tag", "--annotate", "--message", "Old", "v1.0.0")
    assert refused(tmp_path, "1.0.0") == []
    git("commit", "--quiet", "--allow-empty", "--message", "Second")
    git("tag", "v1.1.0")
    (tmp_path / "new.py").touch()

    assert refused(tmp_path, "1.1.0") == [
        "commit these changes first, or remove them:\n?? new.py",
    ]
    assert refused(tmp_path, "1.0.0")[1:] == [
        "the tag v1.0.0 names another commit: give this one a version of its own"
    ]


def test_the_sbom_has_the_packages_of_the_lock() -> None:
    """A package of one of them alone is named, and so is another version."""
    listed = [{"name": "celery", "version": "1"}, {"name": "redis", "version": "2"}]

    assert list(unlisted(json.dumps({"components": listed}), {"celery": "1", "redis": "2"})) == []
    assert list(unlisted(json.dumps({"components": listed}), {"redis": "3"})) == [
        "celery 1 is in the SBOM, and requirements.lock has no such version",
        "redis 2 is in the SBOM, and requirements.lock has no such version",
        "redis 3 is in requirements.lock, and not in the SBOM",
    ]
    assert len(locked()) > 50


@pytest.mark.parametrize("name", ["python", "docker.io/python", "docker.io/library/python"])
def test_the_image_of_a_release_is_built_on_a_digest(name: str) -> None:
    """A tag may name another image tomorrow; an image of this machine alone is refused."""
    digest = f"sha256:{'0' * 64}"

    pinned = by_digest("python:3.13-slim", [f"mirror.example/python@{digest}1", f"{name}@{digest}"])

    assert pinned == f"python:3.13-slim@{digest}"
    with pytest.raises(SystemExit, match="has no digest of a registry"):
        by_digest("python:3.13-slim", [])
