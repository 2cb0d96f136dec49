"""The allow list: what each entry covers, and what it does not."""

import pytest

from viralfx.domain.webhooks.allowed import AllowList, parse_allowed
from viralfx.domain.webhooks.errors import WebhookRefusedError


def allows(entries: list[str], url: str) -> bool:
    """Tell whether a list with these entries admits a URL."""
    try:
        AllowList(entries).admit(url)
    except WebhookRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("hooks.example.com", "https://hooks.example.com/a?b"),
        ("Hooks.Example.com", "https://hooks.EXAMPLE.com:443/"),
        ("https://hooks.example.com", "https://hooks.example.com/"),
        ("hooks.example.com:8443", "https://hooks.example.com:8443/"),
        ("http://hooks.example.com", "http://hooks.example.com/"),
        ("http://hooks.example.com:8080", "http://hooks.example.com:8080/"),
        ("*.example.com", "https://hooks.example.com/"),
        ("*.example.com", "https://a.b.example.com/"),
        ("http://*.example.com:81", "http://a.example.com:81/"),
        ("1.1.1.1", "https://1.1.1.1/"),
        ("10.0.0.7", "https://10.0.0.7/"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/"),
        ("[2606:4700:4700:0::1111]:99", "https://[2606:4700:4700::1111]:99/"),
        ("[::1]", "https://[::1]/"),
        ("xn--bcher-kva.example", "https://XN--bcher-kva.example/"),
    ],
)
def test_an_entry_covers(entry: str, url: str) -> None:
    """The host it names, in any spelling, on its port, by its scheme."""
    assert allows([entry], url)


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("hooks.example.com", "http://hooks.example.com/"),
        ("hooks.example.com", "https://hooks.example.com:8443/"),
        ("hooks.example.com", "https://example.com/"),
        ("hooks.example.com", "https://evilhooks.example.com/"),
        ("hooks.example.com", "https://hooks.example.com.evil.com/"),
        ("hooks.example.com", "https://a.hooks.example.com/"),
        ("http://hooks.example.com", "https://hooks.example.com/"),
        ("http://hooks.example.com", "http://hooks.example.com:8080/"),
        ("*.example.com", "https://example.com/"),
        ("*.example.com", "https://evilexample.com/"),
        ("*.example.com", "https://a.example.com.evil.com/"),
        ("*.example.com", "https://a.example.com:8443/"),
        ("*.1.1.example", "https://1.1.1.1/"),
        ("10.0.0.7", "https://10.0.0.8/"),
        ("10.0.0.0/8", "https://10.0.0.7/"),
        ("[::1]", "https://localhost/"),
        ("[::ffff:127.0.0.1]", "https://127.0.0.1/"),
    ],
)
def test_an_entry_does_not_cover(entry: str, url: str) -> None:
    """Neighbours, other ports, another scheme, the domain itself; a network is no host."""
    assert not allows([entry], url)


def test_an_empty_list_allows_nothing() -> None:
    """Nothing can be called that nobody listed; the refusal says where to list it."""
    allowed = AllowList()
    assert allowed.empty
    with pytest.raises(WebhookRefusedError) as refused:
        allowed.admit("https://hooks.example.com:8443/hunter2?key=hunter2")
    assert str(refused.value) == (
        "WEBHOOK_ALLOWED_HOSTS does not list https://hooks.example.com:8443"
    )
    assert AllowList(["10.0.0.0/8"]).empty
    assert not AllowList(["example.com"]).empty


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.",
        "*.*.example.com",
        "a.*.example.com",
        "hooks*.example.com",
        "*.1.2.3.4",
        "*.[::1]",
        ".example.com",
        "example.com/path",
        "https://example.com/",
        "https://example.com/path",
        "ftp://example.com",
        "://example.com",
        "user@example.com",
        "example.com:0",
        "example.com:*",
        "bücher.example",
        "127.1",
        "2130706433",
        "::1",
        "10.0.0.0/8/8",
        "http://10.0.0.0/8",
        "169.254.169.254",
        "169.254.0.0/16",
        "[fe80::1]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::a9fe:a9fe]",
        "0.0.0.0",  # noqa: S104 - nobody binds to it
        "0.0.0.0/0",
        "[::]",
    ],
)
def test_what_is_no_entry(entry: str) -> None:
    """It is refused where it is configured, with what is wrong."""
    told = r"is none of|must be https|must have a domain|never be called|network|address"
    with pytest.raises(ValueError, match=told):
        parse_allowed(entry)
    with pytest.raises(ValueError, match=told):
        AllowList(["example.com", entry])


@pytest.mark.parametrize(
    ("entries", "addresses"),
    [
        ([], ["8.8.8.8"]),
        ([], ["8.8.8.8", "2606:4700:4700::1111"]),
        (["10.0.0.0/8"], ["10.1.2.3"]),
        (["10.0.0.0/8", "127.0.0.0/8"], ["10.1.2.3", "8.8.8.8", "127.0.0.1"]),
        (["10.0.0.0/8"], ["::ffff:10.1.2.3"]),
    ],
)
def test_addresses_that_may_be_reached(entries: list[str], addresses: list[str]) -> None:
    """Public ones, and those in a network that is listed."""
    allowed = AllowList(["hooks.example.com", *entries])
    allowed.check_addresses(allowed.admit("https://hooks.example.com/"), addresses)


@pytest.mark.parametrize(
    ("entries", "addresses", "told"),
    [
        ([], ["10.0.0.1"], "10.0.0.1"),
        ([], ["8.8.8.8", "127.0.0.1"], "127.0.0.1"),
        ([], ["169.254.169.254"], "169.254.169.254"),
        ([], ["::1"], "::1"),
        ([], ["fe80::1%eth0"], "fe80::1%eth0"),
        ([], ["::ffff:192.168.0.1"], "192.168.0.1"),
        (["10.0.0.0/8"], ["127.0.0.1"], "127.0.0.1"),
        (["127.0.0.1"], ["127.0.0.1"], "127.0.0.1"),
    ],
)
def test_addresses_that_may_not_be_reached(
    entries: list[str], addresses: list[str], told: str
) -> None:
    """One of several is enough; an address that is listed as a host lifts no name to it."""
    allowed = AllowList(["hooks.example.com", *entries])
    with pytest.raises(WebhookRefusedError, match=f"the address {told}, which is not public"):
        allowed.check_addresses(allowed.admit("https://hooks.example.com/"), addresses)


def test_an_address_that_is_listed_is_reached() -> None:
    """It was written out, so it is meant."""
    allowed = AllowList(["10.0.0.7"])
    allowed.check_addresses(allowed.admit("https://10.0.0.7/"), ["10.0.0.7"])


def test_a_configured_url_is_listed_by_that() -> None:
    """Its scheme, host and port; its addresses still follow the rule."""
    allowed = AllowList(also="http://alerts.example.com:9093/hunter2")
    destination = allowed.admit("http://alerts.example.com:9093/another")
    with pytest.raises(WebhookRefusedError, match="not public"):
        allowed.check_addresses(destination, ["10.0.0.1"])
    with pytest.raises(WebhookRefusedError, match="does not list"):
        allowed.admit("https://alerts.example.com/")
    assert AllowList(also="https://10.0.0.7/").admit("https://10.0.0.7/").host == "10.0.0.7"
    with pytest.raises(ValueError, match="never be called"):
        AllowList(also="http://169.254.169.254/latest")
    with pytest.raises(WebhookRefusedError):
        AllowList(also="alerts.example.com")
