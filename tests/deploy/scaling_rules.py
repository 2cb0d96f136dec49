"""Rules about the number of pods: replicas, autoscalers, roll-outs and disruption budgets."""

from collections.abc import Iterator
from typing import Any

from tests.deploy.keda import rules_of_keda
from tests.deploy.manifests import Resource, labels_of_pods, of_kind, selected

LIMITS = {
    ("viralfx-backend", "HorizontalPodAutoscaler"): (3, 6),
    ("viralfx-worker", "HorizontalPodAutoscaler"): (2, 8),
    ("viralfx-worker", "ScaledObject"): (1, 8),
}
"""Minimum and maximum of pods; docs/deployment.md derives the connections to Postgres from them."""
REPLICAS = {"viralfx-backend": 2, "viralfx-backend-canary": 1}
"""Replicas of Deployments without an autoscaler."""
_BUSY = {"type": "Utilization", "averageUtilization": 70}


def rules_of_scaling(resources: list[Resource]) -> Iterator[str]:
    """Each Deployment has either a number of replicas or exactly one autoscaler."""
    scalers: dict[str, list[Resource]] = {}
    for scaler in of_kind(resources, "HorizontalPodAutoscaler", "ScaledObject"):
        name = scaler["spec"]["scaleTargetRef"]["name"]
        scalers.setdefault(name, []).append(scaler)
        if scaler["metadata"].get("name") != name:
            yield f"the scaler of {name} is called {scaler['metadata'].get('name')}"
    for deployment in of_kind(resources, "Deployment"):
        name, spec = deployment["metadata"]["name"], deployment["spec"]
        rolling = spec.get("strategy", {}).get("rollingUpdate", {})
        if (rolling.get("maxSurge"), rolling.get("maxUnavailable")) != (1, 0):
            yield f"{name} is replaced by another way than one more, and then one less"
        mine = scalers.pop(name, [])
        if len(mine) + ("replicas" in spec) != 1:
            yield f"{name} is scaled by {len(mine)}, and has {spec.get('replicas')} replicas"
        elif not mine and spec["replicas"] != REPLICAS.get(name):
            yield f"{name} has {spec['replicas']} replicas"
        for scaler in mine:
            yield from (f"{name}: {problem}" for problem in _scaler(scaler, deployment))
    yield from (f"{name} is scaled and does not exist" for name in scalers)
    yield from _disruption(resources)


def _scaler(scaler: Resource, deployment: Resource) -> Iterator[str]:
    spec = scaler["spec"]
    if scaler["kind"] == "ScaledObject":
        yield from rules_of_keda(spec)
        low, high = spec["minReplicaCount"], spec["maxReplicaCount"]
        behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    else:
        yield from _metrics(spec, deployment)
        low, high = spec["minReplicas"], spec["maxReplicas"]
        behaviour = spec["behavior"]
    if (low, high) != LIMITS[deployment["metadata"]["name"], scaler["kind"]]:
        yield f"from {low} to {high} pods"
    down = behaviour["scaleDown"]
    if down.get("stabilizationWindowSeconds", 300) < 300:
        yield "it follows each lull"
    if not down.get("policies"):
        yield "all of them may go at a time"
    grace = deployment["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    for policy in down.get("policies", ()):
        if (policy.get("type"), policy.get("value")) != ("Pods", 1):
            yield "more than one goes at a time"
        if policy["periodSeconds"] <= grace:
            yield "the next one goes before the last one has gone"


def _metrics(spec: dict[str, Any], deployment: Resource) -> Iterator[str]:
    target = spec["scaleTargetRef"]
    if (target.get("apiVersion"), target.get("kind")) != ("apps/v1", "Deployment"):
        yield f"it scales a {target.get('kind')}"
    found = {c["name"]: c for c in deployment["spec"]["template"]["spec"]["containers"]}
    main = next(iter(found))
    wanted = {"name": "cpu", "container": main, "target": _BUSY}
    if spec["metrics"] != [{"type": "ContainerResource", "containerResource": wanted}]:
        yield f"it measures {spec['metrics']}, not at the CPU of {main}"
    # Utilization is a share of the request.
    if "cpu" not in found[main].get("resources", {}).get("requests", {}):
        yield f"{main} requests no CPU"


def _disruption(resources: list[Resource]) -> Iterator[str]:
    """Check that scaled Deployments lose one pod at a time, and pods not ready may be evicted."""
    scaled = [
        s["spec"]["scaleTargetRef"]["name"]
        for s in resources
        if "scaleTargetRef" in s.get("spec", {})
    ]
    workloads = of_kind(resources, "Deployment", "Job")
    kept = []
    for budget in of_kind(resources, "PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        kept.append(name)
        taken = [w for w in workloads if selected(spec.get("selector", {}), labels_of_pods(w))]
        if [w["metadata"]["name"] for w in taken] != [name]:
            yield f"budget {name} is for others"
        elif spec["selector"] != taken[0]["spec"]["selector"]:
            # Pods of a canary are beside it, and must not count.
            yield f"budget {name} is for more than {name}"
        if spec.get("maxUnavailable") != 1:
            yield f"budget {name} takes more than one away"
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"budget {name} keeps pods that are not ready"
    if sorted(kept) != sorted(scaled):
        yield f"there are budgets for {kept}, and scaled are {scaled}"
