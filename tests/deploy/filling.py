"""An application for a container, where this file is put: it keeps what it is told to keep."""

from litestar import Litestar, post

_kept: list[bytearray] = []


@post("/fill/{mebibytes:int}")
async def fill(mebibytes: int) -> None:
    """Hold on to so much more memory, every page of it."""
    _kept.append(bytearray(b"x") * (mebibytes * 2**20))


app = Litestar([fill], logging_config=None)
