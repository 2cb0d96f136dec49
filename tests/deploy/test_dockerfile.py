"""The Dockerfile and what it is built from, read; no engine is needed."""

import re
import tomllib

from tests.deploy.engine import ROOT

from viralfx.settings import read_settings
from viralfx.settings.model import WORKER_MANAGEMENT_PORT, Settings

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = [
    line
    for line in TEXT.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def instructions(name: str) -> list[str]:
    """Return what follows an instruction, wherever it stands."""
    return [line.split(None, 1)[1] for line in LINES if line.startswith(f"{name} ")]


def test_nothing_but_the_base_image_comes_from_a_registry() -> None:
    """No frontend and no file comes from another image."""
    stages = {stage.partition(" AS ")[2] for stage in instructions("FROM")}
    sources = set(re.findall(r"(?:--from|,from|=from)=([\w./:-]+)", TEXT))

    assert not re.search(r"^#\s*syntax\s*=", TEXT, re.MULTILINE)
    assert {stage.split(" ")[0] for stage in instructions("FROM")} == {"${BASE_IMAGE}", "scratch"}
    assert sources == {"download", "wheels", "build"}
    assert sources < stages


def test_the_base_image_can_be_given_by_digest() -> None:
    """Each stage is built on the one argument, which has a tag for a first build."""
    named = [each for each in instructions("FROM") if not each.startswith("scratch")]

    assert len(named) == 3
    assert {each.split()[0] for each in named} == {"${BASE_IMAGE}"}
    assert re.findall(r"^ARG BASE_IMAGE=(.+)$", TEXT, re.MULTILINE) == ["python:3.13-slim"]


def test_only_the_first_stage_uses_a_network() -> None:
    """It fetches what the locks name, and the init; each install verifies the hashes."""
    networked = [run for run in instructions("RUN") if "--network=none" not in run]
    installing = [
        command
        for run in instructions("RUN")
        for command in run.split("&&")
        if re.search(r"pip (download|install)", command) and "dist/*.whl" not in command
    ]

    assert len(networked) == 2
    assert "pip download" in networked[0]
    assert "apt-get download" in networked[1]
    assert "apt-get install" not in TEXT
    assert TEXT.index("apt-get download") < TEXT.index("FROM scratch AS wheels")
    assert len(installing) == 3
    assert [command for command in installing if "--require-hashes" not in command] == []


def test_the_version_is_the_projects() -> None:
    """The default of the build argument is the version of the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert set(re.findall(r"VERSION=([\d.]+)$", TEXT, re.MULTILINE)) == {project["version"]}
    assert f'licenses="{project["license"]}"' in TEXT


def test_the_image_states_its_commit_twice() -> None:
    """For the tools of registries, and for the process, which shows it at /health/info."""
    (argument,) = [each for each in instructions("ARG") if "REVISION" in each]
    last = TEXT[TEXT.index(f"ARG {argument}") :]

    assert argument.endswith("REVISION=")
    assert "\nENV REVISION=${REVISION}\n" in last
    assert 'org.opencontainers.image.revision="${REVISION}"' in last
    assert read_settings({"REVISION": ""}).revision is None
    assert read_settings({"REVISION": "9f2c1aa"}).revision == "9f2c1aa"


def test_the_ports_are_those_of_the_settings() -> None:
    """That of the API, that of a worker's management, and that of the API's in the manifests."""
    (exposed,) = instructions("EXPOSE")
    assert exposed == f"{Settings().port} {WORKER_MANAGEMENT_PORT} {WORKER_MANAGEMENT_PORT + 1}"


def test_the_build_context_holds_only_copied_files() -> None:
    """Nothing else of a checkout reaches the engine, secrets least of all."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    given = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        name
        for line in instructions("COPY")
        if not line.startswith("--from")
        for name in line.split()[:-1]
    }

    assert "*" in ignored
    assert copied == given
