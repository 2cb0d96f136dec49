"""The contract of priorities, paused queues and limits of tasks, for every ledger."""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta

import pytest
from tests.contracts.ledgers import LONG_LEASE, LedgerCase, draft

from viralfx.core.ids import new_job_id
from viralfx.jobs.ledger import Claims
from viralfx.jobs.limits import Limit, Rate
from viralfx.jobs.model import Claim, JobDraft, completed, handed_back, refused

TWO = {"task": Limit(concurrency=2)}
ONE_EACH = {"task": Limit(concurrency=1, keyed=True)}


async def accept(case: LedgerCase, drafts: Iterable[JobDraft]) -> list[str]:
    """Accept drafts together; return the ids."""
    return [each.job.id for each in await case.ledger.accept(list(drafts))]


async def take(
    case: LedgerCase,
    count: int = 10,
    limits: Mapping[str, Limit] | None = None,
    *,
    worker: str = "w",
    tasks: Iterable[str] = ("task", "free"),
    queue: str = "default",
) -> Claims:
    """Register a worker, and claim up to ``count`` jobs for it."""
    await case.ledger.register(worker, [queue], LONG_LEASE)
    known = list(tasks)
    return await case.ledger.claim(queue, worker, count, tasks=known, limits=limits or {})


def ids(claims: Iterable[Claim]) -> list[str]:
    """Return the ids of claims."""
    return [claim.id for claim in claims]


async def complete(case: LedgerCase, *claims: Claim) -> None:
    """Complete claimed jobs."""
    assert len(await case.ledger.settle([completed(claim, b"1") for claim in claims])) == len(
        claims
    )


# -- priorities ------------------------------------------------------------------------------------


async def test_a_higher_priority_runs_first(case: LedgerCase) -> None:
    """Then the one that has been due for longer, of any task."""
    low, usual, high, also = await accept(
        case,
        [
            draft(priority=-7),
            draft(),
            draft(priority=5),
            draft(task="free", priority=5),
        ],
    )

    assert ids(await take(case, 1)) == [high]
    assert ids(await take(case)) == [also, usual, low]


async def test_a_job_of_high_priority_that_is_not_due_holds_up_no_other(case: LedgerCase) -> None:
    """Neither claims, nor the question which queues have due jobs, nor the counts."""
    later = case.now() + timedelta(seconds=30)
    (due,) = await accept(case, [draft()])
    await accept(case, [draft(priority=9, run_at=later), draft(priority=3, run_at=later)])

    counts = (await case.ledger.counts())["default"]
    assert (counts.waiting, counts.scheduled) == (1, 2)
    assert await case.ledger.due(["default"], ["task"]) == {"default": 0.0}
    assert ids(await take(case)) == [due]
    assert await case.ledger.due(["default"], ["task"]) == {}
    within = await case.ledger.due(["default"], ["task"], within=60.0)
    assert 20.0 < within["default"] <= 30.0


async def test_priorities_hold_beside_jobs_of_unknown_tasks(case: LedgerCase) -> None:
    """A claim goes from task to task there, but from priority to priority first."""
    await accept(case, [draft(task="unknown", priority=9)])
    low, middle, high = await accept(
        case,
        [draft(priority=1), draft(task="free", priority=2), draft(priority=3)],
    )

    assert ids(await take(case, 2)) == [high, middle]
    assert ids(await take(case, 2)) == [low]


async def test_a_job_keeps_its_priority_when_it_is_due_again(case: LedgerCase) -> None:
    """A retry runs before jobs of a lower priority."""
    await accept(case, [draft(), draft()])
    (job_id,) = await accept(case, [draft(priority=1)])
    (claim,) = await take(case, 1)
    await case.ledger.settle([handed_back(claim)])

    assert (claim.id, ids(await take(case, 1))) == (job_id, [job_id])


# -- paused queues ---------------------------------------------------------------------------------


async def test_a_paused_queue_is_not_claimed_from(case: LedgerCase) -> None:
    """Neither by a poll nor by ids; other queues, acceptance and running jobs are not affected."""
    (running,) = await accept(case, [draft()])
    (claim,) = await take(case)
    await case.ledger.pause("default")
    await case.ledger.pause("default")
    waiting = await accept(case, [draft(), draft(priority=1)])
    (other,) = await accept(case, [draft("other")])

    assert claim.id == running
    assert ids(await take(case)) == []
    assert ids(await take(case, limits=TWO)) == []
    assert ids(await case.ledger.claim("default", "w", 5, waiting, tasks=["task"])) == []
    assert ids(await case.ledger.claim("default", "w", 5)) == []
    assert await case.ledger.due(["default", "other"]) == {"other": 0.0}
    assert ids(await take(case, queue="other")) == [other]
    await complete(case, claim)
    counts = await case.ledger.counts()
    assert (counts["default"].paused, counts["default"].waiting) == (True, 2)
    assert not counts["other"].paused

    assert await case.ledger.resume("default") == waiting[::-1]
    assert await case.ledger.resume("default", 1) == waiting[1:]
    assert not (await case.ledger.counts())["default"].paused
    assert ids(await take(case)) == waiting[::-1]


async def test_a_queue_can_be_paused_before_its_first_job(case: LedgerCase) -> None:
    """The counts have it, too."""
    await case.ledger.pause("new")
    await accept(case, [draft("new")])

    assert (await case.ledger.counts())["new"].paused
    assert ids(await take(case, queue="new")) == []


# -- concurrency -----------------------------------------------------------------------------------


async def test_a_limited_task_has_no_more_active_jobs(case: LedgerCase) -> None:
    """Over all workers and queues; jobs of other tasks are claimed beside it."""
    jobs = await accept(case, [draft(), draft("other"), draft(), draft()])
    (free,) = await accept(case, [draft(task="free")])

    first = await take(case, 1, TWO)
    second = await take(case, 5, TWO, worker="v", queue="other")
    third = await take(case, 5, TWO, worker="v")
    assert (ids(first), ids(second), ids(third)) == ([jobs[0]], [jobs[1]], [free])
    assert 0.0 < third.again_in < 3.0
    assert await case.ledger.claim("default", "w", 5, jobs, tasks=["task"], limits=TWO) == ()

    await complete(case, first[0])
    assert ids(await take(case, 5, TWO)) == [jobs[2]]
    await case.ledger.deregister("v")
    assert ids(await take(case, 1, TWO)) == [jobs[3]]


async def test_a_limit_that_is_not_reached_lets_a_claim_take_all(case: LedgerCase) -> None:
    """The answer names no time to come back at."""
    await accept(case, [draft() for _ in range(4)])

    claims = await take(case, 10, {"task": Limit(concurrency=5)})
    assert (len(claims), claims.again_in) == (4, math.inf)
    assert (await take(case, 10, {"task": Limit(concurrency=5)})).again_in == math.inf


async def test_a_limited_job_is_claimed_however_soon_it_arrives(case: LedgerCase) -> None:
    """After a claim that found nothing, and after one that took all that there was."""
    assert await take(case, 1, TWO) == ()
    (first,) = await accept(case, [draft()])
    assert ids(await take(case, 1, TWO)) == [first]
    (free,) = await accept(case, [draft(task="free")])
    assert ids(await take(case, 1, TWO)) == [free]
    more = await accept(case, [draft(), draft(task="free")])
    assert set(ids(await take(case, 5, TWO))) == set(more)


async def test_a_refused_job_gives_its_task_no_turn(case: LedgerCase) -> None:
    """Of the jobs that the worker may claim, the oldest one comes first."""
    await accept(case, [draft(task="unknown"), draft()])
    (claim,) = await take(case, 1)
    await case.ledger.settle([refused(claim, "of a newer version")])
    (free,) = await accept(case, [draft(task="free")])
    (newer,) = await accept(case, [draft()])

    assert [ids(await take(case, 1)) for _ in range(2)] == [[free], [newer]]


async def test_concurrent_claims_keep_a_limit(case: LedgerCase) -> None:
    """Each round, eight workers claim at once; one that loses comes back at a known time."""
    await accept(case, [draft() for _ in range(60)])
    await accept(case, [draft(task="free") for _ in range(60)])
    limits = {"task": Limit(concurrency=5)}
    active: list[Claim] = []
    taken: Counter[str] = Counter()
    for _ in range(6):
        found = await asyncio.gather(
            *(take(case, 10, limits, worker=f"w{number}") for number in range(8))
        )
        new = [claim for claims in found for claim in claims]
        taken.update(claim.task for claim in new)
        active += [claim for claim in new if claim.task == "task"]
        assert len(active) <= 5
        counts = (await case.ledger.counts())["default"]
        assert counts.active == len(active) + taken["free"]
        await complete(case, *active[::2])
        active = active[1::2]

    assert taken["free"] == 60
    assert taken["task"] >= 10


# -- keys ------------------------------------------------------------------------------------------


async def test_a_limit_with_keys_holds_for_each_key(case: LedgerCase) -> None:
    """The keys take turns, so one with many jobs does not hold up the others."""
    many = await accept(case, [draft(concurrency_key="a") for _ in range(5)])
    others = await accept(case, [draft(concurrency_key=key) for key in "bcb"])
    without = await accept(case, [draft(), draft()])

    claims = await take(case, 10, ONE_EACH)
    assert set(ids(claims)) <= {many[0], others[0], others[1], without[0]}
    assert {many[0], others[0], others[1]} <= set(ids(claims))
    (done,) = [claim for claim in claims if claim.id == others[0]]
    await complete(case, done)
    again = await take(case, 10, ONE_EACH, worker="v")
    assert others[2] in ids(again)
    assert not set(many) & set(ids(again))
    assert again.again_in < 3.0


@pytest.mark.parametrize("key", [None, ""])
async def test_jobs_without_a_key_take_turns_with_keys(case: LedgerCase, key: str | None) -> None:
    """Neither a key with many jobs nor keys that use all places hold them up."""
    await accept(case, [draft(concurrency_key="a") for _ in range(40)])
    without = await accept(case, [draft(concurrency_key=key) for _ in range(2)])
    taken: list[str] = []
    for _ in range(4):
        claims = await take(case, 1, ONE_EACH)
        taken += ids(claims)
        await complete(case, *claims)

    assert len(set(without) & set(taken)) == 2


async def test_a_blocked_key_hides_no_job_without_a_key(case: LedgerCase) -> None:
    """These jobs share the limits of a key of their own."""
    await accept(case, [draft(concurrency_key="a") for _ in range(200)])
    assert len(await take(case, 2, ONE_EACH)) == 1
    without = await accept(case, [draft(concurrency_key="") for _ in range(2)])

    assert ids(await take(case, 2, ONE_EACH)) == without[:1]
    assert await take(case, 2, ONE_EACH) == ()


async def test_a_job_without_a_key_is_claimed_however_soon_it_arrives(case: LedgerCase) -> None:
    """After a claim that took all that it wanted, beside a key that is left."""
    keyed = await accept(case, [draft(concurrency_key=key) for key in "abc"])
    first = await take(case, 2, ONE_EACH)
    without = await accept(case, [draft(), draft()])

    second = await take(case, 5, ONE_EACH)
    assert sorted(ids([*first, *second])) == sorted([*keyed, without[0]])
    assert second.again_in < 3.0


async def test_keys_take_turns_in_small_claims(case: LedgerCase) -> None:
    """With three places of five, each key gets its share."""
    await accept(case, [draft(concurrency_key="a") for _ in range(20)])
    for key in "bcde":
        await accept(case, [draft(concurrency_key=key) for _ in range(3)])
    limits = {"task": Limit(concurrency=3, keyed=True)}
    taken: Counter[str | None] = Counter()
    for _ in range(5):
        claims = await take(case, 3, limits)
        taken.update([(await case.job(claim.id)).concurrency_key for claim in claims])
        await complete(case, *claims)

    assert taken == dict.fromkeys("abcde", 3)


async def test_a_task_with_keys_has_its_share_beside_other_tasks(case: LedgerCase) -> None:
    """Its jobs that have been due for longer come before those of a task without keys."""
    keyed = await accept(case, [draft(concurrency_key=key) for key in "ab"])
    await accept(case, [draft(task="free") for _ in range(8)])

    assert set(keyed) <= set(ids(await take(case, 4, ONE_EACH)))


async def test_a_key_uses_all_places_that_no_other_key_needs(case: LedgerCase) -> None:
    """A priority counts for each key, too."""
    await accept(case, [draft(concurrency_key="a") for _ in range(5)])
    (high,) = await accept(case, [draft(concurrency_key="a", priority=1)])

    claims = await take(case, 10, {"task": Limit(concurrency=4, keyed=True)})
    assert (len(claims), claims[0].id) == (4, high)


async def test_thousands_of_keys(case: LedgerCase) -> None:
    """Each key runs one job at a time, and none is left out."""
    keys = [f"customer-{number}" for number in range(2000)]
    for _ in range(2):
        await accept(case, [draft(concurrency_key=key) for key in keys])
    seen: set[str | None] = set()
    claims: list[Claim] = []
    async with asyncio.timeout(60.0):
        while len(claims) < len(keys):
            found = await take(case, 500, ONE_EACH)
            claims += found
            seen.update(claim.id for claim in found)

    assert len(seen) == len(keys)
    assert await take(case, 500, ONE_EACH) == ()
    await complete(case, *claims[:100])
    assert len(await take(case, 500, ONE_EACH)) <= 100


# -- rates -----------------------------------------------------------------------------------------


async def test_a_rate_limits_starts_in_a_period(case: LedgerCase) -> None:
    """Completed jobs count, and the answer says when the next one may start."""
    await accept(case, [draft() for _ in range(10)])
    await accept(case, [draft(task="free")])
    limits = {"task": Limit(rate=Rate(3, 1.0))}

    first = await take(case, 2, limits)
    assert {claim.task for claim in first} == {"task"}
    await complete(case, *first)
    second = await take(case, 10, limits)
    assert sorted(claim.task for claim in second) == ["free", "task"]
    third = await take(case, 10, limits, worker="v")
    assert ids(third) == []
    assert 0.0 < third.again_in <= 1.0

    async def more() -> Claims:
        return await take(case, 10, limits)

    assert 1 <= len(await case.until(more)) <= 3


async def test_a_rate_with_keys_holds_for_each_key(case: LedgerCase) -> None:
    """A long period: nothing starts again within this test."""
    await accept(case, [draft(concurrency_key=key) for key in "aaabbbc"])
    limits = {"task": Limit(rate=Rate(2, 86_400.0), keyed=True)}

    claims = await take(case, 10, limits)
    assert len(claims) == 5
    await complete(case, *claims)
    again = await take(case, 10, limits)
    assert not list(again)
    # No worker has to ask every second for a day.
    assert again.again_in > 80_000.0


async def test_a_rate_and_a_concurrency_hold_together(case: LedgerCase) -> None:
    """The stricter one decides."""
    await accept(case, [draft() for _ in range(9)])
    limits = {"task": Limit(concurrency=2, rate=Rate(3, 86_400.0))}

    first = await take(case, 10, limits)
    await complete(case, *first)
    second = await take(case, 10, limits)
    assert (len(first), len(second)) == (2, 1)


@pytest.mark.parametrize("limit", [TWO, ONE_EACH], ids=["task", "keys"])
async def test_ids_do_not_bypass_a_limit(case: LedgerCase, limit: Mapping[str, Limit]) -> None:
    """Jobs of limited tasks are claimed only without ids; those of others with them."""
    (limited,) = await accept(case, [draft(concurrency_key="a", id=new_job_id())])
    (free,) = await accept(case, [draft(task="free")])
    await case.ledger.register("w", ["default"], LONG_LEASE)

    claims = await case.ledger.claim(
        "default", "w", 5, [limited, free], tasks=["task", "free"], limits=limit
    )
    assert ids(claims) == [free]
