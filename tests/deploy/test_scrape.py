"""Prometheus in a cluster finds every process of the manifests, and calls it as the alerts do."""

import re
import subprocess
from typing import Any

import pytest
import yaml
from tests.deploy.manifests import ROOT, Container, containers, render
from tests.servers.debian import promtool
from tests.servers.fixtures import or_skip

FOLDER = ROOT / "deploy/observability"


def relabelled(meta: dict[str, str]) -> dict[str, str] | None:
    """Return the labels of a target after relabelling; None if it is dropped."""
    text = (FOLDER / "prometheus-kubernetes.yml").read_text(encoding="utf-8")
    (scrape,) = yaml.safe_load(text)["scrape_configs"]
    labels = {"job": scrape["job_name"]}
    for rule in scrape["relabel_configs"]:
        value = rule.get("separator", ";").join(
            meta.get(name.removeprefix("__meta_kubernetes_"), "") for name in rule["source_labels"]
        )
        match = re.fullmatch(rule.get("regex", "(.*)"), value)
        if rule.get("action") == "keep":
            if match is None:
                return None
        elif match is not None:
            labels[rule["target_label"]] = match.expand(rule.get("replacement", r"\1"))
    return labels


def meta(container: Container, port: dict[str, Any]) -> dict[str, str]:
    """Return the discovery labels of a port, without their common prefix."""
    return {
        **{f"pod_label_{name}": value for name, value in container.labels.items()},
        "namespace": "shop",
        "pod_name": "pod-1",
        "pod_phase": "Running",
        "pod_container_port_name": port["name"],
        "pod_container_port_number": str(port["containerPort"]),
    }


@pytest.mark.parametrize("name", ["production", "canary"])
def test_each_process_is_scraped(name: str) -> None:
    """Each process has one target, with the job of its kind, and a label for the canary."""
    with or_skip():
        found = list(containers(render(name)))
    targets = {}
    for container in found:
        for port in container.spec.get("ports", ()):
            if (labels := relabelled(meta(container, port))) is not None:
                assert container.where not in targets
                targets[container.where] = labels
    commands = {"viralfx-backend": "serve", "viralfx-worker": "worker"}

    assert targets.keys() == {c.where for c in found if c.command != "migrate"}
    for container in found:
        if container.command != "migrate":
            labels = targets[container.where]
            assert commands[labels["job"]] == container.command
            assert labels["namespace"] == "shop"
            assert labels["track"] == container.labels.get("track", "")
            assert re.fullmatch(r"pod-1:300[12]", labels["instance"])


def test_other_pods_are_not_scraped() -> None:
    """Pods of other applications and ended pods are dropped."""
    one = {"pod_label_app": "viralfx-backend", "pod_container_port_name": "management"}

    assert relabelled({**one, "pod_phase": "Running"}) is not None
    assert relabelled({**one, "pod_phase": "Succeeded"}) is None
    assert relabelled({**one, "pod_phase": "Running", "pod_label_app": "redis"}) is None


@pytest.mark.timeout(600)  # the first test may have to fetch it
def test_prometheus_accepts_it() -> None:
    """By its own program."""
    with or_skip():
        program = promtool()
    done = subprocess.run(
        [program, "check", "config", "prometheus-kubernetes.yml"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
