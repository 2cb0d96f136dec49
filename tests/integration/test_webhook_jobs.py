"""Webhooks as jobs, from whoever asks for one to the receiver: nothing between is replaced."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from tests.integration.webhooks import KEYS, delivery
from tests.servers.certificates import Certificates
from tests.servers.receiver import Receiver, receiver, status
from tests.servers.waiting import wait_until
from tests.unit.doubles import Act, ActingCheck

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryBell, MemoryJobLedger
from viralfx.domain.clock import SystemClock
from viralfx.domain.health import CheckPolicy
from viralfx.domain.jobs.alerts import HealthAlerts
from viralfx.domain.jobs.codec import PayloadError
from viralfx.domain.jobs.job import Job, JobState
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import TaskRegistry
from viralfx.domain.jobs.worker import JobWorker
from viralfx.domain.monitor import HealthMonitor
from viralfx.worker import built_in_periodic, built_in_tasks
from viralfx.worker.tasks import ROLLUP_PERIOD

QUEUES = ["default", "notifications", "analytics"]


@dataclass
class System:
    """What the service is made of, as far as webhooks go."""

    service: JobService
    monitor: HealthMonitor
    check: ActingCheck
    alerts: HealthAlerts

    async def job(self, job_id: str, when: Callable[[Job], bool]) -> Job:
        """Return a job once it is as wanted."""
        async with asyncio.timeout(20):
            while not when(job := await self.service.get(job_id)):  # noqa: ASYNC110 - it is looked up
                await asyncio.sleep(0.01)
        return job

    async def final(self, job_id: str) -> Job:
        """Return a job once nothing more happens to it."""
        return await self.job(job_id, lambda job: job.state.final)

    async def jobs(self, count: int, task: str) -> list[Job]:
        """Return the jobs of a task once there are so many and all are final."""
        async with asyncio.timeout(20):
            while True:
                jobs = [job for job in await self.service.page() if job.task == task]
                if len(jobs) >= count and all(job.state.final for job in jobs):
                    return jobs
                await asyncio.sleep(0.01)


@asynccontextmanager
async def system(receiving: Receiver, certificates: Certificates) -> AsyncIterator[System]:
    """Run a worker and a monitor with one check; alerts go to the receiver."""
    clock, codec = SystemClock(), MsgspecCodec()
    ledger, bell = MemoryJobLedger(clock), MemoryBell()
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
            retention=3600.0,
            instance="one",
        )
    )
    worker = JobWorker(
        ledger=ledger,
        transport=bell,
        tasks=tasks,
        codec=codec,
        queues=dict.fromkeys(QUEUES, 2),
        worker="one",
        look_interval=0.02,
        periodic=built_in_periodic(),
    )
    service = JobService(ledger=ledger, tasks=tasks, codec=codec, queues=QUEUES)
    alerts = HealthAlerts(
        service, clock=clock, instance="one", environment="test", shared=lambda _: True
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
        await bell.close()


@pytest.fixture
async def secure(certificates: Certificates) -> AsyncIterator[Receiver]:
    """Return a receiver that speaks TLS."""
    async with receiver(certificates.server_context()) as receiving:
        yield receiving


async def test_a_job_becomes_a_webhook(secure: Receiver, certificates: Certificates) -> None:
    """Its id is the message's, and its result says what the receiver answered."""
    secure.answer(status(204))
    async with system(secure, certificates) as running:
        url = f"https://127.0.0.1:{secure.port}/in"
        message = {"url": url, "type": "order.shipped", "data": {"id": 7}}
        accepted = await running.service.submit("notifications.webhook", message)

        job = await running.final(accepted.job.id)

        assert (job.state, job.result) == (JobState.COMPLETED, b'{"status":204}')
        (request,) = secure.requests
        headers = request.headers
        assert headers["webhook-id"] == job.id
        signed = f"{job.id}.{headers['webhook-timestamp']}.".encode() + request.body
        digest = base64.b64encode(hmac.new(KEYS[1], signed, hashlib.sha256).digest()).decode()
        assert f"v1,{digest}" in headers["webhook-signature"].split()
        assert json.loads(request.body)["data"] == {"id": 7}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (status(410), "127.0.0.1 answered 410"),
        (status(302, "Location: http://169.254.169.254/"), "redirects are not followed"),
    ],
)
async def test_a_receiver_that_will_not_have_it(
    secure: Receiver, certificates: Certificates, answer: bytes, told: str
) -> None:
    """The job fails at once, and says why."""
    secure.answer(answer)
    async with system(secure, certificates) as running:
        message = {"url": f"https://127.0.0.1:{secure.port}/in", "type": "a", "data": {}}
        accepted = await running.service.submit("notifications.webhook", message)
        job = await running.final(accepted.job.id)
        assert (job.state, job.attempts) == (JobState.FAILED, 1)
        assert job.error is not None
        assert told in job.error.message
        assert len(secure.requests) == 1


async def test_a_receiver_that_is_busy_is_asked_again_when_it_says(
    secure: Receiver, certificates: Certificates
) -> None:
    """The job waits, its attempt spent, for as long as the receiver asked for."""
    secure.answer(status(429, "Retry-After: 7200"))
    async with system(secure, certificates) as running:
        message = {"url": f"https://127.0.0.1:{secure.port}/in", "type": "a", "data": {}}
        accepted = await running.service.submit("notifications.webhook", message)
        job = await running.job(accepted.job.id, lambda job: job.attempts == 1)
        assert job.state is JobState.WAITING
        pause = (job.run_at - SystemClock().now()).total_seconds()
        assert pause == pytest.approx(7200, abs=30)


async def test_what_may_not_be_called_is_not(secure: Receiver, certificates: Certificates) -> None:
    """Unreadable URLs are not even accepted; hosts that nobody listed fail for good."""
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


async def test_a_change_of_health_arrives(secure: Receiver, certificates: Certificates) -> None:
    """From the check to the receiver, loss and recovery; the URL stands in no job."""
    async with system(secure, certificates) as running:
        running.check.act = Act.FAIL
        await running.jobs(1, "notifications.webhook")
        running.check.act = Act.PASS
        jobs = await running.jobs(2, "notifications.webhook")

        assert {job.state for job in jobs} == {JobState.COMPLETED}
        told = [json.loads(request.body)["data"] for request in secure.requests]
        assert [each["status"] for each in told] == ["fail", "pass"]
        assert {request.line for request in secure.requests} == {"POST /alerts/hunter2 HTTP/1.1"}
        assert all("hunter2" not in repr(job) for job in jobs)


async def test_the_periodic_ones_run_by_themselves(
    secure: Receiver, certificates: Certificates
) -> None:
    """Once for the period under way."""
    # Not where the next one begins meanwhile.
    wait_until(lambda: time.time() % ROLLUP_PERIOD < ROLLUP_PERIOD - 5, what="an hour begins")
    async with system(secure, certificates) as running:
        (rollup,) = await running.jobs(1, "analytics.rollup_health")
        (prune,) = await running.jobs(1, "default.prune")
        assert rollup.result is not None
        assert json.loads(rollup.result)["checks"]["database"]["status"] == "pass"
        assert (prune.state, prune.result) == (JobState.COMPLETED, b'{"pruned":0}')
