"""The limit of open files that a server sets at its start."""

import subprocess
import sys


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    """The test runs in a separate process, because it changes the process's limits."""
    program = (
        "import resource\n"
        "from viralfx.server.limits import raise_descriptor_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))\n"
        "raise_descriptor_limit()\n"
        "raise_descriptor_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "(300, 300)\n"
