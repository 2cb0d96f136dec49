"""Wires the jobs: their ledger, what tells of them, who runs them, and who may ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryJobLedger
from viralfx.bootstrap.modules import declared_tasks, load_tasks, registry_of
from viralfx.domain.clock import Clock
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import TaskRegistry
from viralfx.domain.jobs.watch import JobWatch
from viralfx.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSystem:
    """Everything about jobs in one process."""

    service: JobService
    watch: JobWatch
    tasks: TaskRegistry
    ledger: JobLedger


def wire_jobs(settings: Settings, clock: Clock, functions: Sequence[object]) -> JobSystem:
    """Wire the jobs; nothing runs yet.

    ``functions`` are an application's own tasks. Raises :class:`ConfigurationError`.
    """
    codec = MsgspecCodec()
    tasks = _tasks(settings, functions, codec)
    ledger: JobLedger = MemoryJobLedger(clock)
    service = JobService(ledger=ledger, tasks=tasks, codec=codec, queues=settings.queues)
    return JobSystem(
        service=service, watch=JobWatch(service.get, clock), tasks=tasks, ledger=ledger
    )


def _tasks(settings: Settings, functions: Sequence[object], codec: MsgspecCodec) -> TaskRegistry:
    loaded, problems = load_tasks(settings.task_modules)
    given, more = declared_tasks(functions)
    registry, wrong = registry_of([*loaded, *given], (), settings.queues, codec)
    if problems or more or wrong:
        raise ConfigurationError([*problems, *more, *wrong])
    return registry
