"""The correlation id of an HTTP request: taken from its headers, bound, and echoed."""

from collections.abc import Iterable

from viralfx.domain.correlation import bind_correlation_id, choose_correlation_id
from viralfx.web.asgi import Scope

HEADER = b"x-correlation-id"
CHOSEN = "viralfx_correlation_id"
"""Where the ASGI scope's state holds the id, once it is chosen and bound."""
GATED = "viralfx_gated"
"""Set in the ASGI scope's state by a gate, which echoes the id itself."""

_WANTED = frozenset({HEADER, b"x-request-id", b"traceparent"})


def correlation_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Choose the id of a request; of a header sent twice, the first counts."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in _WANTED and name not in found:
            # Not ASCII is not valid either, and latin-1 decodes anything without an error.
            found[name] = value.decode("latin-1")
    if not found:
        return choose_correlation_id(None, None, None)
    return choose_correlation_id(
        found.get(HEADER), found.get(b"x-request-id"), found.get(b"traceparent")
    )


def bound_correlation_id(scope: Scope) -> str:
    """Return the id of a request, choosing and binding it where nobody has yet."""
    state = scope.setdefault("state", {})
    correlation_id: str | None = state.get(CHOSEN)
    if correlation_id is None:
        correlation_id = state[CHOSEN] = correlation_id_of(scope["headers"])
        bind_correlation_id(correlation_id)
    return correlation_id
