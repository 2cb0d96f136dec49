"""The tasks that the jobs API offers: each caller may submit those that its rights allow."""

from viralfx.domain.access import Principal
from viralfx.jobs.tasks import TaskRegistry, unknown_task

NOT_OFFERED = (
    "Clients may not submit the task {!r} over HTTP. Submit it in the process with `jobs.submit`,"
    " or with `viralfx jobs submit`; or declare a task that submits it, and send that one."
)
"""The detail of the refusal of a task with ``api=False``."""


def is_offered(task: str, tasks: TaskRegistry, caller: Principal) -> bool:
    """Return True if clients may submit a task, which the caller's rights allow.

    Raises :class:`UnknownTaskError`, which suggests only tasks that the caller may submit.
    """
    if task not in tasks:
        raise unknown_task(task, filter(caller.may_submit, tasks.offered))
    return tasks.find(task).api
