"""Signatures: the example of the specification, several secrets, and invalid secrets."""

import base64
import hashlib
import hmac

import pytest

from viralfx.domain.webhooks.signature import Signer, parse_secrets, webhook_headers

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
