"""Groups of checks: each has an endpoint, for a balancer or a page that depends on a part only."""

from collections.abc import Callable, Mapping, Sequence

from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.health.model import CheckReport, Status
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.web import schemas
from viralfx.web.auth import AccessPolicy, Headers
from viralfx.web.responses import (
    READ,
    DenialLog,
    Denied,
    Endpoint,
    RawResponse,
    encode,
    json_response,
    not_allowed,
    problem_response,
    retry_after,
)


class GroupEndpoints:
    """Serves ``/health/group/{group}``: the worst status of the checks of a group, and each."""

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]],
        *,
        monitor: HealthMonitor,
        clock: Clock,
        access: AccessPolicy,
        denials: DenialLog,
        path: str,
        show: Callable[[CheckReport], schemas.CheckState],
    ) -> None:
        """``show`` returns the body of one check."""
        self._groups = {name: tuple(dict.fromkeys(checks)) for name, checks in groups.items()}
        self._monitor = monitor
        self._clock = clock
        self._access = access
        self._denials = denials
        self._prefix = f"{path}/"
        self._show = show

    def find(self, path: str) -> Endpoint | None:
        """Return the endpoint for the path of a group; None for any other path."""
        if not self._groups or not path.startswith(self._prefix):
            return None
        name = path[len(self._prefix) :]
        return None if not name or "/" in name else self._one(name)

    def _one(self, name: str) -> Endpoint:
        def endpoint(method: str, _query: bytes, headers: Headers) -> RawResponse | Denied:
            if method not in READ:
                return not_allowed("GET, HEAD")
            return self._denials.of(self._access.to_details(headers)) or self._state(name)

        return endpoint

    def _state(self, name: str) -> RawResponse:
        if name not in self._groups:
            names = ", ".join(self._groups)
            return problem_response(404, f"There is no such group; the groups are {names}.")
        reports = self._monitor.report().checks
        members = {check: reports[check] for check in self._groups[name]}
        worst = max((each.status for each in members.values()), key=lambda status: status.severity)
        body = encode(
            schemas.GroupState(
                name=name,
                status=str(worst),
                timestamp=timestamp(self._clock.now()),
                checks={check: self._show(report) for check, report in members.items()},
            )
        )
        if worst is not Status.FAIL:
            return json_response(200, body)
        failing = (each.policy for each in members.values() if each.status is Status.FAIL)
        return json_response(
            503, body, retry_after(min(policy.interval_when_failing for policy in failing))
        )
