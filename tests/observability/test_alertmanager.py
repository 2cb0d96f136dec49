"""From a fault to the message for a person: rules, Prometheus, Alertmanager and a webhook."""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import yaml
from tests.servers.alertmanager import CONFIGURATION, Alertmanager, amtool
from tests.servers.fixtures import or_skip
from tests.servers.ports import free_port
from tests.servers.prometheus import PrometheusServer
from tests.servers.receiver import Receiver, receiver, status
from tests.servers.waiting import until, wait_until
from tests.system.service import ROOT, Service, running

# The first test may download Prometheus.
pytestmark = pytest.mark.timeout(300)

JOB = "viralfx-backend"
RECEIVERS = ("on-call", "team")


def checked(*arguments: str | Path) -> str:
    """Run amtool; return its output and fail unless it succeeds."""
    with or_skip():
        program = amtool()
    ran = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def rules() -> Any:
    """Return the shipped rules; alerts fire after a second instead of minutes."""
    text = (ROOT / "deploy/observability/rules.yml").read_text(encoding="utf-8")
    return yaml.safe_load(re.sub(r"(?m)^( +(?:keep_firing_)?for: )\d+m$", r"\g<1>1s", text))


@asynccontextmanager
async def receivers() -> AsyncIterator[Mapping[str, Receiver]]:
    """Receive the messages for each receiver of the shipped file."""
    async with receiver() as on_call, receiver() as team:
        for each in (on_call, team):
            each.respond_with(status(200, "Connection: close"))
        yield dict(zip(RECEIVERS, (on_call, team), strict=True))


@contextmanager
def alertmanager(to: Mapping[str, Receiver]) -> Iterator[Alertmanager]:
    """Run an Alertmanager that sends to these receivers."""
    with or_skip(), Alertmanager({name: each.port for name, each in to.items()}) as running_one:
        yield running_one


@contextmanager
def served(port: int) -> Iterator[Service]:
    """Run the service on a port."""
    with running(environment={"PORT": str(port)}) as service:
        service.port = port
        yield service.wait_ready()


def messages(received: Receiver, alert: str, state: str) -> list[dict[str, Any]]:
    """Return the messages about an alert in a state, ``firing`` or ``resolved``."""
    bodies = [json.loads(request.body) for request in received.requests]
    return [
        body
        for body in bodies
        if body["status"] == state and body["groupLabels"]["alertname"] == alert
    ]


def test_amtool_accepts_the_configuration() -> None:
    """It has no unknown field and no unknown receiver."""
    output = checked("check-config", CONFIGURATION)

    assert "SUCCESS" in output
    assert "2 receivers" in output


@pytest.mark.parametrize(("severity", "name"), [("critical", "on-call"), ("warning", "team")])
def test_the_severity_selects_the_receiver(severity: str, name: str) -> None:
    """Amtool follows the routes."""
    command = ("config", "routes", "test", f"--config.file={CONFIGURATION}")

    assert checked(*command, f"severity={severity}", "alertname=ViralFXAny").split() == [name]


def test_inhibitions_name_existing_alerts() -> None:
    """A renamed alert would silence nothing any more."""
    known = {rule["alert"] for group in rules()["groups"] for rule in group["rules"]}
    configuration = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    patterns = [
        matcher.partition("=")[2].strip('~"')
        for rule in configuration["inhibit_rules"]
        for matcher in (*rule["source_matchers"], *rule["target_matchers"])
        if matcher.startswith("alertname")
    ]

    assert len(patterns) == 6
    for pattern in patterns:
        named = [name for name in known if re.fullmatch(pattern, name)]
        assert len(named) == 1 + pattern.count("|"), pattern


async def test_a_dead_instance_pages_the_person_on_call() -> None:
    """The message has the labels, the text and the procedure; a second one reports the end."""
    async with receivers() as to:
        await asyncio.to_thread(_die_and_return, to)
        (page, *_) = messages(to["on-call"], "ViralFXDown", "firing")
        (end, *_) = messages(to["on-call"], "ViralFXDown", "resolved")
        assert messages(to["team"], "ViralFXDown", "firing") == []

    (alert,) = page["alerts"]
    (ended,) = end["alerts"]
    instance = alert["labels"]["instance"]
    document, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"(?m)^## (.+)$", (ROOT / document).read_text(encoding="utf-8"))
    assert page["receiver"] == "on-call"
    assert page["groupLabels"] == {"alertname": "ViralFXDown", "job": JOB}
    assert alert["labels"] == {
        "alertname": "ViralFXDown",
        "instance": instance,
        "job": JOB,
        "severity": "critical",
    }
    assert alert["annotations"]["summary"] == f"{instance} does not answer scrapes"
    assert instance in alert["annotations"]["description"]
    assert [heading for heading in headings if heading.lower() == anchor] == ["ViralFXDown"]
    assert ended["labels"] == alert["labels"]
    assert ended["startsAt"] == alert["startsAt"] < ended["endsAt"]


def _die_and_return(to: Mapping[str, Receiver]) -> None:
    """Kill an instance; once its page has arrived, start it again until the end is reported."""
    port, on_call = free_port(), to["on-call"]
    with (
        alertmanager(to) as manager,
        PrometheusServer({JOB: [port]}, rules=rules(), alertmanager=manager.port) as prometheus,
    ):
        with served(port) as service:
            wait_until(
                lambda: prometheus.ask("query", query="up == 1")["result"], what="it is scraped"
            )
            service.signal(SIGKILL)
            service.exit_code()
        wait_until(lambda: messages(on_call, "ViralFXDown", "firing"), seconds=60, what="the page")
        with served(port):
            wait_until(
                lambda: messages(on_call, "ViralFXDown", "resolved"), seconds=60, what="the end"
            )


async def test_the_cause_silences_its_consequences() -> None:
    """The alerts of one instance become one message; those of other instances stay."""
    where = {"job": JOB, "instance": "a"}
    down = {"alertname": "ViralFXDatabaseDown", "severity": "critical", **where}
    check = {"alertname": "ViralFXCheckFailing", "severity": "warning", "check": "database"}
    other = {"alertname": "ViralFXMemoryHigh", "severity": "warning", **where}
    not_ready = {"alertname": "ViralFXNotReady", "severity": "critical", "job": JOB}
    async with receivers() as to:
        with alertmanager(to) as manager:
            # Alertmanager decides about an alert when its group waits no longer.
            await asyncio.to_thread(
                manager.send, down, {**check, **where}, other, {**not_ready, "instance": "a"}
            )
            await until(lambda: messages(to["on-call"], "ViralFXDatabaseDown", "firing"))
            await until(lambda: messages(to["team"], "ViralFXMemoryHigh", "firing"))
            found = await asyncio.to_thread(manager.alerts)
            await asyncio.to_thread(manager.send, {**not_ready, "instance": "b"})
            await until(lambda: messages(to["on-call"], "ViralFXNotReady", "firing"))

        (page,) = messages(to["on-call"], "ViralFXNotReady", "firing")
        assert messages(to["team"], "ViralFXCheckFailing", "firing") == []
    assert [alert["labels"]["instance"] for alert in page["alerts"]] == ["b"]
    assert {name: alert["status"]["state"] for name, alert in found.items()} == {
        "ViralFXDatabaseDown": "active",
        "ViralFXCheckFailing": "suppressed",
        "ViralFXMemoryHigh": "active",
        "ViralFXNotReady": "suppressed",
    }
