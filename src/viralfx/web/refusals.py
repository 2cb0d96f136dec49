"""What is answered and logged where the management token is missing or wrong."""

import asyncio
import logging
from contextvars import Context

from viralfx.domain.clock import Clock
from viralfx.web.access import Verdict
from viralfx.web.asgi import Scope
from viralfx.web.replies import Refused, problem_answer

_logger = logging.getLogger("viralfx.management")

_LONGEST = 200
"""Characters of a path that are logged: a client writes it."""


class Refusals:
    """Answers who may not do what was asked, and logs it.

    The first is logged at once. Whoever guesses tokens does so often: from then on there is at most
    one line in ``period`` seconds, which is about the last one and counts the others.
    """

    def __init__(self, clock: Clock, *, period: float = 60.0) -> None:
        self._clock = clock
        self._period = period
        self._next = clock.monotonic()
        self._untold = 0
        self._last: dict[str, object] = {}
        self._timer: asyncio.TimerHandle | None = None

    def of(self, verdict: Verdict) -> Refused | None:
        """Return the answer; None where it is allowed."""
        if verdict is Verdict.ALLOWED:
            return None
        if verdict is Verdict.FORBIDDEN:
            answer = problem_answer(403, "MANAGEMENT_TOKEN is not set, so nobody may do this.")
        else:
            challenge = (b"www-authenticate", b"Bearer")
            what = "Send the management token as a bearer token."
            answer = problem_answer(401, what, challenge)
        return Refused(answer, self._note)

    def _note(self, scope: Scope, status: int) -> None:
        client = scope.get("client")  # a Unix socket has none
        self._untold += 1
        self._last = {
            "method": scope["method"],
            "path": scope["path"][:_LONGEST],
            "client": client[0] if client else None,
            "status": status,
        }
        wait = self._next - self._clock.monotonic()
        if wait <= 0:
            self._tell()
        elif self._timer is None:
            # Also when nobody comes again. Of no conversation: it is about several.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(wait, self._tell, context=Context())

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next = self._clock.monotonic() + self._period
        others, self._untold = self._untold - 1, 0
        _logger.warning("Management access refused", extra={**self._last, "others": others})
