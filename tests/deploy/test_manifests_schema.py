"""The rendered manifests against the schemas of Kubernetes, strictly, and KEDA's against ours."""

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions
from tests.deploy.keda import SCALED_OBJECT, rules_of_keda
from tests.deploy.manifests import OVERLAYS, RENDERED, Resource, of_kind, render
from tests.servers.fixtures import or_skip

NEWEST = list(dict.fromkeys(all_versions()))[-3:]
FOREIGN = {"ScaledObject"}
"""Kinds that Kubernetes itself does not know."""


def resources(name: str) -> list[Resource]:
    """Return what an overlay consists of, or skip."""
    with or_skip():  # where there is neither kustomize nor Debian
        return render(name)


def scaled_objects() -> Iterator[Resource]:
    """Yield KEDA's resources of all overlays."""
    for name in OVERLAYS:
        yield from of_kind(resources(name), "ScaledObject")


def test_there_are_overlays() -> None:
    """The rules look at something."""
    assert OVERLAYS == ["canary", "production", "production-keda"]
    assert len(NEWEST) == 3


@pytest.mark.parametrize("version", NEWEST)
@pytest.mark.parametrize("name", RENDERED)
def test_the_schema_is_kept(name: str, version: str) -> None:
    """For the three newest versions of Kubernetes there are: no field that it does not know."""
    native = [one for one in resources(name) if one["kind"] not in FOREIGN]

    assert len(native) > 4
    for resource in native:
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("version", NEWEST)
def test_a_field_that_does_not_exist_is_refused(version: str) -> None:
    """The rule above is strict."""
    (service,) = of_kind(resources("base"), "Service")
    service["spec"]["sessionStickiness"] = "None"

    with pytest.raises(kubernetes_validate.ValidationError, match="sessionStickiness"):
        kubernetes_validate.validate(service, version, strict=True)


def test_kedas_resource_has_its_form() -> None:
    """Its fields are those of its definition, and what becomes Kubernetes's own is valid there."""
    found = list(scaled_objects())
    assert len(found) == 1
    for resource in found:
        assert resource["apiVersion"] == "keda.sh/v1alpha1"
        jsonschema.validate(resource["spec"], SCALED_OBJECT)
        kubernetes_validate.validate(_autoscaler(resource["spec"]), NEWEST[-1], strict=True)


def _autoscaler(spec: dict[str, Any]) -> Resource:
    """Return the autoscaler that KEDA makes of it, as far as it is ours."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "made-by-keda"},
        "spec": {
            "scaleTargetRef": {"kind": "Deployment", "name": spec["scaleTargetRef"]["name"]},
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        },
    }


@pytest.mark.parametrize("path", ["", "fallback", "scaleTargetRef", "triggers/0/metadata"])
def test_a_field_that_keda_does_not_know_is_refused(path: str) -> None:
    """The form is strict, too."""
    spec = copy.deepcopy(next(scaled_objects())["spec"])
    part = spec
    for step in filter(None, path.split("/")):
        part = part[int(step)] if step.isdigit() else part[step]
    part["colour"] = "red"

    with pytest.raises(jsonschema.ValidationError, match="colour"):
        jsonschema.validate(spec, SCALED_OBJECT)


def test_kedas_query_may_be_for_one_namespace_of_several() -> None:
    """As its comment says; another condition would leave out jobs that are due."""
    spec = copy.deepcopy(next(scaled_objects())["spec"])
    metadata = spec["triggers"][0]["metadata"]
    query = metadata["query"]

    metadata["query"] = query.replace("{", '{namespace="shop",')
    assert list(rules_of_keda(spec)) == []
    metadata["query"] = query.replace("{", '{queue="default",')
    assert list(rules_of_keda(spec)) == [f"it asks for {metadata['query']}"]
