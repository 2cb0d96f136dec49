"""Floods a port with endless requests, and prints as JSON how its connections ended."""

import json
import os
import sys
from math import inf

from tests.edge.flood import HEADERS, MIB, ONE_HEADER, ONE_URL, flood

NICENESS = 10
"""A low priority, so that the probes on the same core do not wait for this process."""
SECONDS = 120.0


def main() -> None:
    """Attack ``PORT`` with ``CONNECTIONS`` until ``MEBIBYTES`` are sent, at this rate a second.

    A rate of 0 means as fast as possible.
    """
    port, connections, mebibytes, each_second = map(int, sys.argv[1:])
    os.nice(NICENESS)
    kinds = [ONE_HEADER, ONE_URL, *[HEADERS] * (connections - 2)]
    total = mebibytes * MIB
    rate = each_second * MIB or inf
    outcome = flood(port, kinds, connections=connections, total=total, seconds=SECONDS, rate=rate)
    print(json.dumps(outcome.ends))


if __name__ == "__main__":
    main()
