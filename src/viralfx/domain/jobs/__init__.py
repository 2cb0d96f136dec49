"""Durable jobs: the model, the ledger and notifier ports, task declarations and the job service."""
