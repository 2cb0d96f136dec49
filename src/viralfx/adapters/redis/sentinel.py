"""Where the primary is, as the sentinels say."""

import logging
from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import RedisError, ResponseError

from viralfx.adapters.redis.config import Address
from viralfx.domain.single_flight import SingleFlight

_logger = logging.getLogger("viralfx.redis")


class Primary:
    """Asks the sentinels, one after the other, for the primary called ``name``.

    Connections that are opened at the same time ask once. A sentinel that did not help is asked
    last from then on.
    """

    def __init__(self, name: str, sentinels: Sequence[Redis]) -> None:
        self.address: Address | None = None
        """Where it was found last."""
        self._name = name
        self._sentinels = list(sentinels)
        self._search: SingleFlight[Address] = SingleFlight()

    async def find(self) -> Address:
        """Return where the primary is now.

        Raises ``MasterNotFoundError`` when no sentinel answers or none sees a primary that is up,
        and the sentinel's ``ResponseError`` when no primary of that name is watched at all.
        """
        return await self._search.run(self._name, self._find)

    async def _find(self) -> Address:
        reason: RedisError | None = None
        unknown: ResponseError | None = None
        for sentinel in tuple(self._sentinels):
            try:
                answer = await sentinel.sentinel_master(self._name)
            except ResponseError as error:
                unknown = error
            except RedisError as error:
                reason = error
            else:
                state = cast("dict[str, Any]", answer)
                if state["is_master"] and not state["is_sdown"] and not state["is_odown"]:
                    return self._found((str(state["ip"]), int(state["port"])))
            self._sentinels.remove(sentinel)
            self._sentinels.append(sentinel)
        if unknown is not None and reason is None:
            raise unknown
        raise MasterNotFoundError(f"no sentinel knows a primary {self._name!r} that is up") from (
            reason
        )

    def _found(self, address: Address) -> Address:
        if self.address is not None and self.address != address:
            _logger.warning(
                "Redis primary moved",
                extra={"old": _text(self.address), "new": _text(address)},
            )
        self.address = address
        return address


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
