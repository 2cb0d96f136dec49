"""Names the user of each request, so that every log line of the request carries ``userId``."""

from litestar import Litestar, get
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Receive, Scope, Send

from viralfx import OperationsPlugin, bind_user_id


class Identity(ASGIMiddleware):
    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        # Verify the user here: by a session, a token or a client certificate.
        headers = dict(scope.get("headers", ()))
        if user := headers.get(b"x-verified-user"):
            bind_user_id(user.decode("latin-1"))
        await next_app(scope, receive, send)


@get("/hello")
async def hello() -> dict[str, str]:
    return {"hello": "world"}


app = Litestar([hello], middleware=[Identity()], plugins=[OperationsPlugin()])
