"""procrastinate on Postgres, with psycopg's fast implementation."""

from benchmarks.jobs.counter import ran
from benchmarks.jobs.peer import SLOTS, database_url
from procrastinate import App, PsycopgConnector

DISTRIBUTIONS = ("procrastinate", "psycopg", "psycopg-binary")
POOL = 20
_OPTIONS = f"--log-level warning worker --concurrency {SLOTS}"
WORKER = (
    *("-m", "benchmarks.jobs.with_uvloop", "procrastinate"),
    *("--app", "benchmarks.jobs.peers.procrastinate_postgres.app", *_OPTIONS.split()),
)
UNFINISHED = "select count(*) as count from procrastinate_jobs where status in ('todo', 'doing')"

app = App(connector=PsycopgConnector(conninfo=database_url(), max_size=POOL))


@app.task(name="do_nothing")
async def do_nothing() -> None:
    """Do nothing."""
    ran()


class Producer:
    """Defers one job by one statement."""

    gathers = True

    async def prepare(self) -> None:
        """Connect and make the schema."""
        await app.open_async()
        await app.schema_manager.apply_schema_async()

    async def enqueue(self) -> None:
        """Insert one job."""
        await do_nothing.defer_async()

    async def unfinished(self) -> int:
        """Count jobs that wait or run."""
        row = await app.connector.execute_query_one_async(UNFINISHED)
        return int(row["count"])

    async def close(self) -> None:
        """Disconnect."""
        await app.close_async()
