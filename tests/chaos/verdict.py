"""Checks the outcome of every job of the chaos run, from the API and from the effects."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

KEY = "ordeal-"
"""How the idempotency keys of the ordeal begin; the job's number follows."""


@dataclass(frozen=True)
class Effects:
    """The effects of the tasks by job id and number, once for each execution."""

    rows: Counter[tuple[str, int]]
    lines: Counter[tuple[str, int]]


def effects_in(rows: list[tuple[Any, ...]], file: Path) -> Effects:
    """Collect the effects; ``rows`` are (job, number) of the table."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return Effects(
        rows=Counter((str(job), int(number)) for job, number in rows),
        lines=Counter((job, int(number)) for job, number in lines),
    )


def every_job(api: str) -> dict[str, dict[str, Any]]:
    """Return all jobs of the run by id, page after page."""
    found: dict[str, dict[str, Any]] = {}
    cursor: str | None = None
    with httpx.Client(base_url=api, timeout=30) as client:
        while True:
            more = {"cursor": cursor} if cursor else {}
            page = client.get("/api/v1/jobs", params={"limit": "100", **more}).raise_for_status()
            body = page.json()
            found |= {j["id"]: j for j in body["items"] if j["task"].startswith("chaos.")}
            cursor = body["nextCursor"]
            if cursor is None:
                return found


def judge(
    acknowledged: Mapping[int, set[str]], jobs: Mapping[str, Mapping[str, Any]], effects: Effects
) -> list[str]:
    """Return a description of every broken promise."""
    known = {one for ids in acknowledged.values() for one in ids}
    problems = [
        f"job {number} was acknowledged as {sorted(ids) or 'nothing'}"
        for number, ids in acknowledged.items()
        if len(ids) != 1
    ]
    problems += [f"{one} was acknowledged and is lost" for one in known - jobs.keys()]
    problems += [f"{one} was never acknowledged" for one in jobs.keys() - known]
    for one, job in jobs.items():
        problems += _judge_one(one, job, acknowledged, effects)
    problems += [
        f"{one} has an effect and is no job"
        for one, _ in {*effects.rows, *effects.lines}
        if one not in jobs
    ]
    return problems


def _judge_one(
    one: str, job: Mapping[str, Any], acknowledged: Mapping[int, set[str]], effects: Effects
) -> Iterator[str]:
    if job["state"] != "completed":
        yield f"{one} is {job['state']}: {job.get('error')}"
        return
    number = int(job["idempotencyKey"].removeprefix(KEY))
    if acknowledged.get(number) != {one}:
        yield f"{one} has the key of job {number}"
    if job["task"] == "chaos.transactional":
        if effects.rows[one, number] != 1:
            yield f"{one} has {effects.rows[one, number]} rows"
    elif not effects.lines[one, number]:
        yield f"{one} is completed without its effect"
