"""The statements and the example of docs/webhooks.md, executed."""

import re
from pathlib import Path

import pytest
from docs.examples.verify_webhook import TOLERANCE, verify

from viralfx.domain.webhooks.signature import Signer, parse_secrets, webhook_headers
from viralfx.domain.webhooks.url import AllowedHost, parse_allowed

PAGE = (Path(__file__).parents[3] / "docs/webhooks.md").read_text(encoding="utf-8")
OLD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NEW = "whsec_bm5ubm5ubm5ubm5ubm5ubm5ubm5ubm5ubm5ubm5ubm4="
NOW = 1_767_700_800


@pytest.fixture
def headers() -> dict[str, str]:
    """Return the headers of a message that is signed with both secrets."""
    return dict(webhook_headers(Signer(parse_secrets(f"{NEW},{OLD}")), "job-1", NOW, b"{}"))


@pytest.mark.parametrize("secret", [OLD, NEW])
def test_the_example_verifies_a_signature(headers: dict[str, str], secret: str) -> None:
    """With either secret during a rotation."""
    assert verify(headers, b"{}", secret, NOW + TOLERANCE) == "job-1"


@pytest.mark.parametrize(
    ("change", "body", "now"),
    [
        ({}, b"{} ", NOW),
        ({"webhook-id": "job-2"}, b"{}", NOW),
        ({"webhook-timestamp": str(NOW + 1)}, b"{}", NOW),
        ({"webhook-signature": "v1,"}, b"{}", NOW),
        ({}, b"{}", NOW + TOLERANCE + 1),
    ],
)
def test_the_example_rejects_forgeries(
    headers: dict[str, str], change: dict[str, str], body: bytes, now: float
) -> None:
    """Another body, id or time, no signature, and a replay."""
    with pytest.raises(ValueError, match="the webhook is"):
        verify({**headers, **change}, body, OLD, now)


def test_each_entry_of_the_table_is_valid() -> None:
    """Hosts and networks as documented."""
    table = PAGE.split("|---|---|\n")[1].split("\n\n")[0]
    entries = [
        entry for row in table.splitlines() for entry in re.findall("`(.+?)`", row.split("|")[1])
    ]
    assert len(entries) == 7
    hosts = [isinstance(parse_allowed(entry), AllowedHost) for entry in entries]
    assert hosts == [True] * 6 + [False]
