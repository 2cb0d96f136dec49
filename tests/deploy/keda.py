"""The schema of KEDA's resource, written after its definition, which no package contains."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
from tests.observability.series import load, unknown

from viralfx.settings import Settings


def _only(*required: str, **properties: object) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "additionalProperties": False,
        "properties": properties,
    }


_OF_ONE_NAMESPACE = re.compile(r'\{namespace="[a-z0-9-]+",')
_NUMBER = {"type": "integer", "minimum": 1}
_TRIGGER = _only(
    "type",
    "metricType",
    "metadata",
    type={"const": "prometheus"},
    # The fallback needs it.
    metricType={"const": "AverageValue"},
    metadata=_only(
        "serverAddress",
        "query",
        "threshold",
        "ignoreNullValues",
        serverAddress={"type": "string", "pattern": "^http://[a-z.-]+:[0-9]+$"},
        query={"type": "string"},
        # A text, with a number in it
        threshold={"type": "string", "pattern": "^[0-9.]+$"},
        # Or no answer would be taken for no jobs.
        ignoreNullValues={"const": "false"},
    ),
)
SCALED_OBJECT = _only(
    "scaleTargetRef",
    "minReplicaCount",
    "maxReplicaCount",
    "fallback",
    "advanced",
    "triggers",
    scaleTargetRef=_only("name", name={"type": "string"}),
    minReplicaCount=_NUMBER,
    maxReplicaCount=_NUMBER,
    pollingInterval=_NUMBER,
    fallback=_only(
        "failureThreshold",
        "replicas",
        "behavior",
        failureThreshold=_NUMBER,
        replicas=_NUMBER,
        # Otherwise KEDA would remove busy workers while the number of due jobs is unknown.
        behavior={"const": "currentReplicasIfHigher"},
    ),
    advanced=_only(
        "horizontalPodAutoscalerConfig",
        # Kubernetes defines its contents.
        horizontalPodAutoscalerConfig=_only("behavior", behavior={"type": "object"}),
    ),
    triggers={"type": "array", "minItems": 1, "items": _TRIGGER},
)
"""The part of the specification that is used; any other field is an error."""


@cache
def proven_query() -> str:
    """Return the expected query: it counts each waiting or running job once."""
    tests = load("rules_test.yml")["tests"]
    (check,) = [check for test in tests for check in test.get("promql_expr_test", ())]
    return str(check["expr"])


def rules_of_keda(spec: dict[str, Any]) -> Iterator[str]:
    """Yield the problems of the specification of a ScaledObject."""
    for error in jsonschema.Draft202012Validator(SCALED_OBJECT).iter_errors(spec):
        yield f"{'/'.join(map(str, error.path))}: {error.message}"
    for trigger in spec.get("triggers", ()):
        query = trigger.get("metadata", {}).get("query", "")
        # One number is asked for, and more are an error there; busy workers are needed, too.
        if _OF_ONE_NAMESPACE.sub("{", query) != proven_query():
            yield f"it asks for {query}"
        if found := _unknown(query):
            yield f"no metric {found} exists"
        if float(trigger["metadata"]["threshold"]) != 2 * Settings().job.concurrency:
            yield "the threshold is not twice what a worker runs at once of a queue"
    if not spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]:
        yield "the fallback is outside the limits"


@cache
def _unknown(query: str) -> tuple[str, ...]:
    return tuple(unknown(query))
