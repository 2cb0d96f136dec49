"""One line for each request that an application answered."""

import logging
import time

logger = logging.getLogger("viralfx.access")


class AccessRecord(logging.LogRecord):
    """The record of one request.

    An ordinary record, for any handler and filter, but made without looking up thread, process
    and caller, which say nothing here and take longer than everything else about it.
    """

    method: str
    route: str
    duration: float
    """Milliseconds."""

    def __init__(
        self,
        method: str,
        route: str,
        status: int | None,
        seconds: float,
        *,
        request_size: int | None,
        response_size: int,
        cut: bool,
        trace: tuple[str, str] | None,
    ) -> None:
        """``status`` is None where no answer began, ``request_size`` where it was not announced."""
        created = time.time()
        own = self.__dict__ = {
            **_OF_NO_INTEREST,
            "msg": f"{method} {route} {'without an answer' if status is None else status}",
            "created": created,
            "msecs": created % 1 * 1000,
            "method": method,
            "route": route,
            "status": status,
            "duration": round(seconds * 1000, 3),
            "requestSize": request_size,
            "responseSize": response_size,
        }
        if status is None:
            del own["status"]
        if request_size is None:
            del own["requestSize"]
        if cut:
            own["cut"] = True
        if trace is not None:
            own["traceId"], own["spanId"] = trace


_OF_NO_INTEREST = vars(logging.LogRecord(logger.name, logging.INFO, "", 0, "", (), None)).copy()
