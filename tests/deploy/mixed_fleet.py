"""Runs processes of version 0.2.0 beside those of this checkout: ``just mixed-fleet``.

Both versions share a Postgres, a Redis and their tokens, as during a roll-out. The sources of the
old one come from the history of this repository, so a shallow clone cannot run it; its packages are
those of the present environment. ``--record`` publishes the results.
"""

import argparse
import base64
import hashlib
import hmac
import io
import secrets
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.deploy.distribution import ROOT
from tests.servers.postgres import PostgresServer, postgres_server
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import wait_until
from tests.system import service as program
from tests.system.jobs import JOBS
from tests.system.service import Reply, Service
from tests.system.workers import api, worker

OLD = "d8d2567"
"""The last commit of version 0.2.0."""
TASK, HOOK = "parcels.ship", "notifications.webhook"
ORIGIN = {"Origin": "http://test"}
"""That of each request, whose Host is ``test``."""
SESSION = "/health/ui/session"


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _webhook_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


API_TOKEN, MANAGEMENT_TOKEN = secrets.token_hex(32), secrets.token_hex(32)
API, MANAGEMENT, WRONG = (_bearer(each) for each in (API_TOKEN, MANAGEMENT_TOKEN, "wrong"))
SHARED, OWN = _webhook_secret(), _webhook_secret()
"""The secret of version 0.2, and the one from which keys of receivers are derived."""


@dataclass(frozen=True)
class Versions:
    """The variables of the processes of each version."""

    old: Mapping[str, str]
    new: Mapping[str, str]


@dataclass(frozen=True)
class Received:
    """A webhook as it came."""

    headers: Mapping[str, str]
    body: bytes

    def is_signed_by(self, secret: str) -> bool:
        """Verify as the specification of Standard Webhooks does, by one of the signatures."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        prefix = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode()
        digest = hmac.digest(key, prefix + self.body, hashlib.sha256)
        expected = f"v1,{base64.b64encode(digest).decode()}"
        return expected in self.headers["webhook-signature"].split()


@contextmanager
def receiver() -> Iterator[tuple[str, list[Received]]]:
    """Run a receiver of webhooks; yield its address and the list of those that come."""
    received: list[Received] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            names = {name.lower(): value for name, value in self.headers.items()}
            received.append(Received(names, body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


def checkout(folder: Path) -> dict[str, str]:
    """Write the old sources into a folder; return the variables by which Python takes them."""
    archive = ["git", "archive", OLD, "src", "tests/job_tasks.py"]
    packed = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    variables = {"PYTHONPATH": f"{folder / 'src'}:{folder}", "PYTHONSAFEPATH": "1"}
    show = [sys.executable, "-c", "import viralfx, tests.job_tasks as t; print(viralfx, t)"]
    environment = {**program.clean_environment(), **variables}
    shown = subprocess.run(show, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.count(str(folder)) == 2, shown
    return variables


def versions(
    postgres: PostgresServer, redis: RedisServer, hooks: str, sources: Mapping[str, str]
) -> Versions:
    """Return the variables of both versions: those of a roll-out as the documents tell it."""
    both = {
        "ENVIRONMENT": "production",
        "HOST": "127.0.0.1",
        "DATABASE_URL": postgres.url(),
        "REDIS_HOST": redis.host,
        "REDIS_PORT": str(redis.port),
        "API_TOKEN": API_TOKEN,
        "MANAGEMENT_TOKEN": MANAGEMENT_TOKEN,
        "TASK_MODULES": "tests.job_tasks",
        "WEBHOOK_ALLOWED_HOSTS": hooks,
    }
    old = {**both, **sources, "WEBHOOK_SECRET": SHARED}
    return Versions(old, {**both, "WEBHOOK_SECRET": OWN, "WEBHOOK_SHARED_SECRET": SHARED})


def migrate(environment: Mapping[str, str]) -> None:
    """Apply the migrations of a version."""
    migrated = program.command("migrate", environment=environment, fresh=True)
    assert migrated.returncode == 0, migrated.stderr


def submit(service: Service, task: str, payload: object, key: str | None = None) -> Reply:
    """Submit a job, with an idempotency key if there is one."""
    headers = API if key is None else {**API, "Idempotency-Key": key}
    body = {"task": task, "payload": payload}
    return service.get(JOBS, method="POST", json_body=body, headers=headers)


def parcel(service: Service, weight: int, key: str | None = None) -> Reply:
    """Submit a job that any worker can run."""
    return submit(service, TASK, {"weight": weight, "to": []}, key)


def completes(service: Service, accepted: Reply) -> bool:
    """Return True once a job has completed with its first attempt. Raises if it does not."""

    def ended() -> dict[str, object] | None:
        shown: dict[str, object] = service.get(
            f"{JOBS}/{accepted.json()['id']}", headers=API
        ).json()
        return shown if shown["state"] in {"completed", "failed"} else None

    found = wait_until(ended, seconds=60, what="the end of a job") or {}
    return (found["state"], found["attempts"]) == ("completed", 1)


def log_in(service: Service) -> dict[str, str]:
    """Log in to the console, and return the header of the session."""
    body = {"token": MANAGEMENT_TOKEN}
    reply = service.get(SESSION, method="POST", json_body=body, headers=ORIGIN)
    assert reply.status == 204, reply
    return {"Cookie": reply.headers["set-cookie"].partition(";")[0]}


def is_logged_in(service: Service, cookie: Mapping[str, str]) -> bool:
    """Return True if a session is valid at a process."""
    return bool(service.get(SESSION, headers=cookie).json()["loggedIn"])


Rows = dict[str, bool]


def check_tokens(old: Service, new: Service) -> Rows:
    """Ask both with each token, and with a wrong one."""
    statuses = {
        who: [each.get(path, headers=headers).status for each in (old, new)]
        for who, path, headers in (
            ("API", JOBS, API),
            ("API, wrong", JOBS, WRONG),
            ("management", "/health/shutdown", MANAGEMENT),
            ("management, wrong", "/health/shutdown", WRONG),
        )
    }
    return {
        "`API_TOKEN` opens the jobs API of both": statuses["API"] == [200, 200],
        "`MANAGEMENT_TOKEN` opens the operations endpoints of both": statuses["management"]
        == [200, 200],
        "a wrong token is 401 at both": statuses["API, wrong"] + statuses["management, wrong"]
        == [401] * 4,
    }


def check_keys(old: Service, new: Service, before: Reply) -> Rows:
    """Submit again with the keys of the other version; ``before`` has the key ``before``."""
    first = parcel(new, 2, "new")
    again = {
        "old": parcel(new, 1, "before"),
        "new": parcel(old, 2, "new"),
    }
    conflicts = [parcel(each, 3, key).status for each in (old, new) for key in ("before", "new")]
    return {
        "a key of an old process finds its job at a new one": (
            again["old"].status == 200 and again["old"].json()["id"] == before.json()["id"]
        ),
        "a key of a new process finds its job at an old one": (
            again["new"].status == 200 and again["new"].json()["id"] == first.json()["id"]
        ),
        "another payload with a used key is 409 at both": conflicts == [409] * 4,
    }


def check_jobs(old: Service, new: Service, fleet: Versions, hooks: str) -> Rows:
    """Let the workers of each version run the jobs that the other one has accepted."""
    rows: Rows = {}
    with worker(fleet.old, fresh=True):
        rows["an old worker runs the jobs of a new process"] = all(
            completes(new, parcel(new, weight)) for weight in range(20)
        )
        hook = submit(old, HOOK, {"url": hooks, "type": "of.the.old", "data": {}})
        assert completes(old, hook)
    waiting = [parcel(old, weight) for weight in range(20)]
    hook = submit(old, HOOK, {"url": hooks, "type": "of.the.new", "data": {}})
    with worker(fleet.new, fresh=True):
        rows["a new worker runs the jobs of an old process"] = all(
            completes(old, each) for each in waiting
        )
        assert completes(new, hook)
    with worker(fleet.old, fresh=True), worker(fleet.new, fresh=True):
        mixed = [parcel(each, weight) for weight in range(50) for each in (old, new)]
        rows["workers of both run each job of both once"] = all(
            completes(new, each) for each in mixed
        )
    return rows


def check_webhooks(received: list[Received], hooks: str, fleet: Versions) -> Rows:
    """Verify the webhook of each worker by the keys that its receiver may have."""
    printed = program.command("webhook-key", hooks, environment=fleet.new, fresh=True)
    own = printed.stdout.strip()
    by_type = {each: [one for one in received if each.encode() in one.body] for each in _TYPES}
    (of_old,), (of_new,) = by_type["of.the.old"], by_type["of.the.new"]
    return {
        "a receiver of 0.2 verifies webhooks of both workers": of_old.is_signed_by(SHARED)
        and of_new.is_signed_by(SHARED),
        "a receiver with its own key verifies those of new workers": of_new.is_signed_by(own),
        "and no webhook of old ones": not of_old.is_signed_by(own),
    }


_TYPES = ("of.the.old", "of.the.new")


def check_sessions(old: Service, new: Service, before: Mapping[str, str]) -> Rows:
    """Use a session of the old version, which began before the migration, at both."""
    return {
        "a session of an old process is valid at a new one": is_logged_in(new, before),
        "it stays valid at old ones": is_logged_in(old, before),
        "a session of a new process is valid there": is_logged_in(new, log_in(new)),
        "a forged session is valid at neither": not any(
            is_logged_in(each, {"Cookie": f"{before['Cookie'][:-4]}0000"}) for each in (old, new)
        ),
    }


def run() -> tuple[Rows, bool]:
    """Return what holds, and whether a session of a new process is valid at an old one."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="viralfx-")))
        postgres = stack.enter_context(postgres_server())
        redis = stack.enter_context(redis_server())
        hooks, received = stack.enter_context(receiver())
        fleet = versions(postgres, redis, hooks, checkout(folder))
        migrate(fleet.old)
        old = stack.enter_context(api(fleet.old, "--no-worker", fresh=True))
        before, session = parcel(old, 1, "before"), log_in(old)
        migrate(fleet.new)
        new = stack.enter_context(api(fleet.new, "--no-worker", fresh=True))
        rows = {
            "old processes stay ready on the new schema": old.status("/health/ready") == 200,
            **check_tokens(old, new),
            **check_keys(old, new, before),
            **check_jobs(old, new, fleet, hooks),
            **check_webhooks(received, hooks, fleet),
            **check_sessions(old, new, session),
        }
        return rows, is_logged_in(old, log_in(new))


def main() -> int:
    """Run both versions, print or publish the results, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just mixed-fleet", description=__doc__)
    parser.add_argument("--record", action="store_true", help="publish the results in RESULTS.md")
    options = parser.parse_args()
    with redirect_stdout(sys.stderr):  # the output of the processes
        rows, valid_at_old = run()
    target = Target(
        what="statements that do not hold",
        measured=sum(not holds for holds in rows.values()),
        limit=0,
        at_least=False,
    )
    lines = [
        *circumstances(
            command("mixed-fleet"),
            f"Version 0.2.0 is commit {OLD}; both have the packages above, one Postgres, one Redis",
        ),
        "",
        *table(
            ("during a roll-out", "holds"),
            [(what, "yes" if holds else "**no**") for what, holds in rows.items()],
        ),
        "",
        "A session of a new process at an old one: "
        + ("valid." if valid_at_old else "the page asks for the token."),
        "",
        *target_table([target]),
    ]
    return publish("mixed_fleet.py", lines, [target], check=True, record=options.record)


if __name__ == "__main__":
    sys.exit(main())
