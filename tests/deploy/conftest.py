"""The image under test, built once for a run."""

import pytest
from tests.deploy import engine
from tests.servers.fixtures import or_skip

IMAGE = "viralfx-backend:tests"


@pytest.fixture(scope="session")
def image() -> str:
    """Return the image of this checkout; skip where none can be built."""
    with or_skip():
        engine.require(engine.BASE_IMAGE)
    engine.docker("build", "--quiet", engine.ON_BASE, "--tag", IMAGE, ".", seconds=600)
    return IMAGE
