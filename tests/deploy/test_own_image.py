"""The Dockerfile of a user's own application, as docs/deployment.md shows it, built and run."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.deploy.engine import (
    BASE_IMAGE,
    IN_MEMORY,
    ON_BASE,
    ROOT,
    attempt,
    container,
    docker,
    inspected,
    require,
)
from tests.deploy.source import source
from tests.deploy.wheels import wheel_of_checkout
from tests.servers.fixtures import or_skip

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]

DOCUMENT = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
SECTION = DOCUMENT[DOCUMENT.index("## An image of your own application") :].partition("\n## ")[0]
IMAGE = "parcels:tests"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the image from the folder that the document describes; return its name."""
    with or_skip():
        require(BASE_IMAGE)
    folder = tmp_path_factory.mktemp("parcels")
    (dockerfile,) = re.findall(r"```dockerfile\n(.*?)```", SECTION, re.DOTALL)
    (folder / "Dockerfile").write_text(dockerfile, encoding="utf-8")
    (lines,) = re.findall(r"`requirements.txt` with the lines (.+?), \[", SECTION, re.DOTALL)
    requirements = re.findall(r"`([^`]+)`", lines)
    (folder / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")
    shutil.copy(ROOT / "docs/examples/parcels.py", folder)
    wheel = wheel_of_checkout(tmp_path_factory.mktemp("wheel"))
    shutil.copy(wheel, folder)
    assert wheel.name == Path(source()).name
    docker("build", "--quiet", ON_BASE, "--tag", IMAGE, folder, seconds=280)
    yield IMAGE
    docker("rmi", "--force", IMAGE)


def test_it_serves_the_application_and_stops_in_order(own: str) -> None:
    """Its route accepts a job, HEALTHCHECK passes, and ``docker stop`` ends it with 0."""
    with container(own, options=(*IN_MEMORY, "--init")) as service:
        service.wait_healthy()
        ready = service.wait(lambda: service.answers("/health/ready"), "an answer")
        placed = service.get("/orders/17", method="POST")
        user = service.python("import os; print(os.getuid())")
        docker("stop", service.name)

        assert ready.status == 200
        assert placed.status == 202
        assert placed.json().keys() == {"job"}
        assert user == "10001"
        assert service.state()["ExitCode"] == 0
        assert service.logged("Process ends")[0]["reason"] == "SIGTERM"


def test_it_holds_the_commands_and_no_wheel(own: str) -> None:
    """The worker, the jobs and the migrations are in it, Litestar and the wheel are not."""
    code = (
        "import glob, importlib.util as u;"
        "names = ('asyncpg', 'structlog', 'fastapi', 'litestar');"
        "print([u.find_spec(name) is not None for name in names],"
        " sorted(glob.glob('/app/*')))"
    )
    inside = docker("run", "--rm", "--entrypoint=python", own, "-c", code)
    refused = attempt("run", "--rm", own, "worker", "--app", "parcels:app")
    config = inspected(own)["Config"]

    assert inside == "[True, True, True, False] ['/app/parcels.py', '/app/requirements.txt']"
    assert refused.returncode == 2
    assert refused.stderr.startswith("viralfx: DATABASE_URL: ENVIRONMENT=production refuses")
    assert (config["User"], config["Entrypoint"]) == ("10001:10001", ["viralfx"])
    assert json.dumps(config["Cmd"]) in SECTION
