"""Notifies workers over Redis streams, with taskiq's stream broker and receiver (ADR-0023).

* :class:`StreamNotifier` (client) implements the port ``JobNotifier`` with the Redis adapter's
  client.
"""

from viralfx.telemetry import hide_packages

# Where it is installed and not in use, taskiq would load all of it, and OpenTelemetry with it.
with hide_packages("fastapi"):
    from viralfx.adapters.taskiq.notifier import StreamNotifier

__all__ = ["StreamNotifier"]
