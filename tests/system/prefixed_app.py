"""An application whose variables of the operations layer begin with ``OPS_``."""

import os

from starlette.applications import Starlette

from viralfx import OperationsConfig
from viralfx.asgi import OperationsMiddleware

if "PORT" in os.environ:
    os.environ.setdefault("OPS_PORT", os.environ["PORT"])

app = OperationsMiddleware(Starlette(), OperationsConfig(env_prefix="OPS_"))
