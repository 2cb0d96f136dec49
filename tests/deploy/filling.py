"""An application for a container that allocates memory on request and keeps it."""

from litestar import Litestar, post

_kept: list[bytearray] = []


@post("/fill/{mebibytes:int}")
async def fill(mebibytes: int) -> None:
    """Allocate memory, touch every page and keep it."""
    _kept.append(bytearray(b"x") * (mebibytes * 2**20))


app = Litestar([fill], logging_config=None)
