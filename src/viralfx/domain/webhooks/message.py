"""What is sent: the payload of a job, and the body that comes of it."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from viralfx.domain.clock import timestamp
from viralfx.domain.webhooks.destinations import parse_destination
from viralfx.domain.webhooks.errors import WebhookRefusedError


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookMessage:
    """The payload of ``notifications.webhook``.

    With ``alert`` it goes where the process is told that alerts go. That URL is no part of a job:
    who may read jobs need not know it.
    """

    type: str
    """What happened, such as ``order.shipped``."""
    data: dict[str, Any]
    url: str | None = None
    alert: bool = False

    def __post_init__(self) -> None:
        """Refuse what could never be sent, so that nobody accepts it. Raises ``ValueError``."""
        if not self.type:
            raise ValueError("type must say what happened, such as order.shipped")
        if (self.url is None) != self.alert:
            raise ValueError("it must have either a url or alert: true")
        if self.url is not None:
            try:
                parse_destination(self.url)
            except WebhookRefusedError as error:
                raise ValueError(str(error)) from None

    def body(self, at: datetime) -> bytes:
        """Return the body, the same for each attempt when ``at`` is: JSON, in ASCII."""
        content = {"type": self.type, "timestamp": timestamp(at), "data": self.data}
        return json.dumps(content, separators=(",", ":")).encode()
