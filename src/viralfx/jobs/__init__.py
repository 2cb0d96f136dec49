"""Jobs that are never lost: tasks, service, schedules, and the ports of ledger and notifier.

``worker`` runs the jobs; ``memory`` and ``postgres`` keep them. The package knows neither settings
nor telemetry nor HTTP.
"""
