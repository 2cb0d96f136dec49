"""What ``viralfx doctor`` says of traces: whether there are any, where they go, what is wrong."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from viralfx.domain.diagnosis import Area, Finding, passed, skipped
from viralfx.telemetry.tracing.variables import is_wanted, problems, uses_grpc

_SPECIAL, _GENERAL = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
_REFUSALS = ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER")
"""What may say no though there is an endpoint."""


def tracing_problems(environ: Mapping[str, str]) -> list[str]:
    """Return what the start refuses of the variables ``OTEL_*``."""
    return list(problems(environ)) if is_wanted(environ) else []


def review_tracing(environ: Mapping[str, str]) -> Finding:
    """Tell whether variables that have no problem turn traces on. No collector is asked."""
    endpoints = {name: environ.get(name, "").strip() for name in (_SPECIAL, _GENERAL)}
    variable = next((name for name, value in endpoints.items() if value), None)
    if variable is None:
        return skipped(Area.TRACING, f"{_GENERAL} is not set: nothing is traced")
    if not is_wanted(environ):
        only = {variable: endpoints[variable]}
        said = {name: environ.get(name, "").strip() for name in _REFUSALS}
        no = [
            f"{name}={value}"
            for name, value in said.items()
            if not is_wanted({**only, name: value})
        ]
        return skipped(Area.TRACING, f"{' and '.join(no)}: nothing is traced, despite {variable}")
    how = "gRPC" if uses_grpc(environ) else "HTTP"
    return passed(Area.TRACING, f"traces go to {_place(endpoints[variable])} by {how}: {variable}")


def _place(endpoint: str) -> str:
    """Return scheme, host and port, on one line: all else of an address may be a secret."""
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    place = " ".join(parts.netloc.rpartition("@")[2].splitlines())
    return f"{parts.scheme}://{place}" if parts.scheme else place
