"""Runs an application: owns signals, sockets and the ordered stop."""
