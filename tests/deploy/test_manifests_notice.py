"""A change on one side alone is noticed: of any value of the manifests, or of the code.

First every single value and part of the rendered manifests is changed and left out, one at a time.
Changes that no rule notices are a matter of choice, and are listed here. Then the code is changed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from tests.deploy import program_rules
from tests.deploy.agreement import complaints
from tests.deploy.manifests import OVERLAYS, ROOT, Resource, render
from tests.servers.fixtures import or_skip
from tests.soak import SOAK

FREE = {
    "ConfigMap data/REDIS_HOST changed": "another place",
    "Deployment spec/revisionHistoryLimit *": "how far one may go back",
    "Deployment spec/progressDeadlineSeconds changed": "a second more or less",
    "Deployment */startupProbe/failureThreshold changed": "one more attempt",
    "* */resources/*/cpu *": "the cost of a pod; the CPU request of autoscaled pods is required",
    "* */resources/*/ephemeral-storage *": "as above",
    "* */scaleDown/stabilizationWindowSeconds *": "300 s are Kubernetes's default, too",
    "* */scaleDown/policies/0/periodSeconds changed": "a second more or less",
    "Job spec/ttlSecondsAfterFinished changed": "a second more or less",
    "ScaledObject spec/fallback/* changed": "within the limits",
    "ScaledObject spec/pollingInterval *": "a second more or less, or KEDA's default",
    "NetworkPolicy spec/egress/0/ports/1/protocol gone": "TCP is Kubernetes's default, too",
    "* metadata/labels/track *": "of a canary's resources other than pods: for people",
    "Job spec/template/metadata/labels/track *": "as above",
    "Deployment */topologySpreadConstraints/?/labelSelector/* gone": "one label of two will do",
}
"""Changes that no rule notices, and why."""


def resources(name: str) -> list[Resource]:
    """Return the resources of an overlay, or skip."""
    with or_skip():  # where there is neither kustomize nor Debian
        return render(name)


Steps = tuple[str | int, ...]


def sites(node: Any, path: Steps = ()) -> Iterator[tuple[Steps, str]]:
    """Yield every place of a document, with the kind of its change."""
    if isinstance(node, dict | list):
        for step, part in node.items() if isinstance(node, dict) else enumerate(node):
            yield (*path, step), "gone"
            yield from sites(part, (*path, step))
    else:
        yield path, "changed"


def change(document: Any, path: Steps, how: str) -> None:
    """Remove a value, or replace it by the next number, the opposite, or another text."""
    *way, last = path
    for step in way:
        document = document[step]
    value = document[last]
    if how == "gone":
        del document[last]
    elif isinstance(value, bool):
        document[last] = not value
    elif isinstance(value, int):
        document[last] = value + 1
    else:
        document[last] = str(int(value) + 1) if value.isdecimal() else f"{value}x"


def unnoticed(name: str) -> Iterator[str]:
    """Yield each change of an overlay that no rule complains about."""
    original = resources(name)
    text = json.dumps(original)
    same = resources("production") if name == "production-keda" else []
    for path, how in sites(original):
        if original[int(path[0])] in same:
            continue  # it is changed there
        changed = json.loads(text)
        change(changed, path, how)
        if not complaints(name, changed):
            kind, inside = original[int(path[0])]["kind"], "/".join(map(str, path[1:]))
            yield f"{kind} {inside} {how}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_change_of_a_manifest_is_noticed(name: str) -> None:
    """Each value and part, one at a time, except for matters of choice."""
    missed = set(unnoticed(name))

    assert [one for one in sorted(missed) if not any(fnmatchcase(one, free) for free in FREE)] == []
    assert missed


def test_many_places_are_tried() -> None:
    """The test above changes hundreds of places, the important ones included."""
    found = ["/".join(map(str, path)) for path, _ in sites(resources("production"))]

    assert len(found) > 900
    for word in (
        "containerPort",
        "env/",
        "httpGet/path",
        "terminationGracePeriodSeconds",
        "labels",
    ):
        assert any(word in one for one in found), word


DEPLOYMENT: Steps = ("Deployment", "viralfx-backend")
SERVICE: Steps = ("Service", "viralfx-backend")
POD = (*DEPLOYMENT, "spec", "template", "spec")
BACKEND = (*POD, "containers", 0)
WORKER = (*POD, "containers", 1)
MANIFEST_SIDE = {
    "port": ((*BACKEND, "ports", 0, "containerPort"), 3003, "ports"),
    "liveness at the API port": ((*BACKEND, "livenessProbe", "httpGet", "port"), "http", "probes"),
    "readiness at the management port": (
        (*BACKEND, "readinessProbe", "httpGet", "port"),
        "http-management",
        "probes",
    ),
    "the worker's port is the API's": ((*WORKER, "ports", 0, "containerPort"), 3000, "ports"),
    "port of the Service": (
        ("Service", "viralfx-backend", "spec", "ports", 0, "port"),
        80,
        "labels",
    ),
    "path": ((*BACKEND, "readinessProbe", "httpGet", "path"), "/health", "probes"),
    "variable": ((*BACKEND, "env", 0, "name"), "DATABASE_URI", "variables"),
    "typo of a setting": (("ConfigMap", "data", "SHUTDOWN_DRAIN_TIMOUT"), "30000", "variables"),
    "secret in the open": (("ConfigMap", "data", "API_TOKEN"), "hunter2", "variables"),
    "budget": (("ConfigMap", "data", "SHUTDOWN_DRAIN_TIMEOUT"), "25000", "budgets"),
    "budgets over the forced end": (
        ("ConfigMap", "data", "SHUTDOWN_READINESS_DELAY"),
        "15000",
        "variables",
    ),
    "60 s of grace": ((*POD, "terminationGracePeriodSeconds"), 60, "budgets"),
    "a grace period in the settings alone": (
        ("ConfigMap", "data", "SHUTDOWN_GRACE_PERIOD"),
        "90000",
        "budgets",
    ),
    "label": ((*DEPLOYMENT, "spec", "template", "metadata", "labels", "app"), "viralfx", "labels"),
    "probe's number": ((*BACKEND, "livenessProbe", "periodSeconds"), 10, "probes"),
    "a start that is killed": ((*BACKEND, "startupProbe", "failureThreshold"), 30, "probes"),
    "a hook": ((*BACKEND, "lifecycle"), {"preStop": {"sleep": {"seconds": 5}}}, "budgets"),
    "root": ((*POD, "securityContext", "runAsNonRoot"), False, "security"),
    "memory below need": ((*WORKER, "resources", "limits", "memory"), "128Mi", "memory"),
    "another command": ((*WORKER, "args", 0), "work", "command"),
    "no init": ((*WORKER, "command"), ["viralfx", "worker"], "init"),
    "an init of its own": ((*BACKEND, "command"), ["tini", "--", "viralfx", "serve"], "init"),
    "another release": ((*BACKEND, "image"), "viralfx-backend:latest", "image"),
}
"""Likely mistakes, and the rule that reports each."""


@pytest.mark.parametrize("mistake", MANIFEST_SIDE)
def test_a_mistake_in_a_manifest_is_reported_by_its_rule(mistake: str) -> None:
    """The complaint names the rule of the mistake."""
    (kind, *path), value, rule = MANIFEST_SIDE[mistake]
    changed = resources("production")
    part: Any = next(r for r in changed if r["kind"] == kind)
    if kind != "ConfigMap":
        assert path.pop(0) == part["metadata"]["name"]
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value

    assert rule in {complaint.partition(":")[0] for complaint in complaints("production", changed)}


def default(field: str, value: float) -> str:
    """Return a pattern for the default of a setting; all before the value is its first group."""
    return rf"(    {field}: (?:(?!\n    \w).|\n)*?\] = ){value}\b"


MODEL, BACKENDS, RESPONSES = "settings/model.py", "settings/groups.py", "web/endpoints.py"
CODE_SIDE = {
    "port": (MODEL, default("port", 3000), r"\g<1>8000", "ports"),
    "worker's port": (MODEL, "MANAGEMENT_PORT = 3001", "MANAGEMENT_PORT = 3002", "ports"),
    "variable": (MODEL, "shutdown_grace_period", "shutdown_granted_period", "variables"),
    "secret's variable": (BACKENDS, "    password: Annotated", "    word: Annotated", "variables"),
    "budget": (MODEL, default("shutdown_drain_timeout", 30.0), r"\g<1>20.0", "budgets"),
    "forced end": (MODEL, default("shutdown_force_timeout", 60.0), r"\g<1>75.0", "variables"),
    "path of readiness": (RESPONSES, r'\{prefix\}/ready"', '{prefix}/readiness"', "probes"),
    "path of metrics": (RESPONSES, r'"/metrics",\n', '"/prometheus",\n', "ports"),
    "command": ("cli/__init__.py", r'add_parser\(\s*"worker"', 'add_parser("work"', "command"),
    "longest start": (BACKENDS, default("max_reconnect_attempts", 5), r"\g<1>6", "probes"),
    "Redis's port": (BACKENDS, "6379", "6380", "network"),
    "jobs at once": (BACKENDS, default("concurrency", 10), r"\g<1>20", "scaling"),
}
"""A file of the code, a pattern in it, its replacement, and the rule that reports the change."""
USUAL_CHANGES = (
    ("worker's port",),
    ("variable",),
    ("budget", "path of readiness", "jobs at once"),
)
"""One of each file, and of each kind of setting: the rules themselves are tested above.

Changes that stand together are reported by one rule each, and by different ones.
"""


@pytest.mark.soak
@pytest.mark.parametrize(
    "changes", [(change,) for change in CODE_SIDE] if SOAK else USUAL_CHANGES, ids=", ".join
)
def test_a_change_of_the_code_alone_is_noticed(changes: tuple[str, ...], tmp_path: Path) -> None:
    """The manifests as they are, and a copy of the code with another default or name."""
    package = tmp_path / "viralfx"
    # The copy includes byte code, so that only changed files are compiled again.
    shutil.copytree(ROOT / "src/viralfx", package)
    for file, before, after, _ in map(CODE_SIDE.__getitem__, changes):
        text, count = re.subn(before, after, (package / file).read_text(encoding="utf-8"))
        assert count
        (package / file).write_text(text, encoding="utf-8")

    found = complaints_of_the_copy(tmp_path, resources("production-keda"))

    rules = {CODE_SIDE[change][-1] for change in changes}
    assert rules <= {complaint.partition(":")[0] for complaint in found}


def test_an_unchanged_copy_of_the_code_agrees(tmp_path: Path) -> None:
    """The complaints above come from the changes."""
    shutil.copytree(ROOT / "src/viralfx", tmp_path / "viralfx")

    assert complaints_of_the_copy(tmp_path, resources("production-keda")) == []


def complaints_of_the_copy(folder: Path, overlay: list[Resource]) -> list[str]:
    """Return the complaints of the rules, run with the code of a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.agreement"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        input=json.dumps({"production-keda": overlay}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed: list[str] = json.loads(done.stdout)["production-keda"]
    return printed


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("deploy/observability/prometheus.yml", "backend:3000", "backend:9090"),
        ("deploy/observability/prometheus.yml", "port: 3001", "port: 9090"),
        ("docs/runbook.md", "a worker at 3001", "a worker at 3002"),
    ],
)
def test_a_change_of_a_document_alone_is_noticed(
    file: str, before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus and the commands of the runbook use the same ports."""
    found = resources("production")
    for name in ("deploy/observability", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after), encoding="utf-8")
    monkeypatch.setattr(program_rules, "ROOT", tmp_path)
    caches = (program_rules._scraped, program_rules._runbook)
    for cached in caches:
        cached.cache_clear()
    try:
        assert {c.partition(":")[0] for c in complaints("production", found)} == {"ports"}
    finally:
        for cached in caches:
            cached.cache_clear()
