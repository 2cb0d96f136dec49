"""The types that settings are made of."""

from typing import Annotated

import msgspec
from msgspec import Meta

# The largest signed 32-bit number: 24 days, and no timer or date overflows with it.
Milliseconds = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PositiveMilliseconds = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Threshold = Annotated[int, Meta(ge=1, le=1000)]
Attempts = Annotated[int, Meta(ge=1, le=10_000)]
Port = Annotated[int, Meta(ge=0, le=65535)]
RemotePort = Annotated[int, Meta(ge=1, le=65535)]
Names = tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]*$")], ...]
Modules = tuple[
    Annotated[
        str,
        Meta(
            pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*$",
            examples=["orders.tasks,billing.tasks"],
        ),
    ],
    ...,
]
Hosts = tuple[
    # What an entry may be is told one by one; what may be a password is not told.
    Annotated[str, Meta(pattern=r"^[^\s@]+$", examples=["hooks.example.com,*.example.org"])],
    ...,
]
Endpoints = tuple[
    Annotated[
        str,
        Meta(
            # A port has at most five digits; its size is looked at when it is used.
            pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/@]+):[0-9]{1,5}$",
            examples=["host1:26379,host2:26379"],
        ),
    ],
    ...,
]


class Secret(msgspec.Struct, frozen=True):
    """A value that never shows itself: not in a log, a traceback or ``viralfx env``."""

    value: str

    def __repr__(self) -> str:
        return "Secret('***')"


def meaning(text: str) -> Meta:
    """Describe a setting, for ``viralfx env`` and the documentation."""
    return Meta(description=text)
