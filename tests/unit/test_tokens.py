"""Tokens: the text of TOKENS, the holders of secrets, and the rights of their names."""

import hmac

import pytest

from viralfx.domain.access import Principal, Right
from viralfx.settings.groups import Secret
from viralfx.settings.tokens import API, MANAGEMENT, TokenBook, describe, parse_tokens

TEXT = """\
# the people
ann    read             first-secret-of-ann second-secret-of-ann

deploy admin,submit:*   secret-of-deploy
shop   submit:orders.*,submit:mail,read:default,operate:de*  secret-of-shop
"""


def test_each_secret_identifies_its_name() -> None:
    """Both secrets of a rotation, and those of the two variables, identify their holder."""
    book = TokenBook.of(Secret(TEXT), management=Secret("new old\n"), api=Secret(" api-secret"))
    expected = {
        b"first-secret-of-ann": "ann",
        b"second-secret-of-ann": "ann",
        b"secret-of-deploy": "deploy",
        b"secret-of-shop": "shop",
        b"new": "management",
        b"old": "management",
        b"api-secret": "api",
    }
    found = {secret: book.identify(secret) for secret in expected}
    assert {secret: one and one.name for secret, one in found.items()} == expected
    for wrong in (b"", b"new old", b"secret-of", b"secret-of-shop ", b"#", b"\xff", b"x" * 9000):
        assert book.identify(wrong) is None
    assert not TokenBook()
    assert TokenBook().identify(b"") is None
    assert "secret-of-shop" not in repr(book.tokens)


def test_an_entry_of_a_variable_ends_at_a_semicolon() -> None:
    """A variable in one line holds several names."""
    names = [token.principal.name for token in parse_tokens("a read x; b admin y z ;")]
    assert names == ["a", "b"]


def test_rights_are_those_that_the_line_names() -> None:
    """A pattern matches whole names and respects case; the higher right includes the lower."""
    ann, deploy, shop = (token.principal for token in parse_tokens(TEXT))
    assert [ann.may(right) for right in Right] == [True, True, False, False]
    assert all(deploy.may(right) for right in Right)
    assert not any(shop.may(right) for right in Right if right)
    assert {task: shop.may_submit(task) for task in ("orders.new", "mail", "mails", "Mail")} == {
        "orders.new": True,
        "mail": True,
        "mails": False,
        "Mail": False,
    }
    assert (shop.may_read("default"), shop.may_read("other")) == (True, False)
    assert (shop.may_operate("default"), shop.may_operate("other")) == (True, False)
    assert (ann.may_read("any"), ann.may_operate("any"), ann.may_submit("any")) == (
        True,
        False,
        False,
    )
    assert (deploy.may_operate("any"), deploy.may_submit("any")) == (True, True)
    assert list(describe(shop)) == [
        "submit:orders.*",
        "submit:mail",
        "read:default",
        "operate:de*",
    ]
    assert list(describe(deploy)) == ["admin", "submit:*"]


def test_the_two_variables_have_the_rights_of_their_side() -> None:
    """MANAGEMENT_TOKEN is admin, and API_TOKEN does everything at the jobs API and nothing else."""
    assert MANAGEMENT.may(Right.ADMIN)
    assert not MANAGEMENT.may_submit("any")
    assert API.may_submit("any")
    assert API.may_read("any")
    assert API.may_operate("any")
    assert not API.may(Right.READ)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hunter2hunter2", "line 1: has 1 fields; write NAME RIGHTS SECRET"),
        ("ann hunter2hunter2", "line 1: has 2 fields"),
        ("ann read hunter2hunter2 b c", "line 1: has 5 fields"),
        ("ann read hunter2hunter2 #managed-by-the-platform", "line 1: has a comment behind"),
        ("ann read #hunter2hunter2", "line 1: has a comment behind its fields"),
        ("# one\n\n2nd read hunter2hunter2", "line 3: the first field is no name"),
        ("ann,bob read hunter2hunter2", "line 1: the first field is no name"),
        (f"{'a' * 65} read hunter2hunter2", "line 1: the first field is no name"),
        ("API read hunter2hunter2", "line 1: the name api is reserved"),
        ("anonymous read hunter2hunter2", "line 1: the name anonymous is reserved"),
        ("a read x; a read hunter2hunter2", "line 1: the name is there already"),
        ("ann raed hunter2hunter2", "line 1: the second field is no list of rights; did you mean"),
        ("ann hunter2hunter2 read", "line 1: the second field is no list of rights; use read,"),
        ("ann submit hunter2hunter2", "line 1: the second field is no list of rights"),
        ("ann read: hunter2hunter2", "line 1: the second field is no list of rights"),
        ("ann admin:* hunter2hunter2", "line 1: the second field is no list of rights"),
        ("ann read,,admin hunter2hunter2", "line 1: the second field is no list of rights"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(text: str, problem: str) -> None:
    """The error names the line and the remedy, and holds no part of the secret."""
    with pytest.raises(ValueError, match="line") as failure:
        TokenBook.of(Secret(text))
    assert str(failure.value).startswith(problem)
    assert "hunter" not in str(failure.value)


def test_all_wrong_lines_are_reported_at_once() -> None:
    """Each problem is a line of the error."""
    with pytest.raises(ValueError, match="line") as failure:
        parse_tokens("a\nb read secret\nc x secret")
    assert [line.partition(":")[0] for line in str(failure.value).splitlines()] == [
        "line 1",
        "line 3",
    ]


def test_one_secret_of_two_names_has_the_rights_of_both() -> None:
    """As where MANAGEMENT_TOKEN and API_TOKEN are equal."""
    book = TokenBook.of(
        Secret("ann submit:a.* shared"), management=Secret("shared"), api=Secret("other")
    )
    found = book.identify(b"shared")
    assert found is not None
    assert found.name == "management"
    assert found.may(Right.ADMIN)
    assert found.may_submit("a.b")
    assert not found.may_submit("b")


def test_each_secret_is_compared_wherever_the_right_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of comparisons does not tell which secret is the right one."""
    compared = 0
    original = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        nonlocal compared
        compared += 1
        assert len(one) == len(other)
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    book = TokenBook.of(Secret("a read first; b read second third"))
    counts = []
    for secret in (b"first", b"second", b"third", b"", b"none"):
        compared = 0
        book.identify(secret)
        counts.append(compared)
    assert counts == [3] * 5


def test_a_principal_of_one_right_has_no_patterns() -> None:
    """The defaults of a principal allow nothing."""
    nothing = Principal(name="x")
    assert not nothing.may(Right.READ)
    assert not nothing.may_submit("a")
    assert not nothing.may_read("a")
    assert not nothing.may_operate("a")


@pytest.mark.parametrize(
    "wrong",
    [{"submits": "reports.*"}, {"reads": "de*"}, {"operates": None}, {"right": "admin"}],
)
def test_a_principal_of_other_types_is_refused(wrong: dict[str, object]) -> None:
    """A text of patterns would be one for each character, and `*` matches every name."""
    with pytest.raises(TypeError, match=next(iter(wrong))):
        Principal(name="ann", **wrong)  # type: ignore[arg-type]  # as an application without types
