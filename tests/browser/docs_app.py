"""An application that shows its document, its jobs included, below a path of its own."""

from litestar import Litestar, post
from litestar.config.compression import CompressionConfig
from litestar.config.csrf import CSRFConfig
from litestar.openapi import OpenAPIConfig
from litestar.params import JSONBody

from viralfx import ApiDocsPlugin, OperationsConfig, OperationsPlugin

TITLE = "Shop </title><script>document.title = 'injected'</script>"


@post("/orders", status_code=201)
async def order(data: JSONBody[dict[str, int]]) -> dict[str, int]:
    """Take an order."""
    return data


app = Litestar(
    [order],
    plugins=[OperationsPlugin(OperationsConfig(jobs_api=True))],
    compression_config=CompressionConfig(backend="gzip"),
    csrf_config=CSRFConfig(secret="not a secret", exclude=["/health"]),
    openapi_config=OpenAPIConfig(
        title=TITLE,
        version="1",
        path="/about",
        render_plugins=[ApiDocsPlugin(path="/api")],
    ),
)
