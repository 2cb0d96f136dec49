"""A service and its worker under traffic, with faults one after another, and a Prometheus."""

import base64
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from signal import SIGTERM

from tests.servers.fault_proxy import PASS, RESET, FaultProxy
from tests.servers.ports import free_port
from tests.servers.postgres import PostgresServer, postgres_server
from tests.servers.prometheus import PrometheusServer, Targets
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import wait_until
from tests.system.load import Load
from tests.system.service import Service, request, running
from tests.system.workers import environment_of, worker

API, WORKER = "viralfx-backend", "viralfx-worker"
"""The jobs' names in deploy/observability/prometheus.yml."""

RATES = {
    "/orders/7": 4.0,
    "/prices": 4.0,
    "/reports/0.05": 2.0,
    "POST /counter": 3.0,
    "/nowhere": 0.5,
    "POST /mistakes": 0.2,
}
"""Requests per second."""

_POOL = 5
_SECRET = "whsec_" + base64.b64encode(b"n" * 32).decode()
_LEASE = 10.0
_SETTINGS = {
    "TASK_MODULES": "tests.job_tasks",
    "JOB_CONCURRENCY": "2",
    "JOB_LEASE": str(int(1000 * _LEASE)),
    "JOB_SWEEP_INTERVAL": "1000",
    "DB_POOL_MAX": str(_POOL),
    "DB_SLOW_QUERY_THRESHOLD": "500",
    "DB_HEALTH_CHECK_INTERVAL": "1000",
    "HEALTH_CHECK_INTERVAL": "1000",
    "WEBHOOK_SECRET": _SECRET,
    "ACCESS_LOG": "false",
}
_REFUSE = """
create or replace function refuse() returns trigger language plpgsql as $$ begin
    if new.payload::text = '"refused"' and new.state not in ('waiting', 'active') then
        raise 'refused';
    end if;
    return new;
end $$
"""
_TRIGGER = """
create trigger refuse before insert or update on {table} for each row execute function refuse()
"""
_ANY = "127.0.0.1"
_RECEIVERS = 8


class Scene:
    """The running processes; :meth:`act` causes one fault after another."""

    def __init__(
        self,
        stack: ExitStack,
        postgres: PostgresServer,
        redis: RedisServer,
        seconds: int,
    ) -> None:
        self._postgres = postgres
        self._database = stack.enter_context(FaultProxy(postgres.port))
        self._redis = stack.enter_context(FaultProxy(redis.port))
        self._dead = free_port()
        """Send webhooks to an address without a receiver."""
        environment = environment_of(
            postgres,
            **_SETTINGS,
            REDIS_HOST=_ANY,
            REDIS_PORT=str(self._redis.port),
            WEBHOOK_ALLOWED_HOSTS=f"http://{_ANY}:{self._dead}",
        )
        environment["DATABASE_URL"] = postgres.url(port=self._database.port)
        self._environment = environment
        self._api = stack.enter_context(self._serving())
        self._worker = stack.enter_context(worker(environment))
        self.prometheus = stack.enter_context(PrometheusServer(self._targets(), seconds=seconds))
        stack.enter_context(Load(self._api.port, RATES))
        self._crowd = stack.enter_context(ThreadPoolExecutor(5 * _POOL))
        self._seconds = seconds
        self._over = threading.Event()
        stack.callback(self._over.set)

    @contextmanager
    def _serving(self, **more: str) -> Iterator[Service]:
        app = ("--app", "tests.observability.shop:app", "--no-worker")
        environment = {**self._environment, "MANAGEMENT_TOKEN": "token-of-the-scene", **more}
        with running(*app, management=True, environment=environment) as service:
            yield service.wait_ready()

    def scraped(self) -> bool:
        """Return whether Prometheus has scraped both processes."""
        found = self.prometheus.ask("query", query="up == 1")["result"]
        return {each["metric"]["job"] for each in found} == {API, WORKER}

    # -- faults ----------------------------------------------------------------------------------

    def act(self, pause: float = 0.0) -> None:
        """Cause every fault once, with a pause of so many seconds after each."""
        happenings: list[Callable[[], None]] = [
            self._jobs,
            self._crowded,
            self._hostile,
            self._supplier_away,
            self._redis_away,
            self._jobs,
            self._webhooks,
            self._outcome_refused,
            self._database_away,
            self._instance_leaves,
        ]
        for happen in happenings:
            happen()
            self.wait(pause)

    def wait(self, seconds: float) -> None:
        """Let the traffic continue."""
        self._over.wait(seconds)

    def _while_scraped(self) -> None:
        """Wait until Prometheus has scraped the current state twice."""
        self.wait(2.5 * self._seconds)

    def _jobs(self) -> None:
        for number in range(12):
            self._ask_for("parcels.ship", {"weight": number})
            self._ask_for("parcels.wait", 0.5)
        self._ask_for("parcels.echo", "hello")
        self._ask_for("parcels.lose", None)
        self._while_scraped()

    def _webhooks(self) -> None:
        for number in range(_RECEIVERS):
            payload = {"url": f"http://{_ANY}:{self._dead}/", "type": "order.shipped", "data": {}}
            self._ask_for("notifications.webhook", {**payload, "data": {"id": number}})
        self._while_scraped()

    def _outcome_refused(self) -> None:
        """Let Postgres refuse the outcome of a job for longer than a lease."""
        tables = ("viralfx_jobs", "viralfx_finished_jobs")
        self._postgres.execute(_REFUSE)
        for table in tables:
            self._postgres.execute(_TRIGGER.format(table=table))
        self._ask_for("parcels.echo", "refused")
        self.wait(_LEASE)
        self._while_scraped()
        for table in tables:
            self._postgres.execute(f"drop trigger refuse on {table}")

    def _ask_for(self, task: str, payload: object) -> None:
        body = {"task": task, "payload": payload}
        with contextlib.suppress(OSError):
            request(self._api.port, "/jobs", method="POST", json_body=body)

    def _crowded(self) -> None:
        took = 0.6 * self._seconds
        for _ in range(4 * _POOL):
            self._crowd.submit(request, self._api.port, f"/reports/{took}", timeout=60)
        self.wait(4 * took)

    def _hostile(self) -> None:
        """Send requests that the server rejects, a wrong token, and an upgrade that is ignored."""
        upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        for sent in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", upgrade):
            with socket.create_connection(("127.0.0.1", self._api.port), timeout=20) as client:
                client.sendall(sent)
                client.recv(65536)
        wrong = {"Authorization": "Bearer wrong"}
        assert request(self._api.port, "/health/tasks", headers=wrong).status == 401
        self._while_scraped()

    def _supplier_away(self) -> None:
        request(self._api.port, "/supplier/away", method="POST")
        self._while_scraped()
        request(self._api.port, "/supplier/back", method="POST")

    def _redis_away(self) -> None:
        self._redis.mode = RESET
        self.wait(3 + 2 * self._seconds)  # longer than commands are retried
        self._redis.mode = PASS

    def _database_away(self) -> None:
        self._database.mode = RESET
        self.wait(1 + 2 * self._seconds)
        self._database.mode = PASS
        self._while_scraped()

    def _instance_leaves(self) -> None:
        """Stop another instance while Prometheus scrapes it; it cuts a request in flight."""
        phase = 3 * self._seconds
        slow = {
            "SHUTDOWN_READINESS_DELAY": str(1000 * phase),
            "SHUTDOWN_DRAIN_TIMEOUT": str(1000 * phase),
            # The application contributes a part of this fault.
            "SHUTDOWN_CONNECTION_TIMEOUT": str(5000 * phase),
            "SHUTDOWN_FORCE_TIMEOUT": str(10_000 * phase),
            "SHOP_CLOSING_SECONDS": str(phase * 0.8),
        }
        with self._serving(**slow) as leaving:
            self.prometheus.retarget(self._targets(leaving))
            self.wait(1)
            self._while_scraped()
            self._crowd.submit(self._left_alone, leaving.port, 4 * phase)
            leaving.signal(SIGTERM)
            leaving.exit_code(seconds=120)

    def _left_alone(self, port: int, seconds: float) -> None:
        with contextlib.suppress(OSError):
            request(port, f"/reports/{seconds}", timeout=60)

    def _targets(self, *more: Service) -> Targets:
        serving = [service.management_port for service in (self._api, *more)]
        return {
            API: [port for port in serving if port],
            WORKER: [port for port in (self._worker.management_port,) if port],
        }


@contextmanager
def scene(*, seconds: int = 1) -> Iterator[Scene]:
    """Start everything, scraped once in ``seconds``. Raises ``UnavailableError``."""
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server())
        redis = stack.enter_context(redis_server())
        redis.command("CONFIG", "SET", "maxmemory", 100_000_000)
        on = Scene(stack, postgres, redis, seconds)
        wait_until(on.scraped, seconds=60, what="all is scraped")
        yield on


def acting(on: Scene, *, pause: float, until: float) -> None:
    """Repeat all faults until a time of the monotonic clock."""
    for _ in count():
        if time.monotonic() >= until:
            return
        on.act(pause)
