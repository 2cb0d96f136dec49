"""Wiring of webhooks and alerts from the settings."""

import asyncio
import subprocess
import sys

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import ActingCheck

from viralfx.adapters.codec import MsgspecCodec
from viralfx.bootstrap.jobs import alert_url, wire_alerts, wire_webhooks
from viralfx.domain.health.model import CheckPolicy, Status, Transition
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.domain.webhooks.url import WebhookRefusedError, WebhookUnavailableError
from viralfx.jobs.memory import MemoryJobLedger
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import TaskRegistry
from viralfx.jobs.worker import built_in_tasks
from viralfx.jobs.worker.maintenance import Retention
from viralfx.settings import Secret, Settings, WebhookSettings

SECRET = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
ALERTS = Secret(" https://127.0.0.1:9/alerts ")


def test_the_http_client_is_not_loaded_without_webhooks() -> None:
    """Loading it would double the start-up time."""
    program = (
        "import sys\n"
        "from viralfx.bootstrap.jobs import wire_webhooks\n"
        "from viralfx.core.clock import SystemClock\n"
        "from viralfx.settings import Settings\n"
        "wire_webhooks(Settings(), SystemClock())\n"
        "sys.exit('httpcore' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_no_webhook_is_allowed_by_default(clock: ManualClock) -> None:
    """There are neither hosts nor alerts."""
    delivery = wire_webhooks(Settings(), clock)
    with pytest.raises(WebhookRefusedError, match="does not list"):
        await delivery.deliver("https://example.com/", message_id="i", body=b"")
    assert alert_url(Settings()) is None


async def test_listed_hosts_and_the_alert_host_are_called(clock: ManualClock) -> None:
    """By https, within the configured timeout; no server listens here."""
    settings = Settings(
        webhook=WebhookSettings(allowed_hosts=("127.0.0.1:1",), secret=SECRET, timeout=2.0),
        alert_webhook_url=ALERTS,
    )
    delivery = wire_webhooks(settings, clock)
    assert alert_url(settings) == "https://127.0.0.1:9/alerts"
    for url in ("https://127.0.0.1:1/", "https://127.0.0.1:9/alerts"):
        with pytest.raises(WebhookUnavailableError, match="cannot be connected to"):
            await delivery.deliver(url, message_id="i", body=b"")


async def test_concurrent_first_deliveries_share_one_sender(clock: ManualClock) -> None:
    """The sender is created once."""
    settings = Settings(webhook=WebhookSettings(allowed_hosts=("127.0.0.1:1",), secret=SECRET))
    delivery = wire_webhooks(settings, clock)
    sent = [delivery.deliver("https://127.0.0.1:1/", message_id="i", body=b"") for _ in range(3)]

    outcomes = await asyncio.gather(*sent, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [WebhookUnavailableError] * 3


async def test_alerts_follow_the_monitor_if_a_url_is_set(clock: ManualClock) -> None:
    """A shared check causes one alert for all instances."""
    settings = Settings(alert_webhook_url=ALERTS, environment="staging")
    monitor, ledger = HealthMonitor(clock=clock), MemoryJobLedger(clock)
    for name in ("database", "memory"):
        monitor.register(name, ActingCheck(), CheckPolicy(shared=name == "database"))
    tasks = built_in_tasks(
        ledger=ledger,
        monitor=monitor,
        clock=clock,
        delivery=wire_webhooks(settings, clock),
        alert_url=alert_url(settings),
        webhook_timeout=10.0,
        retention=Retention(),
        instance="pod-1",
    )
    service = JobService(
        ledger=ledger, tasks=TaskRegistry(tasks), codec=MsgspecCodec(), queues=["notifications"]
    )
    assert wire_alerts(Settings(), clock, service, monitor, "pod-1") is None
    alerts = wire_alerts(settings, clock, service, monitor, "pod-1")
    assert alerts is not None
    for name in ("database", "memory"):
        alerts(
            Transition(
                check=name,
                old=None,
                new=Status.FAIL,
                code=None,
                message="",
                at=clock.now(),
                correlation_id=None,
            )
        )
    telling = asyncio.create_task(alerts.run())
    await clock.settle()
    telling.cancel()
    await asyncio.wait({telling})
    jobs = ledger.submitted()
    window = int(clock.now().timestamp() // 300)
    assert {job.key for job in jobs} == {
        f"alert all:database:fail:{window}",
        f"alert pod-1:memory:fail:{window}",
    }
    assert all(b'"environment":"staging"' in job.payload for job in jobs)
