"""The handlers of the bare Litestar application, with the operations layer around them."""

from benchmarks.peers.handlers import slow, work
from litestar import Litestar

from viralfx import OperationsPlugin

app = Litestar([slow, work], plugins=[OperationsPlugin()], logging_config=None)
