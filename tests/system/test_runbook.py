"""The commands of the runbook and of the deployment's checklist, run against the service."""

import re
from collections.abc import Iterator
from typing import Any

import jq
import pytest
from tests.observability.wired import described, wired
from tests.system.service import ROOT, Service, running

RUNBOOK = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
DEPLOYMENT = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
ASKED = sorted(
    set(re.findall(r'\$INSTANCE(/[^"\s]*)"? \| jq \'(.+)\'$', RUNBOOK + DEPLOYMENT, re.MULTILINE))
)
SEARCHED = re.findall(r"\$INSTANCE/metrics \| grep (?:-E )?'([^']+)'", RUNBOOK)
TOKEN = {"Authorization": "Bearer planted"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Return a service in memory, with a token for everything."""
    environment = {"MANAGEMENT_TOKEN": "planted", "API_TOKEN": "planted"}
    with running(environment=environment) as service:
        yield service.wait_ready()


@pytest.mark.parametrize(("path", "text"), ASKED)
def test_a_filter_finds_what_it_is_for(service: Service, path: str, text: str) -> None:
    """The path exists, and the filter prints something but nulls, unless there is nothing now."""
    reply = service.get(path, headers=TOKEN)
    found: list[Any] = jq.compile(text).input_value(reply.json()).all()
    nothing_now = ".items[]" in text or 'select(.status == "fail")' in text

    assert reply.status == 200
    assert nothing_now or found not in ([], [None])
    if not nothing_now:
        for shown in found:
            assert not isinstance(shown, dict) or any(v is not None for v in shown.values())


def test_there_are_many_of_them() -> None:
    """The rule above looks at them all."""
    assert len(ASKED) >= 18
    assert len(SEARCHED) >= 9


@pytest.mark.parametrize("pattern", SEARCHED)
def test_a_search_is_for_metrics_that_exist(pattern: str) -> None:
    """By the beginning of their names."""
    names = [name for metric in described(wired()) for name in metric.series]

    for part in pattern.split("|"):
        assert [name for name in names if re.match(part.removeprefix("^"), name)] != []
