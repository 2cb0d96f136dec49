"""The example application of the documentation, run as its first lines say."""

import signal

from tests.system.jobs import accept, until
from tests.system.service import ROOT, request, running


def test_the_example_runs_as_documented() -> None:
    """Its check is shown, its stage ships what waits, and the stop is clean."""
    with running("--app", "docs.examples.orders:app") as service:
        service.wait_ready()
        for name in ("tea", "cake"):
            assert request(service.port, f"/orders/{name}", method="POST").status == 202
        check = service.get("/health/detailed?fresh=1").json()["checks"]["orders"]
        service.signal(signal.SIGTERM)
        code = service.exit_code()

    assert (check["status"], check["details"]["waiting"]) == ("pass", 2)
    assert code == 0
    assert [line for line in service.output if line.startswith("shipped")] == [
        "shipped tea\n",
        "shipped cake\n",
    ]


def test_an_application_ships_by_jobs() -> None:
    """An order accepted twice is one job, done before the stop."""
    order = {"order": "A7", "weight": 2.5}
    with running("--app", "docs.examples.shipping:app") as service:
        service.wait_ready()
        answers = [service.get("/orders", method="POST", json_body=order) for _ in range(2)]
        service.signal(signal.SIGTERM)
        code = service.exit_code()

    assert [answer.status for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()
    assert code == 0
    shipped = [line for line in service.output if line.startswith("shipped")]
    assert shipped == ["shipped A7 attempt 1\n"]


def test_a_task_of_ones_own_greets() -> None:
    """The README's job does what is shown there."""
    with running(environment={"TASK_MODULES": "docs.examples.greet"}) as service:
        service.wait_ready()
        job_id = accept(service, "greet", {"name": "Ada"}, **{"Idempotency-Key": "guest-1"})
        assert until(service, job_id, "completed")["result"] == "Hello, Ada"


def test_the_example_is_short() -> None:
    """It stays small enough to be read in a minute."""
    lines = (ROOT / "docs/examples/orders.py").read_text().splitlines()
    code = [line for line in lines if line.strip()]

    assert len(code) <= 40
