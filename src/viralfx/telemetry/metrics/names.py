"""Names that become labels, where nobody knows how many there are."""

OTHER = "_OTHER"
"""Stands for every name that is not told apart, as in OpenTelemetry's semantic conventions."""

_MOST = 64


class BoundedNames:
    """Tells names apart up to a number: each one is kept for ever, by us and by Prometheus."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return the name, or :data:`OTHER` when there are too many already."""
        if name in self._known:
            return name
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(name)
        return name
