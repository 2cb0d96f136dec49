"""URLs: normalization, and rejection of every unusual form."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viralfx.domain.webhooks.url import (
    MAX_URL_CHARACTERS,
    Destination,
    WebhookRefusedError,
    parse_destination,
)


@pytest.mark.parametrize(
    ("url", "parts", "authority"),
    [
        ("https://example.com", ("https", "example.com", 443, "/"), "example.com"),
        ("HTTPS://Example.COM/A?b=C", ("https", "example.com", 443, "/A?b=C"), "example.com"),
        ("https://example.com:443/", ("https", "example.com", 443, "/"), "example.com"),
        ("https://example.com:8443?x", ("https", "example.com", 8443, "/?x"), "example.com:8443"),
        ("http://example.com/a", ("http", "example.com", 80, "/a"), "example.com"),
        ("http://example.com:443/a", ("http", "example.com", 443, "/a"), "example.com:443"),
        ("https://xn--bcher-kva.example/", ("https", "xn--bcher-kva.example", 443, "/"), None),
        ("https://a_b.example.com/", ("https", "a_b.example.com", 443, "/"), None),
        ("https://localhost/", ("https", "localhost", 443, "/"), None),
        ("https://example.com//evil.com/..", ("https", "example.com", 443, "//evil.com/.."), None),
        (
            "https://example.com/?u=http://x@y",
            ("https", "example.com", 443, "/?u=http://x@y"),
            None,
        ),
        ("https://1.2.3.4/", ("https", "1.2.3.4", 443, "/"), "1.2.3.4"),
        ("https://[2001:DB8:0::1]/", ("https", "2001:db8::1", 443, "/"), "[2001:db8::1]"),
        ("https://[::1]:8443/", ("https", "::1", 8443, "/"), "[::1]:8443"),
    ],
)
def test_a_url_is_parsed_and_normalized(
    url: str, parts: tuple[str, str, int, str], authority: str | None
) -> None:
    """Different spellings give the same destination."""
    destination = parse_destination(url)

    read = (destination.scheme, destination.host, destination.port, destination.target)
    assert read == parts
    host = parts[1]
    assert destination.authority == (authority or host)
    is_address = host[0].isdigit() or ":" in host
    assert destination.address == (ip_address(host) if is_address else None)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "//example.com/",
        "/path",
        "https:example.com",
        "https:/example.com",
        "https:///path",
        "https://",
        "https://?x",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "httpss://example.com/",
        "javascript:alert(1)",
        # users, fragments, backslashes, blanks: parsers disagree about these
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://@example.com/",
        "https://allowed.com@10.0.0.1/",
        "https://allowed.com:443@10.0.0.1/",
        "https://example.com#fragment",
        "https://10.0.0.1#@allowed.com/",
        "https://example.com/#fragment",
        "https://example.com\\@10.0.0.1/",
        "https:\\\\example.com/",
        "https://example.com/a\\b",
        "https://example.com/a b",
        " https://example.com/",
        "https://example.com/\n",
        "https://example.com/\r\nX-Header: 1",
        "https://exa\tmple.com/",
        "https://example.com/\x00",
        "https://example.com/\x7f",
        # invalid hosts
        "https://.example.com/",
        "https://example..com/",
        "https://example.com./",
        "https://-example.com/",
        "https://example-.com/",
        "https://exa%6dple.com/",
        "https://*.example.com/",
        "https://exa,mple.com/",
        f"https://{'a' * 64}.com/",
        f"https://{'a.' * 125}aaaa/",
        # other scripts: characters outside ASCII, and look-alikes of dots and digits
        "https://bücher.example/",
        "https://\u0435xample.com/",  # a Cyrillic letter
        "https://example。com/",
        "https://①②⑦.0.0.1/",
        "https://ⓔxample.com/",
        "https://example.com/ü",
        # addresses in unusual notations
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://127.1/",
        "https://127.0.1/",
        "https://0177.0.0.1/",
        "https://127.0.0.01/",
        "https://127.0.0.1./",
        "https://127.0.0.256/",
        "https://1.2.3.4.5/",
        "https://example.0x/",
        "https://example.123/",
        "https://[::1/",
        "https://::1/",
        "https://[::1]x/",
        "https://[fe80::1%25eth0]/",
        "https://[fe80::1%eth0]/",
        "https://[v1.x]/",
        "https://[127.0.0.1]/",
        "https://[example.com]/",
        # invalid ports
        "https://example.com:/",
        "https://example.com:0/",
        "https://example.com:65536/",
        "https://example.com:999999/",
        "https://example.com:-1/",
        "https://example.com:+443/",
        "https://example.com:443:443/",
        "https://example.com:https/",
        "https://example.com:٤٤٣/",
    ],
)
def test_unusual_urls_are_rejected(url: str) -> None:
    """Two parsers might disagree about them."""
    with pytest.raises(WebhookRefusedError, match=r"URL|port"):
        parse_destination(url)


def test_the_length_of_a_url_is_limited() -> None:
    """Up to 2048 characters."""
    url = "https://example.com/"
    url += "a" * (MAX_URL_CHARACTERS - len(url))
    assert len(parse_destination(url).target) == MAX_URL_CHARACTERS - len("https://example.com")
    with pytest.raises(WebhookRefusedError, match="longer than 2048"):
        parse_destination(url + "a")


def test_the_length_of_a_host_name_is_limited() -> None:
    """Up to 253 characters, in labels of up to 63."""
    longest = f"{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 61}"
    assert parse_destination(f"https://{longest}/").host == longest


def test_errors_show_only_the_host_of_a_url() -> None:
    """The representation of a destination does so, too."""
    with pytest.raises(WebhookRefusedError) as refused:
        parse_destination("https://user:hunter2@example.com/hunter2?key=hunter2")
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in repr(parse_destination("https://example.com/hunter2?key=hunter2"))


@given(st.text(max_size=40) | st.text(alphabet="htps:/@#?.[]%\\10afx-* ", max_size=40))
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    """A parsed URL cannot end a line or start another host."""
    for url in (text, f"https://{text}", f"https://example.com{text}"):
        try:
            read = parse_destination(url)
        except WebhookRefusedError:
            continue
        assert isinstance(read, Destination)
        assert read.host.isascii()
        assert not set(read.host) & set("@/\\?#%[] ")
        assert read.target.startswith("/")
        assert read.target.isascii()
        assert read.target.isprintable()
        assert " " not in read.target
        assert 0 < read.port < 65536
