"""The standard ``OTEL_*`` variables: validation, and the facts that this project needs.

The SDK reads the variables itself. For most mistakes it only logs a warning and uses its default,
which goes unnoticed until traces are missing. Here they are errors at start-up, reported together.
"""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, unquote_plus, urlsplit

from viralfx.core.extras import is_set

_SECRET_NAME = re.compile(
    r"(auth|authorization|authentication|cookie|credentials?|dsn|jwt|key|licen[cs]e|pass|passphrase"
    r"|passw(or)?d|pwd|secret|sig|signature|token)($|[^a-z])",
    re.IGNORECASE,
).search
"""Word endings in names of headers and parameters that mark values of any length as secret."""
_HARMLESS_NAME = re.compile(
    r"(^|[^a-z])(agent|dataset|name|namespace|org|orgid|tenant|type)($|[^a-z])", re.IGNORECASE
).search
"""Words that mark values as harmless: Content-Type, User-Agent, X-Scope-OrgID and the like."""
_MIN_TOKEN_CHARACTERS = 16
"""Values under other names count as secret from this length on. Shorter ones are names of teams or
zones, which occur in ordinary log lines."""


def secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the secrets in the variables of all OTLP exporters, also those for logs and metrics.

    These are values of headers, and in addresses the user part and values of query parameters.
    """
    for variable, value in environ.items():
        if not variable.startswith("OTEL_EXPORTER_OTLP_"):
            continue
        if variable.endswith("_HEADERS"):
            for name, text in pairs_of(value):
                for secret in {text, unquote(text)}:
                    # The text before a space is the scheme, such as Bearer.
                    word = secret.rpartition(" ")[2]
                    if _is_secret(unquote(name), word):
                        yield from {secret, word}
        elif variable.endswith("_ENDPOINT"):
            yield from _in_address(value)


def _in_address(address: str) -> Iterator[str]:
    if "@" in address:
        user = address.rpartition("@")[0].rpartition("://")[2]
        password = user.partition(":")[2]
        yield from {user, password, unquote(user), unquote(password)} - {""}
    for pair in address.partition("#")[0].partition("?")[2].split("&"):
        name, _, value = pair.partition("=")
        for secret in {value, unquote_plus(value)}:
            if _is_secret(unquote_plus(name), secret):
                yield secret


def _is_secret(name: str, value: str) -> bool:
    long, harmless = len(value) >= _MIN_TOKEN_CHARACTERS, bool(_HARMLESS_NAME(name))
    if _SECRET_NAME(name):
        # "token-type" with a short value is harmless, "tenant-token" with a long one is secret.
        return bool(value) and (long or not harmless)
    return long and not harmless


def pairs_of(text: str) -> list[tuple[str, str]]:
    """Return the ``name=value`` pairs of a list; an entry without ``=`` has an empty name."""
    pairs = [each.strip().partition("=") for each in text.split(",") if each.strip()]
    return [
        (name.strip(), value.strip()) if equals else ("", name) for name, equals, value in pairs
    ]


_GRPC, _HTTP = "grpc", "http/protobuf"

_SDK_DEFAULTS = {
    "OTEL_SEMCONV_STABILITY_OPT_IN": "http,database",
    # A heap report forks, and the child uses no gRPC. With fork support the library would only
    # write warnings to standard error.
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


def is_disabled(environ: Mapping[str, str]) -> bool:
    """Return whether a variable turns the library off altogether."""
    return _word(environ, "OTEL_SDK_DISABLED") == "true"


def is_enabled(environ: Mapping[str, str]) -> bool:
    """Return whether tracing is on: an endpoint is set, and no variable turns it off."""
    if is_disabled(environ):
        return False
    if _word(environ, "OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(_for_traces(environ, "ENDPOINT")[1])


def endpoint_of(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the variable that is in force for the address of the collector, and the address."""
    return _for_traces(environ, "ENDPOINT")


def uses_grpc(environ: Mapping[str, str]) -> bool:
    """Return whether spans are sent by gRPC; the specification's default is protobuf over HTTP."""
    return _for_traces(environ, "PROTOCOL")[1].lower() == _GRPC


def needs(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield what turns tracing on, and the extra that it needs."""
    if is_enabled(environ):
        variable = _for_traces(environ, "ENDPOINT")[0]
        yield is_set(variable), "otel-grpc" if uses_grpc(environ) else "otel"


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling that the variables configure."""

    share: float
    """Recorded share of the traces that begin here, from 0 to 1."""
    follows_parents: bool
    """Whether the caller's sampling decision applies to traces that a caller began."""


def sampling(environ: Mapping[str, str]) -> Sampling:
    """Return the sampling for variables that passed :func:`problems`."""
    name = _word(environ, "OTEL_TRACES_SAMPLER") or "parentbased_always_on"
    share = 0.0 if name.endswith("always_off") else 1.0
    if name.endswith("traceidratio"):
        share = float(environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or 1.0)
    return Sampling(share=share, follows_parents=name.startswith("parentbased_"))


@contextmanager
def sdk_environment(environ: MutableMapping[str, str]) -> Iterator[None]:
    """Adapt the variables for the SDK within the block; restore them afterwards.

    Empty variables are removed: the specification treats them as unset, but the SDK rejects some.
    Unset ones of ``_SDK_DEFAULTS`` are added, so that instrumentations use the current semantic
    conventions. The library reads each variable once per process.
    """
    changed = {
        name: value
        for name, value in environ.items()
        if name.startswith("OTEL_") and not value.strip()
    }
    for name in changed:
        del environ[name]
    absent = {name: value for name, value in _SDK_DEFAULTS.items() if name not in environ}
    environ.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del environ[name]
        environ.update(changed)


def problems(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield one line for each invalid variable; no line shows a header or user."""
    exporter = _word(environ, "OTEL_TRACES_EXPORTER")
    if exporter not in {"", "otlp"}:
        yield f"OTEL_TRACES_EXPORTER: {exporter!r} is not one of otlp, none"
    for name in _SWITCHES:
        if _word(environ, name) not in {"", "true", "false"}:
            yield f"{name}: {environ[name]!r} is not one of true, false"
    yield from _collector(environ)
    yield from _headers(environ)
    yield from _numbers(environ)
    yield from _sampling(environ)
    pairs = pairs_of(environ.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    for number, (name, _) in enumerate(pairs, 1):
        if not name:
            yield f"OTEL_RESOURCE_ATTRIBUTES: entry {number} is not name=value"
    provider = environ.get(_PROVIDER, "").strip()
    if provider and not entry_points(group="opentelemetry_tracer_provider", name=provider):
        yield f"{_PROVIDER}: {provider!r} is not installed; unset it to use the built-in provider"


def _collector(environ: Mapping[str, str]) -> Iterator[str]:
    name, protocol = _for_traces(environ, "PROTOCOL")
    if protocol.lower() not in {"", _GRPC, _HTTP}:
        yield f"{name}: {protocol!r} is not one of {_GRPC}, {_HTTP}"
    name, endpoint = _for_traces(environ, "ENDPOINT")
    if endpoint and not _is_endpoint(endpoint, grpc=uses_grpc(environ)):
        yield f"{name}: it must be a URL such as http://localhost:4318"
    elif uses_grpc(environ) and "@" in endpoint:
        yield f"{name}: gRPC does not support a user in the endpoint"
    name, timeout = _for_traces(environ, "TIMEOUT")
    if timeout and not _is_positive(timeout):
        yield f"{name}: {timeout!r} is not a number of seconds above 0"
    name, compression = _for_traces(environ, "COMPRESSION")
    known = ("none", "gzip") if uses_grpc(environ) else ("none", "gzip", "deflate")
    if compression and compression.lower() not in known:
        yield f"{name}: {compression!r} is not one of {', '.join(known)}"
    for kind in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"):
        name, path = _for_traces(environ, kind)
        if path and not Path(path).is_file():
            yield f"{name}: file {path} does not exist"


def _headers(environ: Mapping[str, str]) -> Iterator[str]:
    # Values are usually keys, and the library's own message would show them.
    variable, headers = _for_traces(environ, "HEADERS")
    named, valued = _HEADER_NAME, _HEADER_VALUE
    if uses_grpc(environ):
        named, valued = _METADATA_NAME, _METADATA_VALUE
    for number, (name, value) in enumerate(pairs_of(headers), 1):
        if not named(unquote(name)):
            yield f"{variable}: header {number} is not name=value"
        elif not _UNQUOTED(value) or not valued(unquote(value)):
            yield f"{variable}: value {number} has characters that are not allowed in a header"


def _numbers(environ: Mapping[str, str]) -> Iterator[str]:
    for name in _LIMITS:
        if (limit := environ.get(name, "").strip() or "0") != "0" and not _is_whole(limit):
            yield f"{name}: {environ[name]!r} is not a whole number"
    wrong = [name for name in _WHOLE_NUMBERS if not _is_whole(environ.get(name, "").strip() or "1")]
    for name in wrong:
        yield f"{name}: {environ[name]!r} is not a whole number above 0"
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
        yield f"OTEL_TRACES_SAMPLER: {sampler!r} is not one of {', '.join(_SAMPLERS)}"
    argument = environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip()
    if sampler.endswith("traceidratio") and argument and not _is_share(argument):
        yield f"OTEL_TRACES_SAMPLER_ARG: {argument!r} is not a number from 0 to 1"


def _word(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip().lower()


def _for_traces(environ: Mapping[str, str], kind: str) -> tuple[str, str]:
    """Return name and value of the variable in force for traces; an empty one counts as unset."""
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
