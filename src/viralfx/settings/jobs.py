"""The settings of jobs and of what they send: the variables ``JOB_*`` and ``WEBHOOK_*``."""

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from viralfx.domain.webhooks.allowed import parse_allowed
from viralfx.domain.webhooks.signature import parse_secrets
from viralfx.settings.kinds import (
    Attempts,
    Hosts,
    Milliseconds,
    PositiveMilliseconds,
    Secret,
    Threshold,
    meaning,
)

# No timer waits for it, so it need not fit into one: ten years.
Retention = Annotated[int, Meta(ge=0, le=315_360_000_000)]

# A worker has to renew it several times over a database that is busy.
Lease = Annotated[int, Meta(ge=1000, le=2**31 - 1)]
# What no bell told of waits for the next look.
LookInterval = Annotated[int, Meta(ge=1, le=60_000)]

_LEAST_RETENTION = 7_200_000
"""Milliseconds: twice the longest period of a periodic job."""


class JobSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How jobs are run and kept. A field's variable is ``JOB_`` and its name."""

    concurrency: Annotated[Threshold, meaning("Jobs of one queue that a worker runs at once")] = 10
    timeout: Annotated[
        PositiveMilliseconds, meaning("Time for one attempt of a task that says nothing itself")
    ] = 300_000
    max_attempts: Annotated[
        Attempts, meaning("Attempts of a task that says nothing itself before its job fails")
    ] = 3
    max_crashes: Annotated[Attempts, meaning("Workers that may die over a job before it fails")] = 5
    lease: Annotated[Lease, meaning("Time after which a worker that is silent counts as dead")] = (
        30_000
    )
    sweep_interval: Annotated[
        PositiveMilliseconds, meaning("Time between two searches for jobs of dead workers")
    ] = 5000
    look_interval: Annotated[
        LookInterval, meaning("Time between two looks for jobs that no bell told of")
    ] = 1000
    retention: Annotated[
        Retention, meaning("Time for which a job is kept after it ended; 0: for ever")
    ] = 604_800_000
    backlog_warn: Annotated[
        Milliseconds, meaning("Time a job may be overdue before the queues check warns; 0: any")
    ] = 60_000

    def contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        """Yield what is wrong, each with the variables that it comes from."""
        if self.sweep_interval > self.lease:
            problem = (
                f"JOB_SWEEP_INTERVAL: {self.sweep_interval} is more than JOB_LEASE={self.lease}, so"
                " jobs of dead workers would be found late; lower it, or raise JOB_LEASE"
            )
            yield frozenset({"JOB_SWEEP_INTERVAL", "JOB_LEASE"}), problem
        if 0 < self.retention < _LEAST_RETENTION:
            problem = (
                f"JOB_RETENTION: {self.retention} is less than {_LEAST_RETENTION}, so hourly jobs"
                " would be forgotten and run again in the same hour; raise it"
            )
            yield frozenset({"JOB_RETENTION"}), problem


class WebhookSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What ``notifications.webhook`` may do. A field's variable is ``WEBHOOK_`` and its name."""

    allowed_hosts: Annotated[Hosts, meaning("The only hosts that webhooks are sent to")] = ()
    secret: Annotated[
        Secret | None, meaning("Signs webhooks, as whsec_... says; unset: none but alerts is sent")
    ] = None
    timeout: Annotated[PositiveMilliseconds, meaning("Time for one webhook")] = 10_000

    def contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        """Yield what is wrong, each with the variables that it comes from."""
        for entry in self.allowed_hosts:
            try:
                parse_allowed(entry)
            except ValueError as error:
                yield frozenset({"WEBHOOK_ALLOWED_HOSTS"}), f"WEBHOOK_ALLOWED_HOSTS: {error}"
        try:
            _ = self.secret and parse_secrets(self.secret.value)
        except ValueError as error:
            yield frozenset({"WEBHOOK_SECRET"}), f"WEBHOOK_SECRET: {error}"
