"""The example applications of the documentation run as described."""

import signal

import pytest
from tests.system.jobs import accept, until
from tests.system.service import ROOT, request, running


@pytest.mark.each_python
def test_the_example_runs_as_documented() -> None:
    """Its check is visible, its stage ships the waiting orders, and the stop is clean."""
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
    """An order that is accepted twice is one job, and runs before the stop."""
    order = {"order": "A7", "weight": 2.5}
    with running("--app", "docs.examples.shipping:app") as service:
        service.wait_ready()
        responses = [service.get("/orders", method="POST", json_body=order) for _ in range(2)]
        service.signal(signal.SIGTERM)
        code = service.exit_code()

    assert [response.status for response in responses] == [202, 202]
    assert responses[0].json() == responses[1].json()
    assert code == 0
    shipped = service.logged("Order shipped")
    assert [(entry["order"], entry["attempt"]) for entry in shipped] == [("A7", 1)]


def test_the_task_of_the_readme_greets() -> None:
    """The job of docs/examples/greet.py has the result of the README."""
    with running(environment={"TASK_MODULES": "docs.examples.greet"}) as service:
        service.wait_ready()
        job_id = accept(service, "greet", {"name": "Ada"}, **{"Idempotency-Key": "guest-1"})
        assert until(service, job_id, "completed")["result"] == "Hello, Ada"


def test_the_example_is_short() -> None:
    """The example has at most 40 lines of code."""
    lines = (ROOT / "docs/examples/orders.py").read_text().splitlines()
    code = [line for line in lines if line.strip()]

    assert len(code) <= 40
