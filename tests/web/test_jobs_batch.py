"""The jobs API: options of a new job, and batches of all or none."""

from tests.web.test_jobs import JOBS, PARCEL, Client, assert_problem, client

__all__ = ["client"]

BATCH = f"{JOBS}/batch"


async def count(client: Client) -> int:
    """Return the number of jobs."""
    return len((await client.get(JOBS, params={"limit": 100})).json()["items"])


async def test_a_request_has_a_priority_and_may_be_unique(client: Client) -> None:
    """A twin of a waiting job is that job, with status 200; null is no option."""
    body = {**PARCEL, "priority": -7, "unique": "waiting"}
    first = await client.post(JOBS, json=body)
    twin = await client.post(JOBS, json={**body, "runAt": "2030-01-01T00:00:00Z", "priority": 1})
    other = await client.post(JOBS, json={**PARCEL, "priority": 5.0, "unique": None})
    job = (await client.get(first.json()["links"]["self"])).json()

    assert [reply.status_code for reply in (first, twin, other)] == [202, 200, 202]
    assert twin.json() == first.json()
    assert (job["priority"], job["userId"]) == (-7, None)
    assert await count(client) == 2


async def test_a_request_has_a_queue_and_attempts(client: Client) -> None:
    """Alone and in a batch; null is no option, and an unknown queue is refused with its name."""
    body = {**PARCEL, "queue": "analytics", "maxAttempts": 7.0}
    one = (await client.post(JOBS, json=body)).json()
    batch = [body, {**PARCEL, "queue": None, "maxAttempts": None}]
    many = (await client.post(BATCH, json={"jobs": batch})).json()["jobs"]
    unknown = await client.post(JOBS, json={**PARCEL, "queue": "analytic"})
    wrong = await client.post(BATCH, json={"jobs": [PARCEL, {**PARCEL, "queue": "\0"}]})
    other = await client.post(
        JOBS, json={**body, "queue": "default"}, headers={"Idempotency-Key": "k"}
    )
    conflict = await client.post(JOBS, json=body, headers={"Idempotency-Key": "k"})
    shown = [(await client.get(each["links"]["self"])).json() for each in (one, *many)]

    assert [(each["queue"], each["maxAttempts"]) for each in shown] == [
        ("analytics", 7),
        ("analytics", 7),
        ("default", None),
    ]
    assert one["queue"] == "analytics"
    assert_problem(unknown, 422, "There is no queue 'analytic'")
    assert_problem(wrong, 422, "The job at index 1: there is no queue")
    assert (other.status_code, conflict.status_code) == (202, 409)
    assert await count(client) == 4


async def test_an_invalid_option_is_rejected(client: Client) -> None:
    """The problem names it."""
    for options, text in (
        ({"queue": 5}, "$.queue"),
        ({"queue": ""}, "$.queue"),
        ({"maxAttempts": 0}, "$.maxAttempts"),
        ({"maxAttempts": 10_001}, "$.maxAttempts"),
        ({"maxAttempts": 1.5}, "$.maxAttempts"),
        ({"max_attempts": 1}, "max_attempts"),
        ({"priority": 101}, "$.priority"),
        ({"priority": "1"}, "$.priority"),
        ({"priority": 0.5}, "$.priority"),
        ({"unique": "always"}, "$.unique"),
        ({"unique": True}, "$.unique"),
        ({"key": "k"}, "key"),
    ):
        assert_problem(await client.post(JOBS, json={**PARCEL, **options}), 400, text)


async def test_a_batch_is_accepted_in_order(client: Client) -> None:
    """Each job as a single one, with a key of its own."""
    jobs = [
        {**PARCEL, "key": "a", "priority": 2},
        {"task": "parcels.echo", "payload": [1]},
        {**PARCEL, "runAt": "2030-01-01T00:00:00Z"},
    ]
    headers = {"X-Correlation-ID": "batch-1"}
    reply = await client.post(BATCH, json={"jobs": jobs}, headers=headers)
    accepted = reply.json()["jobs"]
    again = await client.post(BATCH, json={"jobs": jobs[:1]})
    shown = [(await client.get(each["links"]["self"])).json() for each in accepted]

    assert (reply.status_code, again.status_code) == (202, 202)
    assert [each["queue"] for each in accepted] == ["default", "analytics", "default"]
    assert again.json()["jobs"] == [{**accepted[0], "created": False}]
    assert all(each["created"] for each in accepted)
    assert [each["payload"] for each in shown] == [{"weight": 3}, [1], {"weight": 3}]
    assert [each["idempotencyKey"] for each in shown] == ["a", None, None]
    assert [each["priority"] for each in shown] == [2, 0, 0]
    assert {each["correlationId"] for each in shown} == {"batch-1"}
    assert shown[2]["runAt"] == "2030-01-01T00:00:00.000Z"
    assert await count(client) == 3


async def test_a_batch_with_a_wrong_job_is_rejected(client: Client) -> None:
    """As a whole; the problem has the position of the job."""
    for wrong, status, text in (
        ({"task": "parcels.shipp"}, 422, "The job at index 2: there is no task"),
        ({"task": "parcels.ship", "payload": {}}, 422, "jobs[2].payload"),
        ({**PARCEL, "key": "taken", "payload": {"weight": 4}}, 409, "at index 2"),
        ({**PARCEL, "key": ""}, 400, "$.jobs[2].key"),
        ({**PARCEL, "key": "a b"}, 400, "$.jobs[2].key"),
        ({**PARCEL, "runAt": "2030-01-01T00:00:00"}, 400, "$.jobs[2].runAt"),
        ({**PARCEL, "more": 1}, 400, "$.jobs[2]"),
        (7, 400, "$.jobs[2]"),
    ):
        await client.post(JOBS, json=PARCEL, headers={"Idempotency-Key": "taken"})
        jobs = [PARCEL, {**PARCEL, "key": "new"}, wrong]
        assert_problem(await client.post(BATCH, json={"jobs": jobs}), status, text)

        assert await count(client) == 1


async def test_the_size_of_a_batch_is_limited(client: Client) -> None:
    """From 1 to 1000 jobs."""
    bodies: tuple[object, ...] = ({}, {"jobs": []}, {"jobs": [PARCEL] * 1001}, [], {"jobs": 1})
    for body in bodies:
        assert_problem(await client.post(BATCH, json=body), 400, "The body is invalid")

        assert await count(client) == 0


async def test_the_largest_batch_is_accepted(client: Client) -> None:
    """Larger bodies are rejected, and so is a key for a batch."""
    large = {"task": "parcels.echo", "payload": "x" * 4000}
    reply = await client.post(BATCH, json={"jobs": [large] * 1000})
    too_large = await client.post(BATCH, json={"jobs": [{**large, "payload": "x" * 2**22}]})
    of_one = {**large, "payload": "x" * (64 * 1024 - 1)}
    payload = await client.post(BATCH, json={"jobs": [large, of_one]})
    keyed = await client.post(BATCH, json={"jobs": [PARCEL]}, headers={"Idempotency-Key": "k"})

    assert (reply.status_code, len(reply.json()["jobs"])) == (202, 1000)
    assert_problem(too_large, 413, "4096 KiB")
    assert_problem(payload, 413, "The payload of the job at index 1 is over 64 KiB.")
    assert_problem(keyed, 400, "give each of its jobs a key")
