"""The standard ``OTEL_*`` variables: whether traces are wanted, and what is wrong with a value.

The SDK reads them itself. Of most mistakes it only logs that it takes its default instead, which
nobody sees until a trace is missed; here they are problems of the start, told all at once.
"""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit

from viralfx.telemetry.tracing.credentials import pairs_of

_GRPC, _HTTP = "grpc", "http/protobuf"

_WANTED = {
    "OTEL_SEMCONV_STABILITY_OPT_IN": "http,database",
    # A heap report forks, and its process calls nobody: all that the library does about forks is to
    # write past the log.
    "GRPC_ENABLE_FORK_SUPPORT": "false",
}
_PROVIDER = "OTEL_PYTHON_TRACER_PROVIDER"
_SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)

_WHOLE_NUMBERS = (
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
)

_LIMITS = (
    *("OTEL_ATTRIBUTE_COUNT_LIMIT", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT"),
    *("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"),
    *("OTEL_SPAN_EVENT_COUNT_LIMIT", "OTEL_SPAN_LINK_COUNT_LIMIT"),
    *("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT"),
)
_SWITCHES = (
    "OTEL_SDK_DISABLED",
    "OTEL_EXPORTER_OTLP_INSECURE",
    "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
)

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+").fullmatch
_METADATA_NAME = re.compile(r"[A-Za-z0-9_.-]+").fullmatch
_METADATA_VALUE = re.compile(r"[\x20-\x7e]*").fullmatch
_HEADER_VALUE = re.compile(r"[\x20-\x7e\xa0-\xff]*").fullmatch
_UNQUOTED = re.compile(r'[^"\\;]*').fullmatch


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Tell whether traces are to be sent: there is an endpoint, and nobody said no."""
    if _word(environ, "OTEL_SDK_DISABLED") == "true":
        return False
    if _word(environ, "OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(_of_traces(environ, "ENDPOINT")[1])


def uses_grpc(environ: Mapping[str, str]) -> bool:
    """Tell the protocol: gRPC, or what the specification has for the default, protobuf by HTTP."""
    return _of_traces(environ, "PROTOCOL")[1].lower() == _GRPC


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the variables say about which traces are recorded."""

    share: float
    """Of the traces that begin here, from 0 to 1."""
    follows_parents: bool
    """Whether a trace that a caller began is recorded if the caller records it, and only then."""


def sampling(environ: Mapping[str, str]) -> Sampling:
    """Return it for variables that have no problem."""
    name = _word(environ, "OTEL_TRACES_SAMPLER") or "parentbased_always_on"
    share = 0.0 if name.endswith("always_off") else 1.0
    if name.endswith("traceidratio"):
        share = float(environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or 1.0)
    return Sampling(share=share, follows_parents=name.startswith("parentbased_"))


@contextmanager
def as_the_library_reads(environ: MutableMapping[str, str]) -> Iterator[None]:
    """Have the variables within the block as the library wants them; they are the application's.

    By the specification an empty variable is as good as none, and the library refuses some. The
    instrumentation of drivers has the words of the present conventions only where a variable asks.
    Each is read once, by the first in the process that needs it.
    """
    changed = {
        name: value
        for name, value in environ.items()
        if name.startswith("OTEL_") and not value.strip()
    }
    for name in changed:
        del environ[name]
    absent = {name: value for name, value in _WANTED.items() if name not in environ}
    environ.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del environ[name]
        environ.update(changed)


def problems(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the variables."""
    exporter = _word(environ, "OTEL_TRACES_EXPORTER")
    if exporter not in {"", "otlp"}:
        yield f"OTEL_TRACES_EXPORTER: {exporter!r} is none of otlp, none"
    for name in _SWITCHES:
        if _word(environ, name) not in {"", "true", "false"}:
            yield f"{name}: {environ[name]!r} is none of true, false"
    yield from _collector(environ)
    yield from _headers(environ)
    yield from _numbers(environ)
    yield from _sampling(environ)
    pairs = pairs_of(environ.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    for number, (name, _) in enumerate(pairs, 1):
        if not name:
            yield f"OTEL_RESOURCE_ATTRIBUTES: what is at place {number} is no name=value"
    provider = environ.get(_PROVIDER, "").strip()
    if provider and not entry_points(group="opentelemetry_tracer_provider", name=provider):
        yield f"{_PROVIDER}: {provider!r} is not installed; leave it out, and this one traces"


def _collector(environ: Mapping[str, str]) -> Iterator[str]:
    name, protocol = _of_traces(environ, "PROTOCOL")
    if protocol.lower() not in {"", _GRPC, _HTTP}:
        yield f"{name}: {protocol!r} is none of {_GRPC}, {_HTTP}"
    name, endpoint = _of_traces(environ, "ENDPOINT")
    if endpoint and not _is_endpoint(endpoint, grpc=uses_grpc(environ)):
        yield f"{name}: it must be a URL such as http://localhost:4318"
    elif uses_grpc(environ) and "@" in endpoint:
        yield f"{name}: by gRPC no user can be told"
    name, timeout = _of_traces(environ, "TIMEOUT")
    if timeout and not _is_positive(timeout):
        yield f"{name}: {timeout!r} is no number of seconds above 0"
    name, compression = _of_traces(environ, "COMPRESSION")
    known = ("none", "gzip") if uses_grpc(environ) else ("none", "gzip", "deflate")
    if compression and compression.lower() not in known:
        yield f"{name}: {compression!r} is none of {', '.join(known)}"
    for kind in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"):
        name, path = _of_traces(environ, kind)
        if path and not Path(path).is_file():
            yield f"{name}: there is no file {path}"


def _headers(environ: Mapping[str, str]) -> Iterator[str]:
    # The library would show the value, which mostly is a key.
    variable, headers = _of_traces(environ, "HEADERS")
    named, valued = _HEADER_NAME, _HEADER_VALUE
    if uses_grpc(environ):
        named, valued = _METADATA_NAME, _METADATA_VALUE
    for number, (name, value) in enumerate(pairs_of(headers), 1):
        if not named(unquote(name)):
            yield f"{variable}: the header at place {number} is no name=value"
        elif not _UNQUOTED(value) or not valued(unquote(value)):
            yield f"{variable}: the value at place {number} has characters that no header may have"


def _numbers(environ: Mapping[str, str]) -> Iterator[str]:
    for name in _LIMITS:
        if (limit := environ.get(name, "").strip() or "0") != "0" and not _is_whole(limit):
            yield f"{name}: {environ[name]!r} is no whole number"
    wrong = [name for name in _WHOLE_NUMBERS if not _is_whole(environ.get(name, "").strip() or "1")]
    for name in wrong:
        yield f"{name}: {environ[name]!r} is no whole number above 0"
    if not wrong:
        queue = int(environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip() or 2048)
        batch = int(environ.get("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "").strip() or 512)
        if batch > queue:
            yield (
                f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE: {batch} is above OTEL_BSP_MAX_QUEUE_SIZE, {queue}"
            )


def _sampling(environ: Mapping[str, str]) -> Iterator[str]:
    sampler = _word(environ, "OTEL_TRACES_SAMPLER")
    if sampler and sampler not in _SAMPLERS:
        yield f"OTEL_TRACES_SAMPLER: {sampler!r} is none of {', '.join(_SAMPLERS)}"
    argument = environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip()
    if sampler.endswith("traceidratio") and argument and not _is_share(argument):
        yield f"OTEL_TRACES_SAMPLER_ARG: {argument!r} is no number from 0 to 1"


def _word(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip().lower()


def _of_traces(environ: Mapping[str, str], kind: str) -> tuple[str, str]:
    """Return the variable that counts for traces, and its value; an empty one is none."""
    special, general = f"OTEL_EXPORTER_OTLP_TRACES_{kind}", f"OTEL_EXPORTER_OTLP_{kind}"
    value = environ.get(special, "").strip()
    return (special, value) if value else (general, environ.get(general, "").strip())


def _is_endpoint(text: str, *, grpc: bool) -> bool:
    try:
        parts = urlsplit(text if "://" in text or not grpc else f"http://{text}")
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
