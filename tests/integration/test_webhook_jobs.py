"""Webhooks as jobs, from the request to the receiver, without test doubles."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

import pytest
from docs.examples.verify_webhook import verify
from tests.integration.webhooks import KEYS, delivery, receiver_key
from tests.servers.certificates import Certificates
from tests.servers.receiver import Received, Receiver, receiver, status
from tests.unit.doubles import Act, ActingCheck

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.clock import SystemClock
from viralfx.domain.health.model import CheckPolicy
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.domain.webhooks.signature import WebhookKeys, show_key
from viralfx.jobs.alerts import HealthAlerts
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.memory import MemoryJobLedger, MemoryNotifier
from viralfx.jobs.model import Job, JobState
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import TaskRegistry
from viralfx.jobs.worker import built_in_tasks
from viralfx.jobs.worker.maintenance import Retention
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig
from viralfx.settings import read_settings
from viralfx.settings.model import webhook_keys


def is_signed(request: Received, key: bytes) -> bool:
    """Verify a request as its receiver does, by the example of docs/webhooks.md."""
    try:
        verify(request.headers, request.body, show_key(key), time.time())
    except ValueError:
        return False
    return True


QUEUES = ["default", "notifications", "analytics"]


@dataclass
class System:
    """The parts of the service that webhooks need."""

    service: JobService
    monitor: HealthMonitor
    check: ActingCheck
    alerts: HealthAlerts

    async def job(self, job_id: str, when: Callable[[Job], bool]) -> Job:
        """Return a job once it satisfies a condition."""
        async with asyncio.timeout(20):
            while not when(job := await self.service.get(job_id)):  # noqa: ASYNC110 - it is looked up
                await asyncio.sleep(0.01)
        return job

    async def final(self, job_id: str) -> Job:
        """Return a job once it is final."""
        return await self.job(job_id, lambda job: job.state.final)

    async def jobs(self, count: int, task: str) -> list[Job]:
        """Return the jobs of a task once there are as many and all are final."""
        async with asyncio.timeout(20):
            while True:
                jobs = [job for job in (await self.service.search()).jobs if job.task == task]
                if len(jobs) >= count and all(job.state.final for job in jobs):
                    return [await self.service.get(job.id) for job in jobs]
                await asyncio.sleep(0.01)


class SettableClock(SystemClock):
    """The machine's clock, or an earlier time."""

    behind = timedelta()

    def now(self) -> datetime:
        """Return the time."""
        return super().now() - self.behind


@asynccontextmanager
async def system(
    receiving: Receiver, certificates: Certificates, *, missed: bool = False
) -> AsyncIterator[System]:
    """Run a worker and a monitor with one check; alerts go to the receiver.

    ``missed``: the schedules missed times before.
    """
    clock, codec = SettableClock(), MsgspecCodec()
    ledger, notification = MemoryJobLedger(clock), MemoryNotifier()
    monitor, check = HealthMonitor(clock=clock), ActingCheck(Act.PASS)
    monitor.register("database", check, CheckPolicy(interval=0.02, timeout=1.0))
    where = f"127.0.0.1:{receiving.port}"
    tasks = TaskRegistry(
        built_in_tasks(
            ledger=ledger,
            monitor=monitor,
            clock=clock,
            delivery=delivery(where, trust=certificates),
            alert_url=f"https://{where}/alerts/hunter2",
            webhook_timeout=5.0,
            retention=Retention(finished=3600.0, failed=3600.0),
            instance="one",
        )
    )
    if missed:
        clock.behind = timedelta(hours=2)
        schedules = [each.schedule for each in tasks if each.schedule is not None]
        await ledger.declare_schedules(schedules, 86_400.0)
        clock.behind = timedelta()
    config = WorkerConfig(name="one", queues=dict.fromkeys(QUEUES, 2), poll_interval=0.02)
    worker = JobWorker(config, ledger=ledger, notifier=notification, tasks=tasks, codec=codec)
    service = JobService(ledger=ledger, tasks=tasks, codec=codec, queues=QUEUES)
    alerts = HealthAlerts(
        service,
        clock=clock,
        instance="one",
        environment="test",
        shared=lambda _: True,
        keys=WebhookKeys(KEYS),
    )
    monitor.subscribe(alerts)
    telling = asyncio.create_task(alerts.run())
    monitor.start()
    worker.start()
    try:
        yield System(service, monitor, check, alerts)
    finally:
        telling.cancel()
        await asyncio.wait({telling})
        await monitor.stop()
        await worker.drain(5.0)
        await notification.close()


@pytest.fixture
async def secure(certificates: Certificates) -> AsyncIterator[Receiver]:
    """Return a receiver with TLS."""
    async with receiver(certificates.server_context()) as receiving:
        yield receiving


async def test_job_sends_a_webhook(secure: Receiver, certificates: Certificates) -> None:
    """Its id is the message id, and its result has the response."""
    secure.respond_with(status(204))
    async with system(secure, certificates) as running:
        url = f"https://127.0.0.1:{secure.port}/in"
        message = {"url": url, "type": "order.shipped", "data": {"id": 7}}
        accepted = await running.service.submit("notifications.webhook", message)

        job = await running.final(accepted.job.id)

        assert (job.state, job.result) == (JobState.COMPLETED, b'{"status":204}')
        (request,) = secure.requests
        headers = request.headers
        assert headers["webhook-id"] == job.id
        assert is_signed(request, receiver_key(KEYS[1], f"https://127.0.0.1:{secure.port}"))
        assert json.loads(request.body)["data"] == {"id": 7}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (status(410), "127.0.0.1 answered 410"),
        (status(302, "Location: http://169.254.169.254/"), "redirects are not followed"),
    ],
)
async def test_a_refusing_receiver_fails_the_job(
    secure: Receiver, certificates: Certificates, response: bytes, expected: str
) -> None:
    """At once, with the status in the error."""
    secure.respond_with(response)
    async with system(secure, certificates) as running:
        message = {"url": f"https://127.0.0.1:{secure.port}/in", "type": "a", "data": {}}
        accepted = await running.service.submit("notifications.webhook", message)
        job = await running.final(accepted.job.id)
        assert (job.state, job.attempts) == (JobState.FAILED, 1)
        assert job.error is not None
        assert expected in job.error.message
        assert len(secure.requests) == 1


async def test_retry_after_of_the_receiver_delays_the_job(
    secure: Receiver, certificates: Certificates
) -> None:
    """The attempt is spent."""
    secure.respond_with(status(429, "Retry-After: 7200"))
    async with system(secure, certificates) as running:
        message = {"url": f"https://127.0.0.1:{secure.port}/in", "type": "a", "data": {}}
        accepted = await running.service.submit("notifications.webhook", message)
        job = await running.job(accepted.job.id, lambda job: job.attempts == 1)
        assert job.state is JobState.WAITING
        pause = (job.run_at - SystemClock().now()).total_seconds()
        assert pause == pytest.approx(7200, abs=30)


async def test_forbidden_urls_are_not_called(secure: Receiver, certificates: Certificates) -> None:
    """Malformed URLs are not accepted; hosts that are not allowed fail for good."""
    async with system(secure, certificates) as running:
        for url in ("ftp://127.0.0.1/", "https://2130706433/", "https://x@127.0.0.1/"):
            with pytest.raises(PayloadError, match="URL"):
                await running.service.submit(
                    "notifications.webhook", {"url": url, "type": "a", "data": {}}
                )
        message = {"url": f"https://localhost:{secure.port}/", "type": "a", "data": {}}
        accepted = await running.service.submit("notifications.webhook", message)
        job = await running.final(accepted.job.id)
        assert (job.state, job.attempts) == (JobState.FAILED, 1)
        assert job.error is not None
        assert "WEBHOOK_ALLOWED_HOSTS does not list" in job.error.message
        assert secure.connections == 0


async def test_a_change_of_health_is_sent_as_an_alert(
    secure: Receiver, certificates: Certificates
) -> None:
    """Loss and recovery; no job contains the URL."""
    async with system(secure, certificates) as running:
        running.check.act = Act.FAIL
        await running.jobs(1, "notifications.webhook")
        running.check.act = Act.PASS
        jobs = await running.jobs(2, "notifications.webhook")

        assert {job.state for job in jobs} == {JobState.COMPLETED}
        delivered = [json.loads(request.body)["data"] for request in secure.requests]
        assert [each["status"] for each in delivered] == ["fail", "pass"]
        assert {request.line for request in secure.requests} == {"POST /alerts/hunter2 HTTP/1.1"}
        assert all("hunter2" not in repr(job) for job in jobs)


async def test_only_the_service_makes_signed_alerts(
    secure: Receiver, certificates: Certificates
) -> None:
    """A submitted job with the payload of an alert, even a copy, is sent without a signature."""
    async with system(secure, certificates) as running:
        running.check.act = Act.FAIL
        (alert,) = await running.jobs(1, "notifications.webhook")
        payload = json.loads(alert.payload)
        made_up = {"alert": True, "type": "health.changed", "data": {}}
        for forged in (payload, {**payload, "proof": None}, made_up):
            accepted = await running.service.submit("notifications.webhook", forged)
            await running.final(accepted.job.id)

        genuine, *others = secure.requests
        key = receiver_key(KEYS[0], f"https://127.0.0.1:{secure.port}", purpose="alert")
        assert is_signed(genuine, key)
        assert len(others) == 3
        assert all("webhook-signature" not in other.headers for other in others)


async def test_receivers_of_a_former_version_verify_during_a_migration(
    secure: Receiver, certificates: Certificates
) -> None:
    """The former secret signs beside the new keys, until the receivers have those."""
    secret, former = (show_key(key) for key in KEYS)
    where = f"127.0.0.1:{secure.port}"
    settings = read_settings(
        {
            "WEBHOOK_ALLOWED_HOSTS": where,
            "WEBHOOK_SECRET": secret,
            "WEBHOOK_SHARED_SECRET": former,
        }
    )
    delivering = delivery(where, trust=certificates, keys=webhook_keys(settings))

    await delivering.deliver(f"https://{where}/in", message_id="job-1", body=b"{}")

    (request,) = secure.requests
    assert verify(request.headers, request.body, former, time.time()) == "job-1"
    theirs = show_key(receiver_key(KEYS[0], f"https://{where}"))
    assert verify(request.headers, request.body, theirs, time.time()) == "job-1"
    with pytest.raises(ValueError, match="not signed with this secret"):
        verify(request.headers, request.body, secret, time.time())


async def test_scheduled_tasks_run(secure: Receiver, certificates: Certificates) -> None:
    """Each hour; here the ones that were due while no worker ran."""
    async with system(secure, certificates, missed=True) as running:
        (rollup,) = await running.jobs(1, "analytics.rollup_health")
        (prune,) = await running.jobs(1, "default.prune")
        assert rollup.result is not None
        assert json.loads(rollup.result)["checks"]["database"]["status"] == "pass"
        assert (prune.state, prune.result) == (JobState.COMPLETED, b'{"pruned":0}')
