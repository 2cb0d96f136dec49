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
from urllib.parse import unquote, unquote_plus, urlsplit

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

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+").fullmatch
_METADATA_NAME = re.compile(r"[A-Za-z0-9_.-]+").fullmatch
_METADATA_VALUE = re.compile(r"[\x20-\x7e]*").fullmatch
_HEADER_VALUE = re.compile(r"[\x20-\x7e\xa0-\xff]*").fullmatch
_UNQUOTED = re.compile(r'[^"\\;]*').fullmatch
_OF_SECRETS = re.compile(
    r"(auth|authorization|authentication|cookie|credentials?|dsn|jwt|key|licen[cs]e|pass|passphrase"
    r"|passw(or)?d|pwd|secret|sig|signature|token)($|[^a-z])",
    re.IGNORECASE,
).search
"""Ends of words in names of headers and parameters by which a value of any length is a secret."""
_OF_NO_SECRETS = re.compile(
    r"(^|[^a-z])(agent|dataset|name|namespace|org|orgid|tenant|type)($|[^a-z])", re.IGNORECASE
).search
"""Those by which it is none: Content-Type, User-Agent, X-Scope-OrgID, X-Honeycomb-Dataset."""
_LEAST_OF_A_TOKEN = 16
"""Characters from which on a value is taken for a secret where its name says nothing: others are
names of teams and zones, which are words of every log."""


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
    name, protocol = _of_traces(environ, "PROTOCOL")
    if protocol.lower() not in {"", _GRPC, _HTTP}:
        yield f"{name}: {protocol!r} is none of {_GRPC}, {_HTTP}"
    name, endpoint = _of_traces(environ, "ENDPOINT")
    if endpoint and not _is_endpoint(endpoint, grpc=uses_grpc(environ)):
        yield f"{name}: it must be a URL such as http://localhost:4318"
    elif uses_grpc(environ) and "@" in endpoint:
        yield f"{name}: by gRPC no user can be told"
    yield from _headers(environ)
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
    yield from _numbers(environ)
    yield from _sampling(environ)
    provider = environ.get(_PROVIDER, "").strip()
    if provider and not entry_points(group="opentelemetry_tracer_provider", name=provider):
        yield f"{_PROVIDER}: {provider!r} is not installed; leave it out, and this one traces"


def secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield what must not be told of how telemetry is sent, also of what others in here send.

    That are values of headers, which mostly are keys, and in addresses passwords and queries.
    """
    for variable, value in environ.items():
        if not variable.startswith("OTEL_EXPORTER_OTLP_"):
            continue
        if variable.endswith("_HEADERS"):
            for name, text in _pairs(value):
                for secret in {text, unquote(text)}:
                    # What comes before a space is the scheme, as Bearer.
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
    long, harmless = len(value) >= _LEAST_OF_A_TOKEN, bool(_OF_NO_SECRETS(name))
    if _OF_SECRETS(name):
        # The type of a token is none, but the token of a tenant is one.
        return bool(value) and (long or not harmless)
    return long and not harmless


def _pairs(headers: str) -> list[tuple[str, str]]:
    """Return names and values, as written; what is neither has no name."""
    pairs = [each.strip().partition("=") for each in headers.split(",") if each.strip()]
    return [
        (name.strip(), value.strip()) if equals else ("", name) for name, equals, value in pairs
    ]


def _headers(environ: Mapping[str, str]) -> Iterator[str]:
    # The library would show the value, which mostly is a key.
    variable, headers = _of_traces(environ, "HEADERS")
    named, valued = _HEADER_NAME, _HEADER_VALUE
    if uses_grpc(environ):
        named, valued = _METADATA_NAME, _METADATA_VALUE
    for number, (name, value) in enumerate(_pairs(headers), 1):
        if not named(unquote(name)):
            yield f"{variable}: the header at place {number} is no name=value"
        elif not _UNQUOTED(value) or not valued(unquote(value)):
            yield f"{variable}: the value at place {number} has characters that no header may have"


def _numbers(environ: Mapping[str, str]) -> Iterator[str]:
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
