"""The image, built and run with its constraints."""

import re
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.deploy.engine import (
    BASE_IMAGE,
    CONSTRAINED,
    IN_MEMORY,
    ON_BASE,
    ROOT,
    attempt,
    container,
    docker,
    inspected,
)

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]

LARGEST = 1.3
"""The image's size to that of its base and what the lock names, unpacked."""

NEEDED = ["DATABASE_URL", "API_TOKEN"]
SECRETS_IN_FILES = (
    "--env=DATABASE_URL=postgresql://viralfx@database/viralfx",
    "--env=REDIS_HOST=redis",
    "--env=DB_PASSWORD_FILE=/run/secrets/DB_PASSWORD",
    "--env=API_TOKEN_FILE=/run/secrets/API_TOKEN",
)

INSPECTION = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/1/status").read().splitlines())
print(status["Uid"].split()[0], status["Gid"].split()[0], status["CapEff"], status["NoNewPrivs"])
for folder in ("/", "/app", "/opt/viralfx", "/tmp", "/etc"):
    try:
        open(folder + "/written", "w")
        print("written", folder)
    except OSError as error:
        print(error.strerror)
"""

WITHOUT_SHELLS = """
FROM {image}
USER 0
RUN ["python", "-c", "import glob, os; \\
     [os.remove(f) for name in ('sh', 'dash', 'bash') for f in glob.glob('/usr/bin/' + name)]"]
USER 10001:10001
"""


def named_by_the_lock() -> Iterator[Requirement]:
    """Yield what the lock names for the image's system."""
    there = {"sys_platform": "linux", "python_full_version": "3.13.0"}
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for line in re.findall(r"^(\w.*?) \\$", text, re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(there):
            yield requirement


def test_it_runs_without_root_capabilities_or_anywhere_to_write(image: str) -> None:
    """HEALTHCHECK passes, requests are answered, and ``docker stop`` ends it with 0."""
    with container(image, options=IN_MEMORY) as service:
        service.wait_healthy()
        user, *refusals = service.python(INSPECTION).splitlines()

        assert user == "10001 10001 0000000000000000 1"
        assert set(refusals) == {"Read-only file system"}
        ready = service.wait(lambda: service.answers("/health/ready"), "an answer")
        assert ready.status == 200
        assert service.get("/health").json()["environment"] == "production"
        docker("stop", service.name)
        assert service.state()["ExitCode"] == 0
        assert service.logged("Process ends")[0]["reason"] == "SIGTERM"


def test_a_heap_report_that_has_no_place_is_one_line(image: str) -> None:
    """Without a writable folder the service starts, and survives the signal."""
    with container(image, options=IN_MEMORY) as service:
        service.wait_healthy()
        docker("kill", "--signal=USR2", service.name)
        (line,) = service.wait(lambda: service.logged("Heap report failed"), "the line")

        assert line["detail"] == "cannot create the file: Read-only file system"
        assert service.get("/health/live").status == 200


def test_it_needs_no_shell(image: str, tmp_path: Path) -> None:
    """Neither to serve nor for its HEALTHCHECK."""
    (tmp_path / "Dockerfile").write_text(WITHOUT_SHELLS.format(image=image))
    bare = docker("build", "--quiet", tmp_path)
    try:
        with container(bare, options=IN_MEMORY) as service:
            refused = attempt("exec", service.name, "sh", "-c", "true")
            assert "executable file not found" in refused.stdout + refused.stderr
            service.wait_healthy()
    finally:
        docker("rmi", "--force", bare)


def test_labels_and_defaults(image: str) -> None:
    """Its labels, user, entry point and default command."""
    config = inspected(image)["Config"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    label = {
        name.removeprefix("org.opencontainers.image."): v for name, v in config["Labels"].items()
    }

    assert label["version"] == project["version"]
    assert label["base.name"] == BASE_IMAGE
    assert label["title"]
    assert (config["User"], config["StopSignal"]) == ("10001:10001", "SIGTERM")
    assert config["Entrypoint"] == ["tini", "-e", "143", "-e", "129", "--", "viralfx"]
    assert config["Cmd"] == ["serve"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert "ENVIRONMENT=production" in config["Env"]


@pytest.mark.usefixtures("image")
def test_another_version_than_the_projects_is_not_built() -> None:
    """A wrong label would be found only in production."""
    refused = attempt("build", "--build-arg=VERSION=9.9.9", ON_BASE, ".")

    assert refused.returncode != 0
    assert "VERSION=9.9.9 is not what pyproject.toml says" in refused.stderr


def test_it_builds_without_a_network_and_is_small(image: str, tmp_path: Path) -> None:
    """From a folder of wheels that was filled before, to no more than they and the base need."""
    wheels, tag = tmp_path / "wheels", f"{image}-offline"

    docker("build", "--target=wheels", f"--output={wheels}", ON_BASE, ".", seconds=300)
    without = ("--no-cache", "--network=none", f"--build-context=wheels={wheels}")
    docker("build", *without, ON_BASE, "--tag", tag, ".", seconds=300)
    try:
        help_text = docker("run", "--rm", "--network=none", *CONSTRAINED, tag, "--help")
        size = int(inspected(tag)["Size"])
    finally:
        docker("rmi", tag)
    locked = [w for w in wheels.glob("*.whl") if not w.name.startswith("uv-")]
    unpacked = sum(sum(i.file_size for i in zipfile.ZipFile(w).infolist()) for w in locked)
    least = int(inspected(BASE_IMAGE)["Size"]) + unpacked
    print(f"image {size / 1e6:.0f} MB, base and lock {least / 1e6:.0f} MB: {size / least:.2f}")

    assert "viralfx" in help_text
    assert len(locked) == len(list(named_by_the_lock()))
    assert size <= LARGEST * least


def test_missing_production_settings_are_reported_together(image: str) -> None:
    """Each variable is one line with a remedy, as docs/deployment.md shows; nothing is served."""
    ran = attempt("run", "--rm", *CONSTRAINED, image)
    document = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")

    assert ran.returncode == 2
    assert re.findall(r"^viralfx: (\w+): .+", ran.stderr, re.MULTILINE) == NEEDED
    assert len(ran.stderr.splitlines()) == len(NEEDED)
    assert f"```\n{ran.stderr}```\n" in document


@pytest.mark.parametrize("command", ["serve", "worker", "migrate"])
def test_a_missing_secret_file_is_reported_at_start(image: str, command: str) -> None:
    """Every command names the variable, the file and the reason."""
    ran = attempt("run", "--rm", *CONSTRAINED, *SECRETS_IN_FILES, image, command)

    assert ran.returncode == 2
    assert ran.stderr.splitlines() == [
        f"viralfx: {name}: cannot read {name}_FILE=/run/secrets/{name}: No such file or directory"
        for name in ("API_TOKEN", "DB_PASSWORD")
    ]


def test_nothing_of_the_build_is_left(image: str) -> None:
    """No uv, no wheels, no cache, and no byte code without its module."""
    code = (
        "import glob, importlib.util, os, sys;"
        "print([w for w in ('/wheels', '/build', '/root/.cache') if os.path.exists(w)],"
        " importlib.util.find_spec('uv'), importlib.util.find_spec('pip'),"
        " [c for c in glob.glob(sys.prefix + '/**/*.pyc', recursive=True)"
        "  if not os.path.exists(importlib.util.source_from_cache(c))])"
    )

    assert docker("run", "--rm", "--entrypoint=python", image, "-c", code) == "[] None None []"
