"""Logs, metrics and traces: listeners and hooks of the domain, and their output."""
