"""Floods a port with endless requests or tiny chunks; prints as JSON how connections ended."""

import json
import os
import select
import sys
import time
from contextlib import ExitStack
from math import inf

from tests.edge.flood import HEADERS, MIB, ONE_HEADER, ONE_URL, flood
from tests.edge.wire import Wire

NICENESS = 10
"""A low priority, so that the probes on the same core do not wait for this process."""
SECONDS = 120.0


CHUNKED = b"POST /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"1\r\na\r\n" * 20_000


def main() -> None:
    """Attack ``PORT`` with ``CONNECTIONS`` until ``MEBIBYTES`` are sent, at this rate a second.

    A rate of 0 means as fast as possible. A negative one means bodies in chunks of one byte.
    """
    port, connections, mebibytes, each_second = map(int, sys.argv[1:])
    os.nice(NICENESS)
    if each_second < 0:
        send_chunks(port, connections, mebibytes * MIB)
        return
    kinds = [ONE_HEADER, ONE_URL, *[HEADERS] * (connections - 2)]
    total = mebibytes * MIB
    rate = each_second * MIB or inf
    outcome = flood(port, kinds, connections=connections, total=total, seconds=SECONDS, rate=rate)
    print(json.dumps(outcome.ends))


def send_chunks(port: int, connections: int, total: int) -> None:
    """Send bodies in chunks of one byte over all connections, as fast as the server reads."""
    deadline = time.monotonic() + SECONDS
    with ExitStack() as stack:
        sockets = [stack.enter_context(Wire(port)).socket for _ in range(connections)]
        for each in sockets:
            each.sendall(CHUNKED)
            each.setblocking(False)
        # Each continues where the kernel took no more, so that the chunks stay valid.
        places, sent = dict.fromkeys(sockets, 0), 0
        while sent < total and time.monotonic() < deadline:
            for each in select.select([], sockets, [], 1.0)[1]:
                count = each.send(CHUNKS[places[each] :])
                places[each] = (places[each] + count) % len(CHUNKS)
                sent += count
        print(json.dumps({"open": len(sockets)} if sent >= total else {"late": len(sockets)}))


if __name__ == "__main__":
    main()
