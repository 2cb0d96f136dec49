"""The program's entry point: ``viralfx`` and ``python -m viralfx``."""

import signal
import sys


def main() -> int:
    """Run the command line and return its exit code.

    First it blocks the signals that stop the service: without a handler they would end the process
    at once. The command unblocks them when its handlers are installed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    from viralfx.cli import main as run  # noqa: PLC0415 - after the signals are blocked

    return run()


if __name__ == "__main__":
    sys.exit(main())
