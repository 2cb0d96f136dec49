"""Bells over Redis streams, by taskiq's stream broker and receiver (ADR-0023).

* :class:`StreamTransport` (client) answers the port ``JobTransport``; the client is the Redis
  adapter's.
"""

from viralfx.adapters.taskiq.transport import BellNotRungError, StreamTransport

__all__ = ["BellNotRungError", "StreamTransport"]
