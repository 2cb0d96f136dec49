"""The command line, with a server that serves every probe through ASGI."""

import sys

from viralfx.cli import main
from viralfx.server.http_server import HttpServer

if __name__ == "__main__":
    defaults = HttpServer.__init__.__kwdefaults__
    assert defaults is not None
    assert defaults["fast_probes"] is True
    defaults["fast_probes"] = False
    sys.exit(main())
