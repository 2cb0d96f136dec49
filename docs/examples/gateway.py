"""Takes its callers from oauth2-proxy, and gives them rights by their groups."""

import base64
import hmac
import os
from collections.abc import Mapping

from litestar import Litestar

from viralfx import OperationsConfig, OperationsPlugin, Principal, Right

PASSWORD = os.environ["GATEWAY_PASSWORD"].encode()
GROUPS = {"staff": Right.READ, "operators": Right.OPERATE, "on-call": Right.ADMIN}


def authorize(headers: Mapping[str, str]) -> Principal | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme != "Basic":
        return None
    try:
        user, _, password = base64.b64decode(credentials).partition(b":")
    except ValueError:
        return None
    # --basic-auth-password, which only the gateway knows: without it a client wrote the headers.
    if not hmac.compare_digest(password, PASSWORD):
        return None
    groups = headers.get("x-forwarded-groups", "").split(",")
    rights = [GROUPS[group.strip()] for group in groups if group.strip() in GROUPS]
    return Principal(name=user.decode(), right=max(rights, default=Right.NONE))


app = Litestar(plugins=[OperationsPlugin(OperationsConfig(authorize=authorize))])
