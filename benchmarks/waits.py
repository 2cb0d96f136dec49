"""Measures how long callers of Postgres, of Redis and of a webhook wait while it fails."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import asyncpg
from benchmarks import durations, redis_waits
from benchmarks.durations import Case, Times, on_a_loop, refused, require, seconds_of
from tests.contracts.ledgers import LONG_LEASE, draft
from tests.integration.job_ledgers import NO_WORKER, ledger_in, work
from tests.integration.notifications import QUEUE
from tests.integration.postgres_clients import config_of, migrated, opened, use
from tests.integration.test_postgres_job_refusals import system
from tests.integration.test_postgres_notifier import listening, notifier_in
from tests.integration.webhooks import delivery, hang
from tests.servers.fault_proxy import DROP, FaultProxy
from tests.servers.postgres import Database, postgres_server
from tests.servers.receiver import receiver
from tests.servers.waiting import until
from tests.system.jobs import JOBS
from tests.system.workers import api, environment_of

from viralfx.domain.webhooks.url import WebhookUnavailableError
from viralfx.jobs.notifier import JobNotification, NotificationNotSentError
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresDatabase
from viralfx.postgres.connections import run_query
from viralfx.postgres.database import Lease
from viralfx.postgres.pool import PING_AFTER

READING = (
    "Each round has servers of its own. A silent drop is that of a firewall which forgot all open"
    " connections: nothing comes over them, and new ones work. Clients of Redis have the default"
    " limits and retries. Those of Postgres wait up to 5 s for a connection, and where connections"
    " are dropped a statement may take 60 s. The first write after the loss of a primary is the"
    " first that is accepted, of one each 20 ms without retries, and of a single one with them."
    " These Sentinels consider a server down after 0.5 s; by default it is 30 s. Jobs wait from"
    " when they are due to their start, with JOB_POLL_INTERVAL of 1 s."
)
STATEMENT_TIMEOUT = 3.0
_SLEEPS = (
    "select 1 from pg_stat_activity where query like 'select pg\\_sleep%' and state = 'active'"
)


@contextmanager
def _database() -> Iterator[Database]:
    with postgres_server() as server:
        yield Database(server, server.create_database())


# -- Postgres --------------------------------------------------------------------------------


async def _idle(pool: PostgresDatabase, proxy: FaultProxy) -> None:
    """Drop all connections once the pool's connections are idle for long."""
    await until(lambda: pool.total_connections >= pool.config.settings.pool_min)
    await asyncio.sleep(PING_AFTER)
    proxy.mode = DROP


async def _write(connection: Lease) -> None:
    await connection.execute("create table if not exists rows (number int)")


async def _dropped() -> Times:
    with _database() as database, FaultProxy(database.server.port) as proxy:
        more = {"pool_min": 3, "pool_max": 3, "statement_timeout": 60.0}
        config = await migrated(config_of(database, through=proxy, **more))
        async with opened(config) as pool:
            ledger = PostgresJobLedger(pool)
            requests: dict[str, Callable[[], Awaitable[object]]] = {
                "accepts": lambda: ledger.accept([draft()]),
                "reads": lambda: ledger.get(NO_WORKER),
                "pages": ledger.page,
                "writes": lambda: pool.execute_with_retry(_write),
            }
            times = {}
            for name, request in requests.items():
                await _idle(pool, proxy)
                first = await seconds_of(request())
                times[f"Postgres, silent drop: the first two {name}"] = first + await seconds_of(
                    request()
                )
            proxy.mode = DROP
            retried = await seconds_of(pool.execute_with_retry(_write))
    return {**times, "Postgres, silent drop: a write on a connection in use": retried}


async def _cut() -> Times:
    with _database() as database:

        def asleep() -> bool:
            return bool(database.execute(_SLEEPS))

        async with opened(config_of(database, statement_timeout=60.0)) as pool:
            connection = await pool.connect("own")
            running = asyncio.create_task(
                run_query(connection, connection.execute("select pg_sleep(60)"))
            )
            await until(asleep)
            began = time.monotonic()
            running.cancel()
            await asyncio.wait({running})
            caller = time.monotonic() - began
            await until(lambda: not asleep())
            server = time.monotonic() - began
        async with opened(config_of(database, statement_timeout=STATEMENT_TIMEOUT)) as pool:
            began = time.monotonic()
            with refused(asyncpg.PostgresError, TimeoutError):
                async with pool.acquire() as held:
                    await held.execute("select pg_sleep(30)")
            await until(lambda: not asleep())
            limited = time.monotonic() - began
            await use(pool)
    return {
        "Postgres, a cancelled caller": caller,
        "Postgres, a cancelled statement ends in the server": server,
        "Postgres, a statement of 30 s with DB_STATEMENT_TIMEOUT of 3 s": limited,
    }


async def _frozen_notifier() -> Times:
    with postgres_server() as server:

        async def ignore(_: JobNotification) -> None:
            pass

        async with (
            notifier_in(server, notifier={"silence": 0.2}) as notifier,
            listening(notifier, ignore),
        ):
            await asyncio.to_thread(server.freeze)
            try:
                await until(lambda: not notifier.is_connected(QUEUE))
                began = time.monotonic()
                with refused(NotificationNotSentError, OSError):
                    await notifier.notify(JobNotification(QUEUE, ("a",)))
                took = time.monotonic() - began
            finally:
                await asyncio.to_thread(server.thaw)
    return {"Postgres frozen: a notification": took}


async def _locked() -> Times:
    begin = asyncio.Event()

    async def wait(value: object) -> object:
        await begin.wait()
        return value

    with _migrated() as database:
        async with system(database, task=wait, call_timeout=2.0) as running:
            bad, *_ = await running.submit("bad", *"abcdef")
            other = await running.submit(*"abc", queue="other")
            await running.until(lambda: running.worker.active == 10)
            holder = await asyncpg.connect(database.url)
            try:
                async with holder.transaction():
                    await holder.execute(
                        "select from viralfx_ops.viralfx_jobs where id = $1 for update", bad
                    )
                    began = time.monotonic()
                    begin.set()
                    await running.final(*other)
                    others = time.monotonic() - began
                    await running.final(*await running.submit(*"ghi"))
                    laters = time.monotonic() - began
            finally:
                await holder.close()
            await running.final(bad)
    return {
        "Postgres, a locked job: those of another queue": others,
        "Postgres, a locked job: later ones of its queue": laters,
    }


@contextmanager
def _migrated() -> Iterator[Database]:
    with _database() as database:
        environment_of(database)
        yield database


async def _heartbeats() -> Times:
    over, begun = asyncio.Event(), 0

    async def slow(connection: Lease) -> bytes:
        nonlocal begun
        begun += 1
        await connection.execute("select 1")
        await over.wait()
        return b"1"

    with _migrated() as database:
        async with ledger_in(database, pool_max=3) as ledger:
            await work(ledger)
            await ledger.accept([draft() for _ in range(20)])
            claims = await ledger.claim("default", "w", 20)
            ids = [claim.id for claim in claims]
            async with asyncio.TaskGroup() as group:
                for claim in claims:
                    group.create_task(ledger.settle_with_effect(claim, slow))
                await until(lambda: begun)
                times = sorted(
                    [
                        await seconds_of(ledger.register("w", ["default"], LONG_LEASE, ids))
                        for _ in range(50)
                    ]
                )
                over.set()
    return {
        "Postgres, 20 long effects: 90 % of the heartbeats": times[45],
        "Postgres, 20 long effects: each heartbeat": times[-1],
    }


def _without_a_database() -> Times:
    with postgres_server() as server, api(environment_of(server), fresh=True) as service:
        server.stop()
        began = time.monotonic()
        reply = service.get(JOBS, method="POST", json_body={"task": "parcels.echo"}, timeout=60)
        took = time.monotonic() - began
    require(reply.status == 503, f"the API answers {reply.status}")
    return {"Postgres stopped: the API answers 503": took}


# -- webhooks --------------------------------------------------------------------------------


async def _webhook() -> Times:
    async with receiver() as receiving:
        receiving.respond_with(hang)
        url = f"http://127.0.0.1:{receiving.port}/"
        began = time.monotonic()
        with refused(WebhookUnavailableError):
            await delivery(url.rstrip("/"), timeout=0.4).deliver(url, message_id="i", body=b"{}")
        silent = time.monotonic() - began

        async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            await hang(reader, writer)

        receiving.respond_with(endless)
        delivering = delivery(url.rstrip("/")).deliver(url, message_id="i", body=b"{}")
        headed = await seconds_of(delivering)
    return {
        "webhook, no answer within a limit of 0.4 s": silent,
        "webhook, a body that never comes": headed,
    }


CASES = {
    "Postgres dropped silently": on_a_loop(
        {
            **{
                f"Postgres, silent drop: the first two {name}": 3.0
                for name in ("accepts", "reads", "pages", "writes")
            },
            "Postgres, silent drop: a write on a connection in use": 3.0,
        },
        _dropped,
    ),
    "Postgres statements cut": on_a_loop(
        {
            "Postgres, a cancelled caller": 1.0,
            "Postgres, a cancelled statement ends in the server": 2.0,
            "Postgres, a statement of 30 s with DB_STATEMENT_TIMEOUT of 3 s": 4.5,
        },
        _cut,
    ),
    "Postgres frozen": on_a_loop({"Postgres frozen: a notification": 5.0}, _frozen_notifier),
    "Postgres job locked": on_a_loop(
        {
            "Postgres, a locked job: those of another queue": 1.0,
            "Postgres, a locked job: later ones of its queue": 2.0,
        },
        _locked,
    ),
    "Postgres effects": on_a_loop(
        {
            "Postgres, 20 long effects: 90 % of the heartbeats": 0.5,
            "Postgres, 20 long effects: each heartbeat": 3.0,
        },
        _heartbeats,
    ),
    "Postgres stopped": Case({"Postgres stopped: the API answers 503": 12.0}, _without_a_database),
    **redis_waits.CASES,
    "webhook": on_a_loop(
        {
            "webhook, no answer within a limit of 0.4 s": 2.0,
            "webhook, a body that never comes": 3.0,
        },
        _webhook,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    return durations.main("bench-waits", "waits.py", __doc__, CASES, READING, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
