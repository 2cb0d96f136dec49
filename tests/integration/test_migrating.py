"""The examples of docs/migrating.md and those for taskiq in docs/jobs.md run as they are shown."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.integration.taskiq_brokers import set_environment
from tests.servers.postgres import Database

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.jobs.model import JobState

ROOT = Path(__file__).parents[2]
PEERS = {
    "From Celery": "celery_redis",
    "From SAQ": "saq_redis",
    "From arq": "arq_redis",
    "From taskiq": "taskiq_stream",
    "From procrastinate": "procrastinate_postgres",
}
SECONDS = 20.0


def sections(document: str) -> Iterator[tuple[str, str]]:
    """Yield the headings of a document, and the text below each."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    yield from re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def executed(source: str) -> dict[str, Any]:
    """Return the names that a source defines."""
    names: dict[str, Any] = {"__name__": __name__}
    exec(source, names)  # noqa: S102 - our own text
    return names


async def test_our_examples_run(
    migrated_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task completes: submitted by the plugin, in a transaction, and by taskiq."""
    set_environment(monkeypatch, migrated_database.url)
    shown = [block for _, text in sections("migrating.md") for block in blocks(text, "python")]
    names = executed("\n".join(shown))
    functions = ("do_nothing", "do_nothing_in_a_thread", "confirm")
    tasks = [*(names[name] for name in functions), names["broker"]]
    plugin = names["plugin"] = OperationsPlugin(OperationsConfig(tasks=tasks))
    jobs = plugin.assembly.jobs
    for resource in plugin.operations.resources:
        await resource.open()
    connection = await asyncpg.connect(migrated_database.url)
    await connection.execute("CREATE TABLE orders (number integer)")

    await names["send"]()
    await plugin.jobs.submit("do_nothing_in_a_thread", None)
    await names["order"](connection, 7)
    await names["do_nothing_with_taskiq"].kiq()
    await connection.close()
    jobs.enable_worker()
    jobs.start()
    async with asyncio.timeout(SECONDS):
        while [job for job in (await plugin.jobs.search()).jobs if not job.state.final]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    found = [await plugin.jobs.get(job.id) for job in (await plugin.jobs.search()).jobs]
    await plugin.operations.shutdown.run()

    assert {job.state for job in found} == {JobState.COMPLETED}
    results = {job.task.rpartition(":")[2]: job.result for job in found}
    assert results == {
        "do_nothing": b"null",
        "do_nothing_in_a_thread": b"null",
        "confirm": b'"7 in attempt 1"',
        "do_nothing_with_taskiq": b"null",
    }


@pytest.mark.parametrize("heading", PEERS)
def test_the_examples_of_the_peers_are_those_of_the_benchmark(heading: str) -> None:
    """Line by line, in this order; the benchmark runs them."""
    (block,) = blocks(dict(sections("migrating.md"))[heading], "py")
    module = ROOT / "benchmarks/jobs/peers" / f"{PEERS[heading]}.py"
    lines = [line.strip() for line in module.read_text(encoding="utf-8").splitlines()]
    at = 0
    for line in filter(None, (line.strip() for line in block.splitlines())):
        assert line in lines[at:], line
        at += lines[at:].index(line) + 1


async def test_the_example_for_taskiq_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In memory, in one process."""
    set_environment(monkeypatch, None)
    (block,) = blocks(dict(sections("jobs.md"))["From taskiq"], "python")

    await executed(block)["main"]()

    assert capsys.readouterr().out == "42\n"


def test_the_table_names_what_there_is_here() -> None:
    """Its first column has options of ``@task``, methods, and routes that exist."""
    table = dict(sections("migrating.md"))["Words and options"]
    here = " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| "))
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "src/viralfx").rglob("*.py")
    )
    names = set(re.findall(r"\b([a-z_]{3,})=", here)) | {"submit_many", "report", "pause", "resume"}

    assert len(names) > 10
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []
