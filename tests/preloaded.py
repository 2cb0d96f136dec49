"""Loads what a service imports at its start, in the fork server of ``tests/forked.py``."""

import difflib
import encodings.ascii
import encodings.idna
import gc
import importlib

from anyio._backends import _asyncio
from litestar import Litestar, get
from uvicorn.loops import uvloop
from uvicorn.protocols.websockets import websockets_sansio_impl

from viralfx.bootstrap import postgres, redis

__all__ = [
    "_asyncio",
    "difflib",
    "encodings",
    "postgres",
    "redis",
    "uvloop",
    "websockets_sansio_impl",
]

for _late in (
    *("attrs", "litestar.logging.standard", "uvicorn.lifespan.off", "uvicorn.loops.auto"),
    *("uvicorn.protocols.websockets.auto", "uvloop"),
):
    importlib.import_module(_late)


@get("/")
async def _handler() -> None: ...


# The plugins of an application and its routes import modules when they are made.
Litestar([_handler], logging_config=None)

# A collection in a child must not touch, and so copy, the pages of all these modules.
gc.collect()
gc.freeze()
