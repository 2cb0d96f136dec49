"""The image under test, built once for a run."""

import fcntl

import pytest
from tests.deploy import engine
from tests.servers.fixtures import or_skip

IMAGE = "viralfx-backend:tests"


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the image of this checkout; skip where none can be built."""
    with or_skip():
        engine.require(engine.BASE_IMAGE)
    # The second worker of a run finds every layer in the cache.
    shared = tmp_path_factory.getbasetemp().parent
    with (shared / "image.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine.docker("build", "--quiet", engine.ON_BASE, "--tag", IMAGE, ".", seconds=600)
    return IMAGE
