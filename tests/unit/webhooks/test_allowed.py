"""The allow list: which URLs and addresses each entry allows."""

import pytest

from viralfx.domain.webhooks.url import AllowList, WebhookRefusedError, parse_allowed


def allows(entries: list[str], url: str) -> bool:
    """Return whether a list with these entries allows a URL."""
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
def test_an_entry_allows_its_host(entry: str, url: str) -> None:
    """In any spelling, with its port and scheme."""
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
def test_an_entry_allows_nothing_else(entry: str, url: str) -> None:
    """Not other hosts, ports or schemes, nor the domain itself; a network is not a host."""
    assert not allows([entry], url)


def test_an_empty_list_allows_nothing() -> None:
    """The error names the setting that lists hosts."""
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
        "[2002:a9fe:a9fe::1]",
        "2002::/16",
        "0.0.0.0",  # noqa: S104 - not a bind address
        "0.0.0.0/0",
        "[::]",
    ],
)
def test_an_invalid_entry_is_rejected(entry: str) -> None:
    """At configuration time, with the problem."""
    problems = (
        r"is not a host|must have the scheme|must have a domain|never allowed|network|address"
    )
    with pytest.raises(ValueError, match=problems):
        parse_allowed(entry)
    with pytest.raises(ValueError, match=problems):
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
def test_allowed_addresses(entries: list[str], addresses: list[str]) -> None:
    """Public addresses, and those in a listed network."""
    allowed = AllowList(["hooks.example.com", *entries])
    allowed.check_addresses(allowed.admit("https://hooks.example.com/"), addresses)


@pytest.mark.parametrize(
    ("entries", "addresses", "rejected"),
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
def test_addresses_that_are_not_allowed(
    entries: list[str], addresses: list[str], rejected: str
) -> None:
    """One such address is enough; a listed address does not allow names that resolve to it."""
    allowed = AllowList(["hooks.example.com", *entries])
    with pytest.raises(WebhookRefusedError, match=f"the address {rejected}, which is not public"):
        allowed.check_addresses(allowed.admit("https://hooks.example.com/"), addresses)


def test_a_listed_address_is_allowed() -> None:
    """Even if it is not public."""
    allowed = AllowList(["10.0.0.7"])
    allowed.check_addresses(allowed.admit("https://10.0.0.7/"), ["10.0.0.7"])


def test_the_configured_alert_url_is_allowed() -> None:
    """Its scheme, host and port are allowed; its addresses are checked."""
    allowed = AllowList(also="http://alerts.example.com:9093/hunter2")
    destination = allowed.admit("http://alerts.example.com:9093/another")
    with pytest.raises(WebhookRefusedError, match="not public"):
        allowed.check_addresses(destination, ["10.0.0.1"])
    with pytest.raises(WebhookRefusedError, match="does not list"):
        allowed.admit("https://alerts.example.com/")
    assert AllowList(also="https://10.0.0.7/").admit("https://10.0.0.7/").host == "10.0.0.7"
    with pytest.raises(ValueError, match="never allowed"):
        AllowList(also="http://169.254.169.254/latest")
    with pytest.raises(WebhookRefusedError):
        AllowList(also="alerts.example.com")
