"""What the settings of webhooks and alerts come to."""

import asyncio
import subprocess
import sys

import pytest
from tests.manual_clock import ManualClock
from tests.unit.doubles import ActingCheck

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryJobLedger
from viralfx.bootstrap.webhooks import alert_url, wire_alerts, wire_webhooks
from viralfx.domain.health import CheckPolicy, Status, Transition
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import TaskRegistry
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.webhooks.errors import WebhookRefusedError, WebhookUnavailableError
from viralfx.settings import Secret, Settings, WebhookSettings
from viralfx.worker import built_in_tasks

SECRET = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
ALERTS = Secret(" https://127.0.0.1:9/alerts ")


def test_a_process_without_webhooks_does_not_load_their_client() -> None:
    """It costs as much as the rest of a start."""
    program = (
        "import sys\n"
        "from viralfx.bootstrap.webhooks import wire_webhooks\n"
        "from viralfx.domain.clock import SystemClock\n"
        "from viralfx.settings import Settings\n"
        "wire_webhooks(Settings(), SystemClock())\n"
        "sys.exit('httpcore' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_nothing_is_allowed_by_default(clock: ManualClock) -> None:
    """Neither hosts nor alerts."""
    delivery = wire_webhooks(Settings(), clock)
    with pytest.raises(WebhookRefusedError, match="does not list"):
        await delivery.deliver("https://example.com/", message_id="i", body=b"")
    assert alert_url(Settings()) is None


async def test_listed_hosts_and_the_alerts_host_are_called(clock: ManualClock) -> None:
    """By https, within the time that is set; nobody listens here."""
    settings = Settings(
        webhook=WebhookSettings(allowed_hosts=("127.0.0.1:1",), secret=SECRET, timeout=2000),
        alert_webhook_url=ALERTS,
    )
    delivery = wire_webhooks(settings, clock)
    assert alert_url(settings) == "https://127.0.0.1:9/alerts"
    for url in ("https://127.0.0.1:1/", "https://127.0.0.1:9/alerts"):
        with pytest.raises(WebhookUnavailableError, match="cannot be connected to"):
            await delivery.deliver(url, message_id="i", body=b"")


async def test_what_sends_is_made_once_for_all_who_send_at_first(clock: ManualClock) -> None:
    """However many begin at the same time."""
    settings = Settings(webhook=WebhookSettings(allowed_hosts=("127.0.0.1:1",), secret=SECRET))
    delivery = wire_webhooks(settings, clock)
    sent = [delivery.deliver("https://127.0.0.1:1/", message_id="i", body=b"") for _ in range(3)]

    outcomes = await asyncio.gather(*sent, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [WebhookUnavailableError] * 3


async def test_alerts_hear_the_monitor_where_they_have_somewhere_to_go(clock: ManualClock) -> None:
    """What is shared is told for all instances together."""
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
        retention=0.0,
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
    jobs = await ledger.page(limit=10)
    window = int(clock.now().timestamp() // 300)
    assert {job.key for job in jobs} == {
        f"alert all:database:fail:{window}",
        f"alert pod-1:memory:fail:{window}",
    }
    assert all(b'"environment":"staging"' in job.payload for job in jobs)
