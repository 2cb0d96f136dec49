"""The resources that kustomize renders from deploy/kustomize."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tests.servers.debian import kustomize

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kustomize"
OVERLAYS = sorted(path.parent.name for path in FOLDER.glob("overlays/*/kustomization.yaml"))
RENDERED = ("base", *OVERLAYS)
"""The base and the overlays."""

Resource = dict[str, Any]


def render(name: str) -> list[Resource]:
    """Return the resources of an overlay, or of the base; the caller may change them.

    Raises ``UnavailableError`` without kubectl and kustomize.
    """
    resources: list[Resource] = json.loads(_rendered(name))
    return resources


@cache
def _rendered(name: str) -> str:
    folder = FOLDER / (name if name == "base" else f"overlays/{name}")
    kubectl = shutil.which("kubectl")  # it has kustomize built in
    command = [kustomize(), "build"] if kubectl is None else [kubectl, "kustomize"]
    made = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    # Its deprecation warnings count as errors.
    assert (made.returncode, made.stderr) == (0, ""), made.stderr
    return json.dumps(list(yaml.safe_load_all(made.stdout)))


@dataclass(frozen=True)
class Container:
    """One container, with the pod that it is in."""

    workload: Resource
    pod: Resource
    spec: Resource

    @property
    def command(self) -> str:
        """The program's command that it runs: the arguments of the image's entry point."""
        return " ".join(self.spec.get("args", ()))

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels of its pod."""
        return labels_of_pods(self.workload)

    @property
    def neighbours(self) -> list["Container"]:
        """All containers of its pod, including this one."""
        return [Container(self.workload, self.pod, spec) for spec in self.pod["containers"]]

    @property
    def where(self) -> str:
        """The kind and name of its workload, and its own name."""
        return f"{self.workload['kind']}/{self.workload['metadata']['name']} {self.spec['name']}"

    def port(self, reference: str | int) -> int | None:
        """Return the number of a port that is referred to by name or number; None for none."""
        ports = {port["name"]: port["containerPort"] for port in self.spec.get("ports", ())}
        return ports.get(reference) if isinstance(reference, str) else reference

    def variables(self, resources: list[Resource]) -> dict[str, str]:
        """Return its environment; a secret has the name of its key as value."""
        found: dict[str, str] = {}
        maps = {r["metadata"]["name"]: r["data"] for r in of_kind(resources, "ConfigMap")}
        for source in self.spec.get("envFrom", ()):
            found |= maps.get(source.get("configMapRef", {}).get("name"), {})
        for variable in self.spec.get("env", ()):
            secret = variable.get("valueFrom", {}).get("secretKeyRef", {})
            found[variable["name"]] = variable.get("value", secret.get("key", ""))
        return found


def of_kind(resources: list[Resource], *kinds: str) -> list[Resource]:
    """Return the resources of some kinds."""
    return [resource for resource in resources if resource["kind"] in kinds]


def containers(resources: list[Resource]) -> Iterator[Container]:
    """Yield each container of each workload."""
    for workload in of_kind(resources, "Deployment", "Job"):
        pod = workload["spec"]["template"]["spec"]
        yield from (Container(workload, pod, spec) for spec in pod["containers"])


def labels_of_pods(workload: Resource) -> Mapping[str, str]:
    """Return the labels that a workload's pods have."""
    labels: Mapping[str, str] = workload["spec"]["template"]["metadata"].get("labels", {})
    return labels


def selected(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a selector of either form matches these labels.

    An empty selector matches nothing here. In Kubernetes it matches everything, which is a mistake.
    """
    wanted, expressions = selector, []
    if "matchExpressions" in selector or "matchLabels" in selector:
        wanted = selector.get("matchLabels", {})
        expressions = selector.get("matchExpressions", [])
    return (
        bool(wanted or expressions)
        and all(labels.get(name) == value for name, value in wanted.items())
        and all(
            one.get("operator") == "In" and labels.get(one.get("key")) in one.get("values", ())
            for one in expressions
        )
    )
