"""The handlers of the bare application under the operations layer that neither counts nor logs."""

from benchmarks.peers.handlers import slow, work
from litestar import Litestar

from viralfx import OperationsPlugin


class _Silent(OperationsPlugin):
    def watch(self) -> None:  # type: ignore[override] # nobody is told of requests
        return None


app = Litestar([slow, work], plugins=[_Silent()], logging_config=None)
