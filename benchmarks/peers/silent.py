"""The handlers of the bare application under the operations layer, without metrics and log."""

from benchmarks.peers.handlers import slow, work
from litestar import Litestar

from viralfx import OperationsPlugin


class _Silent(OperationsPlugin):
    def request_recorder(self) -> None:  # type: ignore[override] # requests are not recorded
        return None


app = Litestar([slow, work], plugins=[_Silent()], logging_config=None)
