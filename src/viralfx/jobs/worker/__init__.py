"""The engine that runs jobs, and the built-in tasks."""

from viralfx.jobs.worker.builtin import built_in_tasks

__all__ = ["built_in_tasks"]
