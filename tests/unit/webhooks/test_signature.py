"""Signatures: the example of the specification, and the keys of receivers and alerts."""

import base64
import hashlib
import hmac

import pytest

from viralfx.domain.webhooks.signature import (
    Signer,
    WebhookKeys,
    derived_key,
    parse_receiver_keys,
    parse_secrets,
    show_key,
    webhook_headers,
)
from viralfx.domain.webhooks.url import parse_destination

# The example of the Standard Webhooks specification and of its reference implementations.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MESSAGE = "msg_p5jXN8AQM9LWM0D4loKWxJek"
SECONDS = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_example_of_the_specification() -> None:
    """Libraries of that specification can verify the signatures."""
    assert Signer(parse_secrets(SECRET)).sign(MESSAGE, SECONDS, BODY) == SIGNATURE


def test_every_secret_signs() -> None:
    """Receivers with the old and with the new secret both accept the message."""
    new = b"n" * 32
    secrets = f"whsec_{base64.b64encode(new).decode()}, {SECRET}"
    signed = b"%s.%d.%s" % (MESSAGE.encode(), SECONDS, BODY)
    digest = base64.b64encode(hmac.new(new, signed, hashlib.sha256).digest()).decode()

    signatures = Signer(parse_secrets(secrets)).sign(MESSAGE, SECONDS, BODY)

    assert signatures == f"v1,{digest} {SIGNATURE}"


def test_the_three_headers() -> None:
    """Message id, time and signature; without a secret there is no signature."""
    named = {"webhook-id": MESSAGE, "webhook-timestamp": str(SECONDS)}
    assert webhook_headers(Signer(parse_secrets(SECRET)), MESSAGE, SECONDS, BODY) == {
        **named,
        "webhook-signature": SIGNATURE,
    }
    assert webhook_headers(None, MESSAGE, SECONDS, BODY) == named


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\n"])
def test_secrets_are_separated_by_commas_blanks_or_lines(separator: str) -> None:
    """In a variable, or in a file."""
    assert parse_secrets(separator.join([SECRET, SECRET])) == parse_secrets(SECRET) * 2


@pytest.mark.parametrize("size", [24, 64])
def test_allowed_key_sizes(size: int) -> None:
    """From 24 to 64 bytes, both included."""
    key = bytes(range(size))
    assert parse_secrets(f"whsec_{base64.b64encode(key).decode()}") == (key,)


@pytest.mark.parametrize(
    "secret",
    [
        "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsec-MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "WHSEC_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsec_",
        "whsec_hunter2",
        "whsec_\u00e9\u00e9\u00e9\u00e9",
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS",
        "whsec_" + base64.b64encode(b"x" * 23).decode(),
        "whsec_" + base64.b64encode(b"x" * 65).decode(),
        "whsec_" + base64.urlsafe_b64encode(b"\xff" * 24).decode(),
    ],
)
def test_the_error_for_an_invalid_secret_does_not_contain_it(secret: str) -> None:
    """The message has the number of the secret."""
    with pytest.raises(ValueError, match="secret 2 is not whsec_ followed by") as refused:
        parse_secrets(f"{SECRET} {secret}")
    assert secret.removeprefix("whsec_") not in str(refused.value) or secret == "whsec_"


@pytest.mark.parametrize("text", ["", " , "])
def test_an_empty_secret_is_rejected(text: str) -> None:
    """A signer needs at least one secret."""
    with pytest.raises(ValueError, match="there is no secret"):
        parse_secrets(text)
    with pytest.raises(ValueError, match="at least one secret"):
        Signer(())


# -- keys of receivers and alerts ------------------------------------------------------------------

MASTER, FORMER, OWN = b"m" * 32, b"f" * 32, b"o" * 32
HERE = parse_destination("https://hooks.example.com/in?x=1")


def test_the_derivation_of_a_key() -> None:
    """These bytes must never change: receivers have them."""
    keys = WebhookKeys([MASTER])
    assert list(map(show_key, keys.of_receiver(HERE))) == [
        "whsec_aoBRZaYbe8Aaic9W4obNc/Hpil9sP9xE7fJTSeoW1VQ="
    ]
    assert list(map(show_key, keys.of_alerts(HERE))) == [
        "whsec_mkHMQKFxkL2YILecsEGEktrnxxKrQx73Hg9Dv64efl4="
    ]


def test_a_key_belongs_to_scheme_host_and_port() -> None:
    """Not to the path, the spelling of the host, or a default port that is written."""
    keys = WebhookKeys([MASTER])
    same = ["https://HOOKS.example.com:443/", "https://hooks.example.com/other"]
    others = [
        "https://hooks.example.com:444/in",
        "http://hooks.example.com:443/in",
        "https://example.com/in",
        "https://[::1]/",
    ]

    assert {keys.of_receiver(parse_destination(url)) for url in same} == {keys.of_receiver(HERE)}
    found = {keys.of_receiver(parse_destination(url)) for url in others}
    assert len(found) == len(others)
    assert keys.of_receiver(HERE) not in found


def test_a_receiver_with_a_key_of_its_own_gets_no_derived_one() -> None:
    """Several keys of it all sign; other receivers have the derived ones."""
    text = f"hooks.example.com={show_key(OWN)} http://[::1]:81={SECRET},hooks.example.com={SECRET}"
    keys = WebhookKeys([MASTER], own=parse_receiver_keys(text))
    (secret,) = parse_secrets(SECRET)

    assert keys.of_receiver(HERE) == (OWN, secret)
    assert keys.of_receiver(parse_destination("http://[::1]:81/")) == (secret,)
    other = parse_destination("https://a.example.com/")
    assert keys.of_receiver(other) == (derived_key(MASTER, "webhook", "https://a.example.com:443"),)
    assert keys.of_alerts(HERE) == WebhookKeys([MASTER]).of_alerts(HERE)


def test_a_shared_key_signs_in_addition() -> None:
    """Receivers that know the former key, and those with their own, verify the same message."""
    keys = WebhookKeys([MASTER], shared=[FORMER])
    (theirs,), (of_alerts,) = keys.of_receiver(HERE), keys.of_alerts(HERE)

    for signer, key in (
        (keys.webhook_signer(HERE), theirs),
        (keys.alert_signer(HERE, proven=True), of_alerts),
    ):
        assert signer is not None
        signatures = signer.sign(MESSAGE, SECONDS, BODY).split()
        assert signatures == [Signer([k]).sign(MESSAGE, SECONDS, BODY) for k in (key, FORMER)]


def test_a_proof_belongs_to_one_alert_in_one_job() -> None:
    """By any of the secrets while one is replaced; without a secret there is none."""
    data = {"check": "database", "code": None}
    old, both, new = WebhookKeys([FORMER]), WebhookKeys([MASTER, FORMER]), WebhookKeys([MASTER])
    proof = both.prove("job-1", "health.changed", data)

    assert all(keys.proves(proof, "job-1", "health.changed", data) for keys in (old, both, new))
    assert not new.proves(proof, "job-2", "health.changed", data)
    assert not new.proves(proof, "job-1", "health.changed", {**data, "check": "redis"})
    assert not new.proves(proof, "job-1", "other", data)
    for forged in (None, "", "0" * 64, "\u00e9", str(old.prove("job-1", "health.changed", data))):
        assert not new.proves(forged, "job-1", "health.changed", data)
    assert WebhookKeys().prove("job-1", "health.changed", data) is None
    assert not WebhookKeys().proves("", "job-1", "health.changed", data)


@pytest.mark.parametrize(
    "entry",
    [
        SECRET,
        f"={SECRET}",
        f"hooks.example.com:{SECRET}",
        "hooks.example.com=hunter2",
        f"hooks.example.com/in={SECRET}",
        f"https://hooks.example.com/={SECRET}",
        f"*.example.com={SECRET}",
        f"ftp://hooks.example.com={SECRET}",
        f"u:hunter2@hooks.example.com={SECRET}",
    ],
)
def test_the_error_for_an_invalid_entry_does_not_contain_it(entry: str) -> None:
    """It has the number of the entry."""
    with pytest.raises(ValueError, match=r"^entry 2 ") as refused:
        parse_receiver_keys(f"a.example.com={SECRET},{entry}")
    assert "hunter2" not in str(refused.value)
    assert SECRET[6:] not in str(refused.value)
