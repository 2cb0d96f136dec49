"""Has one function for its own guard, the operations endpoints and the jobs API."""

import hashlib
from collections.abc import Mapping
from typing import Any

from litestar import Litestar, get
from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.handlers import BaseRouteHandler

from viralfx import OperationsConfig, OperationsPlugin, Principal, Right

# Look callers up in your own store, by a digest of their key; this one is of "key-of-ann".
ANN = "ca64daa8b294dc4835d29ca02a6a47427ebc6a225ea3ac2e15f8417fb6601db2"
CALLERS = {ANN: Principal(name="ann", right=Right.OPERATE, submits=("reports.*",))}


def caller_of(headers: Mapping[str, str]) -> Principal | None:
    key = headers.get("x-api-key", "")
    return CALLERS.get(hashlib.sha256(key.encode()).hexdigest())


def operators_only(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    caller = caller_of(connection.headers)
    if caller is None:
        raise NotAuthorizedException("Send your key as X-API-Key.")
    if not caller.may(Right.OPERATE):
        raise PermissionDeniedException("You are no operator.")


@get("/backlog", guards=[operators_only])
async def backlog() -> dict[str, int]:
    return {"orders": 3}


config = OperationsConfig(authorize=caller_of, jobs_api=True)
app = Litestar([backlog], plugins=[OperationsPlugin(config)])
