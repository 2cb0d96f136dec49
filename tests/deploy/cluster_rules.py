"""Rules about how the manifests fit together: kinds, names, labels and network policy."""

from collections.abc import Iterator
from typing import Any

from tests.deploy.manifests import Resource, containers, labels_of_pods, of_kind, selected
from tests.deploy.pod_rules import rules_of_a_container, rules_of_places
from tests.deploy.scaling_rules import rules_of_scaling

CONTAINERS = {
    "viralfx-backend": {"backend": "serve", "queue-worker": "worker"},
    "viralfx-worker": {"queue-worker": "worker"},
    "viralfx-migrate": {"migrate": "migrate"},
}
"""By the label ``app``: containers, and what each runs. Commands of docs/runbook.md name them."""

_CORE = {
    "ServiceAccount": ("v1", 1),
    "ConfigMap": ("v1", 1),
    "Service": ("v1", 1),
    "Deployment": ("apps/v1", 1),
    "Job": ("batch/v1", 1),
}
_PRODUCTION = {
    **_CORE,
    "Deployment": ("apps/v1", 2),
    "PodDisruptionBudget": ("policy/v1", 2),
    "HorizontalPodAutoscaler": ("autoscaling/v2", 2),
    "NetworkPolicy": ("networking.k8s.io/v1", 1),
}
KINDS = {
    "base": _CORE,
    "canary": _CORE,
    "production": _PRODUCTION,
    "production-keda": {
        **_PRODUCTION,
        "HorizontalPodAutoscaler": ("autoscaling/v2", 1),
        "ScaledObject": ("keda.sh/v1alpha1", 1),
    },
}
"""The kinds of resources of each overlay, with version and number."""

PRIVATE = {"10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"}


def rules_of_the_cluster(name: str, resources: list[Resource]) -> Iterator[str]:
    """Yield the problems of an overlay, one line each, with the rule's name before it."""
    suffix = "-canary" if name == "canary" else ""
    yield from (f"kinds: {problem}" for problem in _kinds(name, resources))
    yield from (f"labels: {problem}" for problem in _workloads(resources, suffix))
    yield from (f"labels: {problem}" for problem in _services(resources, suffix))
    yield from (f"network: {problem}" for problem in _network(resources))
    yield from (f"references: {problem}" for problem in _references(resources))
    yield from (f"scaling: {problem}" for problem in rules_of_scaling(resources))
    yield from (f"places: {problem}" for problem in rules_of_places(name, resources))
    for container in containers(resources):
        for problem in rules_of_a_container(container, name):
            rule, _, rest = problem.partition(": ")
            yield f"{rule}: {container.where}: {rest}"


def _kinds(name: str, resources: list[Resource]) -> Iterator[str]:
    found: dict[Any, int] = {}
    for resource in resources:
        key = (resource.get("kind"), resource.get("apiVersion"))
        found[key] = found.get(key, 0) + 1
        labels = resource["metadata"].get("labels", {})
        if labels.get("app.kubernetes.io/part-of") != "viralfx":
            yield f"{resource['metadata'].get('name')} is part of nothing"
    wanted = {(kind, version): number for kind, (version, number) in KINDS[name].items()}
    if found != wanted:
        yield f"there are {sorted(map(str, found.items() ^ wanted.items()))}"


def _workloads(resources: list[Resource], suffix: str) -> Iterator[str]:
    for workload in of_kind(resources, "Deployment", "Job"):
        name, labels = workload["metadata"]["name"], labels_of_pods(workload)
        app = labels.get("app", "")
        if name != f"{app}{suffix}" or workload["metadata"].get("labels", {}).get("app") != app:
            yield f"{name} and its pods are called differently"
        found = {
            container["name"]: " ".join(container.get("args", ()))
            for container in workload["spec"]["template"]["spec"]["containers"]
        }
        if found != CONTAINERS.get(app):
            yield f"{name} has {found}, not {CONTAINERS.get(app)}"
        if workload["kind"] == "Job":
            continue
        track = {"track": "canary" if suffix else "stable"} if app == "viralfx-backend" else {}
        if workload["spec"].get("selector") != {"matchLabels": {"app": app, **track}}:
            yield f"{name} selects other pods than those of {app} {track}"
        if not selected(workload["spec"]["selector"], labels):
            yield f"{name} does not select its own pods"


def _services(resources: list[Resource], suffix: str) -> Iterator[str]:
    for service in of_kind(resources, "Service"):
        name, spec = service["metadata"]["name"], service["spec"]
        # By app alone, so that a canary's pods have their share.
        wanted = {"app": "viralfx-backend"} | ({"track": "canary"} if suffix else {})
        if name != f"viralfx-backend{suffix}" or spec.get("selector") != wanted:
            yield f"{name} selects {spec.get('selector')}, not {wanted}"
        if service["metadata"]["labels"].get("app") != "viralfx-backend":
            yield f"{name} has another label"
        backends = [c for c in containers(resources) if c.command == "serve"]
        ((port, aim),) = ((port, port.get("targetPort")) for port in spec["ports"])
        if not isinstance(aim, str) or aim != port.get("name") or port.get("appProtocol") != aim:
            yield f"the Service's port is called {port.get('name')}, and leads to {aim}"
        if [c.port(aim) for c in backends] != [port["port"]]:
            yield f"port {port['port']} of the Service leads to another one"


def _network(resources: list[Resource]) -> Iterator[str]:
    """Check that sources and destinations are named, and that no webhook goes inside."""
    for policy in of_kind(resources, "NetworkPolicy"):
        spec = policy["spec"]
        if policy["metadata"].get("name") != "viralfx":
            yield "it has another name"
        for workload in of_kind(resources, "Deployment", "Job"):
            if not selected(spec.get("podSelector", {}), labels_of_pods(workload)):
                yield f"it is not for {workload['metadata']['name']}"
        if spec.get("policyTypes") != ["Ingress", "Egress"]:
            yield f"it is for {spec.get('policyTypes')} alone"
        asked = [
            ([_peer(peer) for peer in rule["from"]], [port["port"] for port in rule["ports"]])
            for rule in spec["ingress"]
        ]
        if asked != [
            (["pods viralfx/reaches-api=true", "viralfx/reaches-api=true"], ["http"]),
            (["viralfx/reaches-metrics=true"], ["http", "http-management", "management"]),
        ]:
            yield f"it lets in {asked}"
        *named, webhooks = spec["egress"]
        reached = [
            ([_peer(peer) for peer in rule.get("to", ())], [port["port"] for port in rule["ports"]])
            for rule in named
        ]
        if reached != [
            (["kubernetes.io/metadata.name=kube-system, pods k8s-app=kube-dns"], [53, 53]),
            (["pods viralfx/holds-data=true", "viralfx/holds-data=true"], [5432, 6379, 26379]),
            (["pods viralfx/collects-traces=true", "viralfx/collects-traces=true"], [4317, 4318]),
        ]:
            yield f"it lets out {reached}"
        blocks = [peer["ipBlock"] for peer in webhooks["to"]]
        if [(one["cidr"], {*one["except"]}) for one in blocks] != [("0.0.0.0/0", PRIVATE)]:
            yield "webhooks may go inside"


def _peer(peer: dict[str, Any]) -> str:
    kinds = {"namespaceSelector": "", "podSelector": "pods "}
    if not peer or not peer.keys() <= kinds.keys():
        return str(peer)
    found = []
    for kind in kinds.keys() & peer.keys():
        labels = peer[kind].get("matchLabels", {})
        if peer[kind].keys() != {"matchLabels"} or len(labels) != 1:
            return str(peer)
        ((label, value),) = labels.items()
        found.append(f"{kinds[kind]}{label}={value}")
    return ", ".join(sorted(found))


def _references(resources: list[Resource]) -> Iterator[str]:
    names = {(r["kind"], r["metadata"].get("name")) for r in resources}
    if len(names) != len(resources):
        yield "two resources have one name"
    for account in of_kind(resources, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{account['metadata']['name']} is given a token"
    for container in containers(resources):
        if ("ServiceAccount", container.pod.get("serviceAccountName")) not in names:
            yield f"{container.where} has no account of its own"
        sources = [s.get("configMapRef", {}).get("name") for s in container.spec.get("envFrom", ())]
        if len(sources) != 1 or ("ConfigMap", sources[0]) not in names:
            yield f"{container.where} is configured by {sources}"
