"""The tasks that come with the service, made of what the process was wired with."""

from viralfx.worker.tasks import built_in_periodic, built_in_tasks

__all__ = ["built_in_periodic", "built_in_tasks"]
