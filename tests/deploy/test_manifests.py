"""The manifests agree with the code, with each other, and with the documents."""

import re
from collections.abc import Iterator

import pytest
import yaml
from tests.deploy.agreement import complaints
from tests.deploy.cluster_rules import CONTAINERS
from tests.deploy.manifests import (
    FOLDER,
    RENDERED,
    ROOT,
    Resource,
    containers,
    labels_of_pods,
    of_kind,
    render,
    selected,
)
from tests.deploy.program_rules import settings_of
from tests.servers.fixtures import or_skip

DOCUMENTS = ["README.md", "docs/runbook.md", "docs/deployment.md"]
KINDS = "deployment|job|service|configmap|horizontalpodautoscaler"
DEPLOYMENT = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")


def resources(name: str) -> list[Resource]:
    """Return the resources of an overlay, or skip."""
    with or_skip():  # where there is neither kustomize nor Debian
        return render(name)


@pytest.mark.parametrize("name", RENDERED)
def test_an_overlay_agrees_with_everything(name: str) -> None:
    """Every rule holds; test_manifests_notice.py shows that the rules bite."""
    assert complaints(name, resources(name)) == []


def test_a_canary_has_its_share_and_is_apart() -> None:
    """The stable Service sends it requests; nothing else of production takes its pods."""
    (canary,) = of_kind(resources("canary"), "Deployment")
    labels = labels_of_pods(canary)
    production = resources("production")
    (service,) = of_kind(production, "Service")
    (policy,) = of_kind(production, "NetworkPolicy")

    assert selected(service["spec"]["selector"], labels)
    assert selected(policy["spec"]["podSelector"], labels)
    for other in of_kind(production, "Deployment", "PodDisruptionBudget"):
        assert not selected(other["spec"]["selector"], labels)
    names = [
        {(r["kind"], r["metadata"]["name"]) for r in rs} for rs in (resources("canary"), production)
    ]
    assert names[0] & names[1] == set()


def test_a_worker_is_the_same_wherever_it_runs() -> None:
    """Beside a backend or by itself, except its share of the machine and its readiness probe."""
    workers = [c for c in containers(resources("production")) if c.command == "worker"]
    own = {"resources", "readinessProbe"}
    same = [{k: v for k, v in c.spec.items() if k not in own} for c in workers]

    assert len(same) == 2
    assert same[0] == same[1]


def test_there_is_no_secret_in_any_file() -> None:
    """Neither one that is made, nor one that is generated."""
    files = [path for path in FOLDER.rglob("*") if path.is_file()]

    assert len(files) > 12
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"kind: Secret\b|secretGenerator|stringData|password=|://\S+:\S+@", text
        )


def commands() -> Iterator[str]:
    """Yield the kubectl commands of the documents."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        yield from re.findall(r"^ *kubectl .+$", text, re.MULTILINE)


def test_commands_of_the_documents_name_existing_resources() -> None:
    """Deployments, jobs, containers, labels and folders."""
    found = [*resources("production"), *resources("canary")]
    named = {f"{r['kind'].lower()}/{r['metadata']['name']}" for r in found}
    lines = list(commands())
    assert len(lines) >= 20
    for line in lines:
        for name in re.findall(rf"\b(?:{KINDS})/[\w-]+", line):
            assert name in named, line
        for container in re.findall(r" -c ([\w-]+)", line):
            assert container in CONTAINERS["viralfx-backend"], line
        for label, value in re.findall(r" -l ([\w.-]+)=([\w-]+)", line):
            assert any(
                selected({label: value}, labels_of_pods(w)) for w in of_kind(found, "Deployment")
            ), line
        for folder in re.findall(r" -k (\S+)", line):
            assert (ROOT / folder / "kustomization.yaml").exists(), line


def test_the_image_is_the_one_that_the_manifests_run() -> None:
    """It exposes the ports that are declared, and its user is a number that is not root's."""
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    last = image[image.rindex("\nFROM ") :]
    declared = {
        p["containerPort"] for c in containers(resources("base")) for p in c.spec.get("ports", ())
    }

    assert {int(p) for p in re.findall(r"^EXPOSE (.+)$", last, re.MULTILINE)[0].split()} == declared
    assert re.search(r"^USER [1-9]\d*", last, re.MULTILINE)
    assert 'ENTRYPOINT ["tini", "-e", "143", "-e", "129", "--", "viralfx"]' in last
    assert "docker build --tag viralfx-backend ." in image


def test_the_document_says_how_many_connections_there_may_be() -> None:
    """The number is for all pods at their maximum, during a roll-out of each Deployment."""
    production, canary = resources("production"), resources("canary")
    highest = {
        scaler["spec"]["scaleTargetRef"]["name"]: scaler["spec"]["maxReplicas"]
        for scaler in of_kind(production, "HorizontalPodAutoscaler")
    }
    total = 0
    for found in (production, canary):
        for container in containers(found):
            settings, _ = settings_of(container, found)
            assert settings is not None
            if container.workload["kind"] == "Deployment":
                spec = container.workload["spec"]
                pods = highest.get(container.workload["metadata"]["name"], spec.get("replicas"))
                surge = spec["strategy"]["rollingUpdate"]["maxSurge"]
                # Two for health and for heartbeats, beside the pool
                total += (pods + surge) * (settings.db.pool_max + 2)

    assert f"has at most {total} connections open" in " ".join(DEPLOYMENT.split())


def test_the_document_lists_the_secrets() -> None:
    """Each referenced key with the commands that get it, and no other."""
    given: dict[str, set[str]] = {}
    for container in containers(resources("base")):
        for variable in container.spec["env"]:
            if "valueFrom" not in variable:
                continue
            role = {"serve": "backend", "worker": "worker", "migrate": "migration"}
            given.setdefault(variable["name"], set()).add(role[container.command])
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([a-z, ]+?)(?:;.*)? \|$", DEPLOYMENT, re.MULTILINE)

    assert {name: set(who.split(", ")) for name, who in rows} == given


def test_the_proxy_notices_within_the_readiness_delay() -> None:
    """The worst case is an interval, fast intervals for further checks, and all checks."""
    text = (ROOT / "deploy/haproxy.cfg").read_text(encoding="utf-8")
    seconds = {
        name: float(number) / (1000 if unit == "ms" else 1)
        for name, number, unit in re.findall(r"\b(inter|fastinter|check) (\d+)(ms|s)\b", text)
    }
    checks = int(re.findall(r" fall (\d+)", text)[0])
    worst = seconds["inter"] + (checks - 1) * seconds["fastinter"] + checks * seconds["check"]
    (config,) = of_kind(resources("production"), "ConfigMap")

    assert f"{worst:g} s until the" in text
    assert worst + 1 < int(config["data"]["SHUTDOWN_READINESS_DELAY"]) / 1000
    assert "uri /health/ready " in text


def test_envoy_notices_within_the_readiness_delay() -> None:
    """One answer of 503 is enough, so the worst case is an interval and a check."""
    text = (ROOT / "deploy/envoy.yaml").read_text(encoding="utf-8")
    (cluster,) = yaml.safe_load(text)["static_resources"]["clusters"]
    (check,) = cluster["health_checks"]
    interval, quiet, timeout = (
        float(check[name].removesuffix("s"))
        for name in ("interval", "no_traffic_interval", "timeout")
    )
    worst = max(interval, quiet) + timeout
    (config,) = of_kind(resources("production"), "ConfigMap")

    assert f"{worst:g} s until the" in text
    assert worst + 1 < int(config["data"]["SHUTDOWN_READINESS_DELAY"]) / 1000
    assert check["http_health_check"]["path"] == "/health/ready"
