"""The example application of the documentation, run as its first lines say."""

import signal

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


def test_the_example_is_short() -> None:
    """It stays small enough to be read in a minute."""
    lines = (ROOT / "docs/examples/orders.py").read_text().splitlines()
    code = [line for line in lines if line.strip()]

    assert len(code) <= 40
