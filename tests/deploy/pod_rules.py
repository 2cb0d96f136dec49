"""Rules about pods: security, files, memory, image and placement."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache

from tests.deploy.manifests import ROOT, Container, Resource, labels_of_pods, of_kind, selected

from viralfx.settings.platform import MIN_MEMORY_MIB

COMFORTABLE_MIB = 4 * MIN_MEMORY_MIB
"""Twice the MiB that an idle process needs with a margin."""
_MIB = {"Mi": 1, "Gi": 1024}


def rules_of_a_container(container: Container, overlay: str) -> Iterator[str]:
    """Yield the problems of one container and its pod, with the rule's name before it."""
    yield from (f"security: {problem}" for problem in _security(container))
    yield from (f"files: {problem}" for problem in _files(container))
    yield from (f"memory: {problem}" for problem in _memory(container))
    image = container.spec.get("image")
    wanted = "viralfx-backend" if overlay == "base" else f"viralfx-backend:{_version()}"
    if image != wanted:
        yield f"image: it runs {image}, not {wanted}"


def _security(container: Container) -> Iterator[str]:
    """Pod Security's level "restricted", and less."""
    pod, spec = container.pod, container.spec
    around, own = pod.get("securityContext", {}), spec.get("securityContext", {})
    contained = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    rules = {
        # The image's own user is a number other than 0.
        "may run as root": around
        == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "may do too much": own == contained,
        "is on the host": not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(),
        "is given a token": pod.get("automountServiceAccountToken") is False,
        "is given names of services": pod.get("enableServiceLinks") is False,
        "does not say why it ended": spec.get("terminationMessagePolicy")
        == "FallbackToLogsOnError",
    }
    yield from (wrong for wrong, right in rules.items() if not right)


def _files(container: Container) -> Iterator[str]:
    """Require a /tmp of its own with a size limit, and no other writable folder."""
    pod = container.pod
    volumes = {v["name"]: v["emptyDir"].get("sizeLimit") for v in pod.get("volumes", ())}
    mounts = {m["mountPath"]: m["name"] for m in container.spec.get("volumeMounts", ())}
    if mounts.keys() != {"/tmp"}:  # noqa: S108 - what is mounted there is the pod's alone
        yield f"has {sorted(mounts)} to write to"
    if not all(re.fullmatch(r"\d+Mi", str(volumes.get(name))) for name in mounts.values()):
        yield "has a /tmp without a limit"
    shared = [m["name"] for c in container.neighbours for m in c.spec.get("volumeMounts", ())]
    if sorted(shared) != sorted(volumes):
        yield "shares its /tmp"


def _memory(container: Container) -> Iterator[str]:
    given = container.spec.get("resources", {})
    limit, request = (given.get(kind, {}).get("memory", "0Mi") for kind in ("limits", "requests"))
    if _mebibytes(limit) < COMFORTABLE_MIB:
        yield f"a limit of {limit} is less than {COMFORTABLE_MIB} MiB"
    if not 0 < _mebibytes(request) <= _mebibytes(limit):
        yield f"a request of {request} and a limit of {limit}"


def _mebibytes(text: str) -> int:
    number, unit = text[:-2], text[-2:]
    return int(number) * _MIB[unit] if number.isdecimal() and unit in _MIB else 0


@cache
def _version() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def rules_of_places(overlay: str, resources: list[Resource]) -> Iterator[str]:
    """Overlays spread the pods of a Deployment over nodes, as a preference."""
    for deployment in of_kind(resources, "Deployment"):
        app = labels_of_pods(deployment)["app"]
        keys = ["kubernetes.io/hostname"]
        keys += ["topology.kubernetes.io/zone"] if app == "viralfx-backend" else []
        spreads = deployment["spec"]["template"]["spec"].get("topologySpreadConstraints", [])
        if overlay != "base" and [s.get("topologyKey") for s in spreads] != keys:
            yield f"{app} is not spread over {keys}"
        for spread in spreads:
            if not selected(spread.get("labelSelector", {}), labels_of_pods(deployment)):
                yield f"{app} is spread without its own pods"
            if (spread.get("maxSkew"), spread.get("whenUnsatisfiable")) != (1, "ScheduleAnyway"):
                yield f"{app} may find no place"
    for job in of_kind(resources, "Job"):
        spec = job["spec"]
        limits = [spec.get("backoffLimit"), spec.get("activeDeadlineSeconds")]
        # Each attempt waits up to a minute for another migration.
        if spec["template"]["spec"].get("restartPolicy") != "Never" or limits != [3, 600]:
            yield "the migration hides its failure, or has no time limit"
        if not 0 < spec.get("ttlSecondsAfterFinished", 0) <= 600:
            yield "the finished migration blocks the next one"
