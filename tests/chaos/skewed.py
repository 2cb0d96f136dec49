"""The command line with a wall clock that is wrong by ``CHAOS_CLOCK_SKEW`` seconds."""

import os
import sys
import time
from datetime import datetime, timedelta

from viralfx.__main__ import main
from viralfx.domain.clock import SystemClock

SKEW = "CHAOS_CLOCK_SKEW"


def _skew(seconds: float) -> None:
    now, of_the_machine, nanoseconds = SystemClock.now, time.time, time.time_ns

    def wrong(self: SystemClock) -> datetime:
        return now(self) + timedelta(seconds=seconds)

    SystemClock.now = wrong  # type: ignore[method-assign]
    time.time = lambda: of_the_machine() + seconds
    time.time_ns = lambda: nanoseconds() + int(seconds * 1e9)


if __name__ == "__main__":
    _skew(float(os.environ[SKEW]))
    sys.exit(main())
