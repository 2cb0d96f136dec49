"""Concurrent keep-alive clients that record for each request whether it was answered."""

import asyncio
import threading
from typing import Self


class KeepAliveClients:
    """Clients on an event loop in a separate thread; each sends requests sequentially."""

    def __init__(self, port: int, path: str, *, count: int) -> None:
        self.responded = 0
        self.lost: list[str] = []
        """One entry for each request that was sent and not answered in full."""
        self.last_head = b""
        self._port, self._count = port, count
        self._request = f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()
        self._leaving = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Finish the requests in flight, send no more, and close."""
        self._leaving = True
        self._thread.join(30)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(self._count):
                clients.create_task(self._client())

    async def _client(self) -> None:
        while not self._leaving:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as error:
                # No request is lost, but the server must accept connections until then.
                self.lost.append(f"refused: {error!r}")
                return
            try:
                while not self._leaving:
                    writer.write(self._request)
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    await reader.readexactly(length)
                    if not head.startswith(b"HTTP/1.1 200 "):
                        self.lost.append(head.decode("latin-1"))
                    self.responded += 1
                    self.last_head = head
                    if b"connection: close" in head:
                        break
            except (OSError, asyncio.IncompleteReadError) as error:
                self.lost.append(repr(error))
            finally:
                writer.close()
