"""What must be there before the process is of use."""

from typing import Protocol


class Resource(Protocol):
    """Port: something that is opened at start-up. It is left by a shutdown stage of its own."""

    async def open(self) -> None:
        """Open it, however long that may take; doing it twice is harmless.

        Raises :class:`viralfx.domain.errors.StartupError` when it cannot be had.
        """
        ...
