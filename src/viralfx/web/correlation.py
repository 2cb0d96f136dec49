"""The correlation id of an HTTP request, taken from its headers."""

from collections.abc import Iterable

from viralfx.domain.correlation import choose_correlation_id, new_correlation_id

HEADER = b"x-correlation-id"
_WANTED = frozenset({HEADER, b"x-request-id", b"traceparent"})


def correlation_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Choose the id of a request; of a header sent twice, the first counts.

    Not of ``traceparent``: of two none counts, as W3C has it.
    """
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in _WANTED:
            # Not ASCII is not valid either, and latin-1 decodes anything without an error.
            if name not in found:
                found[name] = value.decode("latin-1")
            elif name == b"traceparent":
                found[name] = ""
    if not found:
        return new_correlation_id()
    return choose_correlation_id(
        found.get(HEADER), found.get(b"x-request-id"), found.get(b"traceparent")
    )
