"""``viralfx.testing``: the jobs of an application in its own tests."""

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from docs.examples import signup as example
from litestar import Litestar, post
from litestar.params import JSONBody
from litestar.testing import AsyncTestClient, TestClient
from sqlalchemy import Connection, create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from viralfx import JobContext, OperationsConfig, OperationsPlugin, task
from viralfx.core.errors import ConfigurationError, TransactionError
from viralfx.core.ids import new_job_id
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import JobDraft
from viralfx.jobs.schedule import Schedule
from viralfx.settings import Secret, Settings
from viralfx.testing import (
    Jobs,
    JobsOfTest,
    assert_submitted,
    run_pending,
    submitted,
    viralfx_jobs,
)

__all__ = ["viralfx_jobs"]

Hold = Callable[[OperationsPlugin], JobsOfTest]

sent: list[str] = []


@task("mail.send")
async def send(to: str, context: JobContext) -> str:
    """Fail at the first attempt, if the address asks for it."""
    if to.startswith("flaky") and context.attempt == 1:
        raise ConnectionError("planted")
    if to.startswith("broken"):
        raise ConnectionError("no such host")
    sent.append(to)
    return to.upper()


@task("mail.remind")
def remind(to: str) -> None:
    """Run in a thread."""
    sent.append(f"reminder for {to}")


@task("mail.all")
async def send_all(addresses: list[str], context: JobContext) -> int:
    """Send to the first address, and leave the others to a job that follows."""
    first, *others = addresses
    sent.append(first)
    if others:
        await context.submit("mail.all", others, key=f"after {context.id}")
    return len(others)


@task("mail.endless")
async def endless(_: None) -> None:
    """Submit itself again."""
    await plugin.jobs.submit("mail.endless", None)


@task("mail.charge", transactional=True)
async def charge(cents: int, context: JobContext) -> None:
    """Submit a job, then use the connection."""
    await context.submit("mail.send", "ada")
    await context.connection.execute("INSERT INTO charges VALUES ($1)", cents)


@post("/signup", status_code=202)
async def signup(data: JSONBody[dict[str, str]]) -> None:
    """Submit two jobs, one of them for tomorrow."""
    await plugin.jobs.submit("mail.send", data["to"])
    await plugin.jobs.submit(
        "mail.remind", data["to"], run_at=datetime.now(UTC) + timedelta(days=1)
    )


def create() -> OperationsPlugin:
    """Return a plugin with the tasks of this module."""
    return OperationsPlugin(
        OperationsConfig(settings=Settings(), tasks=[send, remind, send_all, endless, charge])
    )


plugin = create()
app = Litestar([signup], plugins=[plugin], logging_config=None)


@pytest.fixture(autouse=True)
def _nothing_sent() -> None:
    sent.clear()


def test_jobs_of_a_plain_function() -> None:
    """Without an application and without an event loop, in several runs after each other."""
    plugin = create()
    asyncio.run(_submit(plugin, "mail.send", "ada"))
    assert_submitted(plugin, "mail.send", payload="ada")
    first = run_pending(plugin)
    asyncio.run(_submit(plugin, "mail.send", "bob"))
    second = run_pending(plugin)

    assert isinstance(first, Jobs)
    assert not inspect.isawaitable(first)
    assert not inspect.isawaitable(submitted(plugin))
    assert [(job.payload, job.state, job.result) for job in (*first, *second)] == [
        ("ada", "completed", "ADA"),
        ("bob", "completed", "BOB"),
    ]
    assert [job.payload for job in submitted(plugin)] == ["ada", "bob"]
    assert sent == ["ada", "bob"]


async def test_jobs_of_a_coroutine() -> None:
    """Both functions can be awaited."""
    plugin = create()
    await _submit(plugin, "mail.remind", "ada")
    ran = await run_pending(plugin)

    assert (await submitted(plugin))[0] == ran[0]
    assert sent == ["reminder for ada"]


def test_jobs_of_an_application_under_its_test_client(viralfx_jobs: Hold) -> None:
    """They wait for the test, and run on the event loop of the application."""
    jobs = viralfx_jobs(plugin)
    with TestClient(app) as client:
        assert client.post("/signup", json={"to": "ada"}).status_code == 202
        assert sent == []
        assert [job.task for job in jobs.submitted()] == ["mail.send", "mail.remind"]
        _ = jobs.run_pending()
        assert sent == ["ada"]
        _ = jobs.run_pending(until=timedelta(hours=23))
        assert sent == ["ada"]
        began = time.monotonic()
        _ = jobs.run_pending(until=timedelta(hours=2))
        assert time.monotonic() - began < 60
        assert sent == ["ada", "reminder for ada"]


async def test_a_coroutine_beside_the_event_loop_of_the_application(viralfx_jobs: Hold) -> None:
    """The test client runs the application in a thread; the jobs run there, too."""
    jobs = viralfx_jobs(plugin)
    with TestClient(app) as client:
        await asyncio.to_thread(client.post, "/signup", json={"to": "ada"})
        (ran,) = await jobs.run_pending()
        assert [job.state for job in jobs.submitted()] == ["completed", "waiting"]

    assert ran.payload == "ada"


def test_the_example_of_the_documents(viralfx_jobs: Hold) -> None:
    """A dependency from the lifespan, and middleware."""
    jobs = viralfx_jobs(example.plugin)
    with TestClient(example.app) as client:
        client.post("/signup", json={"email": "ada@example.org"})
        jobs.assert_submitted("signup.welcome", payload="ada@example.org", count=1)
        (job,) = jobs.run_pending(raise_errors=True)
        sent = example.app.state.mailer.sent

    assert (job.state, job.result) == ("completed", "ada@example.org")
    assert sent == ["ada@example.org: welcome, ada"]


async def test_jobs_beside_the_worker_of_the_application(viralfx_jobs: Hold) -> None:
    """Without the fixture the application runs its jobs itself; run_pending waits for them."""
    async with AsyncTestClient(app) as client:
        await client.post("/signup", json={"to": "ada"})
        _ = await run_pending(plugin, until=timedelta(days=2))
        jobs = submitted(plugin)

    assert [(job.task, job.state) for job in jobs] == [
        ("mail.send", "completed"),
        ("mail.remind", "completed"),
    ]
    assert sorted(sent) == ["ada", "reminder for ada"]
    assert viralfx_jobs(plugin).submitted() == []


async def test_jobs_of_schedules_were_not_submitted(viralfx_jobs: Hold) -> None:
    """They run like all others; those that they submit are there."""
    jobs = viralfx_jobs(plugin)
    memory = plugin.assembly.jobs.memory
    assert memory is not None
    await memory.declare_schedules([Schedule(task="mail.all", cron="0 3 * * *")], 60.0)
    scheduled = JobDraft(
        id=new_job_id(),
        queue="default",
        task="mail.all",
        payload=b'["ada", "bob"]',
        run_at=memory.now(),
    )
    accepted = await memory.accept_scheduled(scheduled)
    await plugin.jobs.submit("mail.send", "cleo")
    ran = await jobs.run_pending()
    found = await jobs.submitted()

    assert accepted is not None
    assert accepted.created
    assert sorted(sent) == ["ada", "bob", "cleo"]
    assert len(ran) == 3
    assert [(job.task, job.payload) for job in found] == [
        ("mail.send", "cleo"),
        ("mail.all", ["bob"]),
    ]
    assert scheduled.id in memory._scheduled
    await memory.prune(0.0)
    assert not memory._scheduled


def test_a_retry_does_not_wait() -> None:
    """Time moves on by its delay, and no further."""
    plugin = create()
    asyncio.run(_submit(plugin, "mail.send", "flaky"))
    asyncio.run(_submit(plugin, "mail.send", "broken"))
    began = time.monotonic()
    ran = run_pending(plugin)

    assert time.monotonic() - began < 60
    assert [(job.payload, job.state, job.attempts) for job in ran] == [
        ("flaky", "completed", 1),
        ("broken", "failed", 3),
    ]
    assert ran[1].error is not None
    assert ran[1].error.message == "no such host"


def test_a_task_that_cancels_itself_fails() -> None:
    """As under a worker; the test that runs it is not cancelled."""

    @task("mail.withdraw", retry=None)
    async def withdraw(_: None) -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await asyncio.sleep(0)

    plugin = OperationsPlugin(OperationsConfig(tasks=[withdraw]))
    asyncio.run(_submit(plugin, "mail.withdraw", None))
    (job,) = run_pending(plugin)

    assert job.error is not None
    assert (job.state, job.error.code) == ("failed", "error")
    assert job.error.message == "the task raised CancelledError without being cancelled"


def test_an_error_is_raised_on_request() -> None:
    """It is the exception of the task itself."""
    plugin = create()
    asyncio.run(_submit(plugin, "mail.send", "broken"))
    with pytest.raises(ConnectionError, match="no such host"):
        _ = run_pending(plugin, raise_errors=True)


def test_an_assertion_names_what_was_submitted() -> None:
    """The payloads of the task, or the other tasks."""
    plugin = create()
    asyncio.run(_submit(plugin, "mail.send", "ada"))
    with pytest.raises(AssertionError, match=r"0 jobs of 'mail.send' with 'bob'.*\['ada'\]"):
        assert_submitted(plugin, "mail.send", payload="bob")
    with pytest.raises(AssertionError, match=r"0 jobs of 'mail.remind'.*\['mail.send'\]"):
        assert_submitted(plugin, "mail.remind")
    with pytest.raises(AssertionError, match=r"1 jobs of 'mail.send' were submitted, not 2"):
        assert_submitted(plugin, "mail.send", count=2)
    (job,) = assert_submitted(plugin, "mail.send", count=1)
    assert job.payload == "ada"


def test_a_task_is_given_by_its_function(viralfx_jobs: Hold) -> None:
    """It names the task, as in a submission. An application in place of its plugin is refused."""
    plugin = create()
    jobs = viralfx_jobs(plugin)
    asyncio.run(_submit(plugin, "mail.send", "ada"))
    unknown: Any = Litestar([], plugins=[plugin])

    assert jobs.assert_submitted(send, payload="ada") == jobs.submitted(send)
    assert submitted(plugin, remind) == []
    with pytest.raises(AssertionError, match=r"0 jobs of 'mail.remind'"):
        jobs.assert_submitted(remind)
    for call in (viralfx_jobs, submitted, run_pending):
        with pytest.raises(TypeError, match=r"pass the plugin, not Litestar$"):
            call(unknown)


def test_a_chain_of_jobs_runs_to_its_end(viralfx_jobs: Hold) -> None:
    """A task submits the next job; all of them run in one call."""
    jobs = viralfx_jobs(plugin)
    asyncio.run(_submit(plugin, "mail.all", ["ada", "bob", "eve"]))

    assert [job.result for job in jobs.run_pending()] == [2, 1, 0]
    assert sent == ["ada", "bob", "eve"]


def test_an_endless_chain_of_jobs_is_an_error(
    viralfx_jobs: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the task."""
    monkeypatch.setattr("viralfx.testing.jobs.MAX_EXECUTIONS", 50)
    jobs = viralfx_jobs(plugin)
    asyncio.run(_submit(plugin, "mail.endless", None))
    with pytest.raises(RuntimeError, match=r"the last one of task 'mail.endless'"):
        _ = jobs.run_pending()


def test_a_transactional_task_needs_a_connection(viralfx_jobs: Hold) -> None:
    """Its error says so, and none of the jobs that it submitted exists."""
    jobs = viralfx_jobs(plugin)
    asyncio.run(_submit(plugin, "mail.charge", 5))
    (job,) = jobs.run_pending()

    assert (job.state, job.attempts) == ("failed", 3)
    assert job.error is not None
    assert "transactional=True needs DATABASE_URL" in job.error.message
    assert len(jobs.submitted()) == 1


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_jobs_in_a_transaction_of_sqlalchemy(viralfx_jobs: Hold, kind: str) -> None:
    """They are there after its commit, without those of a savepoint that was rolled back."""
    jobs = viralfx_jobs(plugin)
    engine = create_engine("sqlite://")

    def submit(target: Session | Connection, to: str) -> None:
        submitting = plugin.jobs.submit("mail.send", to, key=to, connection=target)
        assert asyncio.run(_created(submitting))

    with Session(engine) if kind == "session" else engine.connect() as target:
        submit(target, "rolled back")
        target.rollback()
        submit(target, "ada")
        with target.begin_nested():
            submit(target, "bob")
        savepoint = target.begin_nested()
        submit(target, "eve")
        with target.begin_nested():
            submit(target, "mallory")
        savepoint.rollback()
        assert jobs.submitted() == []
        target.commit()
        assert [job.payload for job in jobs.submitted()] == ["ada", "bob"]
        submit(target, "rolled back")
        assert [job.payload for job in jobs.run_pending()] == ["ada", "bob"]
        target.rollback()
        submit(target, "closed")
    with Session(engine) if kind == "session" else engine.connect() as target:
        target.commit()
    engine.dispose()

    assert [job.payload for job in jobs.submitted()] == ["ada", "bob"]


def test_a_session_that_joins_a_transaction_of_the_test(viralfx_jobs: Hold) -> None:
    """Its commit counts, although the test rolls everything back."""
    jobs = viralfx_jobs(plugin)
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            for end in (session.rollback, session.commit):
                asyncio.run(_created(plugin.jobs.submit("mail.send", "ada", connection=session)))
                end()
        assert len(jobs.submitted()) == 1
        outer.rollback()
    engine.dispose()


def test_the_job_of_a_dead_worker_runs() -> None:
    """As soon as the lease of the worker has ended."""
    plugin = create()
    ledger = plugin.assembly.jobs.ledger

    async def claim() -> None:
        await _submit(plugin, "mail.send", "ada")
        await ledger.register("dead", ["default"], 0.05)
        assert len(await ledger.claim("default", "dead", 1)) == 1

    asyncio.run(claim())
    assert [job.state for job in run_pending(plugin)] == ["completed"]


def test_a_handler_submits_in_its_session() -> None:
    """Also without the fixture: the worker runs the job of a commit, and no other one exists."""
    plugin, engine = create(), create_engine("sqlite://", poolclass=NullPool)

    @post("/kept")
    async def kept() -> None:
        with Session(engine) as session:
            await plugin.jobs.submit("mail.send", "ada", connection=session)
            session.commit()

    @post("/dropped")
    async def dropped() -> None:
        with Session(engine) as session:
            await plugin.jobs.submit("mail.send", "eve", connection=session)

    app = Litestar([kept, dropped], plugins=[plugin], logging_config=None)
    with TestClient(app) as client:
        statuses = [client.post(path).status_code for path in ("/dropped", "/kept")]
        _ = run_pending(plugin)
        jobs = submitted(plugin)
    engine.dispose()

    assert statuses == [201, 201]
    assert [(job.payload, job.state) for job in jobs] == [("ada", "completed")]
    assert sent == ["ada"]


def test_another_object_is_no_connection() -> None:
    """The error names what can report its commit."""
    with pytest.raises(TransactionError, match=r"a connection of asyncpg, not builtins\.object"):
        asyncio.run(_created(create().jobs.submit("mail.send", "ada", connection=object())))


@pytest.mark.parametrize(
    ("until", "error"),
    [(60, TypeError), (datetime.now(UTC).replace(tzinfo=None), ValueError)],
    ids=["int", "naive"],
)
def test_a_wrong_moment_is_refused(until: Any, error: type[Exception]) -> None:
    """With the name of the parameter."""
    with pytest.raises(error, match="run_pending: until must"):
        _ = run_pending(create(), until=until)


def test_a_run_leaves_no_thread() -> None:
    """Although one of its tasks ran in a thread."""
    plugin = create()
    before = set(threading.enumerate())
    asyncio.run(_submit(plugin, "mail.remind", "ada"))
    assert len(run_pending(plugin)) == 1
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("job-"):
            thread.join(20)
            assert not thread.is_alive()


def test_jobs_in_a_database_are_refused() -> None:
    """A test would run the jobs of others."""
    settings = Settings(database_url=Secret("postgresql://user@nowhere.invalid/shop"))
    plugin = OperationsPlugin(OperationsConfig(settings=settings, tasks=[send]))
    for call in (submitted, run_pending):
        with pytest.raises(ConfigurationError, match="the jobs are in the database"):
            _ = call(plugin)


async def _submit(plugin: OperationsPlugin, name: str, payload: object) -> None:
    await plugin.jobs.submit(name, payload)


async def _created(submitting: Awaitable[Accepted]) -> bool:
    return (await submitting).created
