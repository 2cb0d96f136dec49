"""An application that records which requests its handlers have executed."""

import asyncio
import gc
import hashlib
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator

from litestar import Litestar, Request, WebSocket, get, post, websocket
from litestar.datastructures import State
from litestar.response import Stream

from viralfx import OperationsPlugin

AnyRequest = Request[object, object, State]

executed: Counter[str] = Counter()
"""The number of executions of ``/who``, and of requests with each value of ``X-User``."""


def _note_user(request: AnyRequest) -> str | None:
    user = request.headers.get("x-user")
    if user is not None:
        executed[f"user={user}"] += 1
    return user


@post("/up", status_code=200)
async def up(request: AnyRequest) -> dict[str, object]:
    """Read the body; return its length and the user in the headers."""
    return {"n": len(await request.body()), "user": _note_user(request)}


@get("/who")
async def who(request: AnyRequest) -> dict[str, object]:
    """Serve a path that the proxies forbid."""
    executed["who"] += 1
    return {"user": _note_user(request)}


@get("/echo/{name:str}")
async def echo(request: AnyRequest, name: str) -> dict[str, str]:
    """Return a part of the path, with which a client recognizes its own response."""
    _note_user(request)
    return {"name": name}


@post("/late", status_code=200)
async def late(request: AnyRequest, seconds: float) -> dict[str, object]:
    """Read the body after some seconds."""
    await asyncio.sleep(seconds)
    return {"n": len(await request.body())}


@get("/client")
async def client(request: AnyRequest) -> dict[str, str]:
    """Return the client's address and scheme as the application sees them."""
    assert request.client is not None
    return {"host": request.client.host, "scheme": str(request.scope["scheme"])}


@post("/mirror", status_code=200)
async def mirror(request: AnyRequest) -> Stream:
    """Start the response before the body is read, and send the body back."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"started"
        async for piece in request.stream():
            yield piece

    return Stream(pieces())


@get("/big")
async def big(mebibytes: int) -> Stream:
    """Send some MiB."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(16 * mebibytes):
            yield b"." * 65536

    return Stream(pieces(), headers={"content-length": str(mebibytes * 2**20)})


@get("/blob", media_type="application/octet-stream")
async def blob(mebibytes: int) -> bytes:
    """Send some MiB as one message."""
    return b"." * (mebibytes * 2**20)


@get("/executed")
async def recorded() -> dict[str, int]:
    """Return the recorded executions."""
    return dict(executed)


@get("/allocated")
async def allocated() -> dict[str, int]:
    """Return the bytes of the objects that were made since the first such request."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    gc.collect()
    return {"bytes": tracemalloc.get_traced_memory()[0]}


@websocket("/ws")
async def ws(socket: WebSocket[object, object, State]) -> None:
    """Accept, send one message back, and close."""
    await socket.accept()
    await socket.send_text(await socket.receive_text())
    await socket.close()


@websocket("/push")
async def push(
    socket: WebSocket[object, object, State], messages: int, size: int = 100_000
) -> None:
    """Send messages, then wait for one."""
    await socket.accept()
    for _ in range(messages):
        await socket.send_text("." * size)
    await socket.receive_text()


@websocket("/mute")
async def mute(socket: WebSocket[object, object, State]) -> None:
    """Accept, and read no message."""
    await socket.accept()
    await asyncio.Event().wait()


@websocket("/first")
async def first(socket: WebSocket[object, object, State]) -> None:
    """Read one message, and close."""
    await socket.accept()
    await socket.receive_bytes()
    await socket.close()


@websocket("/sum")
async def summarize(socket: WebSocket[object, object, State]) -> None:
    """Read messages until an empty one; send a digest of all, in their order."""
    digest = hashlib.sha256()
    await socket.accept()
    while data := await socket.receive_bytes():
        digest.update(data)
    await socket.send_text(digest.hexdigest())
    await socket.close()


app = Litestar(
    [
        up,
        who,
        echo,
        late,
        client,
        mirror,
        big,
        blob,
        recorded,
        allocated,
        ws,
        push,
        mute,
        first,
        summarize,
    ],
    plugins=[OperationsPlugin()],
    logging_config=None,
)
