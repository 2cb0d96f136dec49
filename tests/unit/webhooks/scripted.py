"""A sender that does what a test tells it."""

from collections.abc import Mapping
from dataclasses import dataclass

from viralfx.domain.webhooks.delivery import Answer
from viralfx.domain.webhooks.destinations import Destination


@dataclass(frozen=True)
class Posted:
    """One call of the sender."""

    destination: Destination
    headers: Mapping[str, str]
    body: bytes


class ScriptedSender:
    """Implements the port: answers with statuses, answers and errors in turn, the last for ever."""

    def __init__(self, *script: int | Answer | BaseException) -> None:
        self.script = list(script)
        self.posted: list[Posted] = []

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """Take the next of the script."""
        self.posted.append(Posted(destination, headers, body))
        act = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(act, BaseException):
            raise act
        return Answer(status=act) if isinstance(act, int) else act
