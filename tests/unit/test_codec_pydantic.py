"""Types of Pydantic as payloads, results and cached values: their decoders, errors and schemas."""

import json
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

import msgspec
import pytest
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    PositiveInt,
    SecretStr,
    computed_field,
    field_serializer,
    field_validator,
)
from pydantic import v1 as pydantic1
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from viralfx.adapters.codec import MsgspecCodec
from viralfx.jobs.codec import PayloadError, ResultError, encoded_result, unique_key_of
from viralfx.jobs.limits import require_field

T = TypeVar("T")


class Item(BaseModel):
    """A part of an order."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(alias="itemName", max_length=10)
    cents: dict[str, int] = {}


class Order(BaseModel):
    """A payload and result."""

    number: int
    at: datetime = datetime(2026, 1, 6, tzinfo=UTC)
    items: list[Item] = []

    @computed_field  # type: ignore[prop-decorator]
    @property
    def size(self) -> int:
        """How many items there are."""
        return len(self.items)


class Cat(BaseModel):
    """One of two kinds."""

    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    """The other one."""

    kind: Literal["dog"] = "dog"
    tricks: list[str] = []


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


class Page(BaseModel, Generic[T]):
    """A generic model."""

    rows: list[T]


@pydantic_dataclass
class Seat:
    """A dataclass of Pydantic."""

    row: int = Field(gt=0, alias="rowNumber")


@dataclass
class Basket:
    """A dataclass of the standard library, with a model and a union of models."""

    order: Order
    pet: Pet | None = None
    data: bytes = b""


class Named(TypedDict):
    """A dict with a model."""

    item: Item


class Parcel(msgspec.Struct):
    """A Struct with types of Pydantic."""

    order: Order
    items: list[Item] = []
    url: HttpUrl | None = None
    data: bytes = b""


class Hall(msgspec.Struct):
    """A Struct with a dataclass of Pydantic."""

    seats: list[Seat]


class Login(BaseModel):
    """Has a secret, whose JSON is a mask."""

    password: SecretStr = SecretStr("")


class Token(BaseModel):
    """Has a secret with a serializer."""

    value: SecretStr

    @field_serializer("value", when_used="json")
    def reveal(self, value: SecretStr) -> str:
        """Return the secret."""
        return value.get_secret_value()


class Old(pydantic1.BaseModel):
    """A model of Pydantic 1."""

    number: int


class Account(BaseModel):
    """Has fields whose JSON is not what it reads, and any JSON."""

    number: int = 1
    token: str = Field(default="", exclude=True)
    sent: int = Field(default=0, validation_alias="in", serialization_alias="out")
    owner: int = Field(default=0, validation_alias=AliasChoices("ownerId", AliasPath("owner", 0)))
    known: int = Field(default=0, validation_alias=AliasChoices("id", "known"))
    more: dict[str, Any] = {}


class Endless(BaseModel):
    """Writes infinity as JavaScript does."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    weight: float


class Encoded(BaseModel):
    """Writes bytes in another way than it reads them."""

    model_config = ConfigDict(ser_json_bytes="base64")

    data: bytes = b""


class Renamed(BaseModel):
    """Reads names, and writes aliases."""

    model_config = ConfigDict(validate_by_alias=False, validate_by_name=True)

    number: int = Field(default=0, alias="no")


@pydantic_dataclass
class Counted:
    """Has a field that only code sets."""

    count: int = field(default=0, init=False)


class Wallet(msgspec.Struct):
    """A Struct with such a model."""

    account: Account


def counted() -> Counted:
    """Return an object that code has changed."""
    made = Counted()
    made.count = 3
    return made


@pytest.fixture
def codec() -> MsgspecCodec:
    """Return a codec."""
    return MsgspecCodec()


def refusal(codec: MsgspecCodec, payload: bytes, type_: Any) -> str:
    """Return the error message for a payload."""
    with pytest.raises(PayloadError) as caught:
        codec.decode(payload, type_)
    logged = "".join(traceback.format_exception(caught.value))
    assert "top-secret" not in logged  # the text of Pydantic's own error has the input
    return str(caught.value)


NO_INTEGER = "Input should be a valid integer, unable to parse string as an integer"
ORDER = Order(number=1, items=[Item(itemName="pen", cents={"EUR": 120})])


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (Order, ORDER),
        (Order | None, ORDER),
        (Order | None, None),
        (list[Order], [ORDER, ORDER]),
        (dict[str, tuple[Order, ...]], {"a": (ORDER,)}),
        (Pet, Dog(tricks=["sit"])),
        (list[Pet], [Cat(), Dog()]),
        (Cat | Dog | int, 3),
        (Page[Order], Page[Order](rows=[ORDER])),
        (Page[Pet] | None, Page[Pet](rows=[Cat(), Dog()])),
        (Annotated[int, Field(gt=2)], 3),
        (HttpUrl, HttpUrl("http://shop.example/")),
        (Seat, Seat(rowNumber=3)),
        (list[Seat], [Seat(rowNumber=3)]),
        (Basket, Basket(ORDER, Cat(), b"text")),
        (list[Basket | None], [Basket(ORDER), None]),
        (Named, {"item": ORDER.items[0]}),
        (Parcel, Parcel(ORDER, ORDER.items, HttpUrl("http://shop.example/"), b"\xff")),
        (list[Parcel] | None, [Parcel(ORDER)]),
        (Token, Token(value=SecretStr("hidden"))),
        (Login, Login()),
    ],
)
def test_a_value_comes_back_as_it_was_submitted(
    codec: MsgspecCodec, type_: Any, value: object
) -> None:
    """Each type is supported at the start, and equal values have equal JSON."""
    codec.learn(type_)
    codec.learn_result(type_)
    document = codec.encode(value, type_)
    decoded = codec.decode(document, type_)

    assert decoded == value
    assert type(decoded) is type(value)
    again = codec.encode(decoded, type_)
    assert unique_key_of("task", again) == unique_key_of("task", document)


def test_a_model_is_encoded_without_a_declared_type(codec: MsgspecCodec) -> None:
    """Under the aliases of its fields, as a payload of a name or a result without annotation."""
    item = ORDER.items[0]
    expected = {"itemName": "pen", "cents": {"EUR": 120}}

    for value in (item, item.model_copy()):
        assert json.loads(codec.encode(value)) == expected
    assert json.loads(codec.encode({"all": [item]})) == {"all": [expected]}
    assert codec.encode(Seat(rowNumber=3)) == b'{"rowNumber":3}'


def test_a_dict_is_a_payload_for_a_model(codec: MsgspecCodec) -> None:
    """It is encoded as the model reads it."""
    payload = {"number": 3, "at": datetime(2026, 1, 6, tzinfo=UTC)}

    assert codec.decode(codec.encode(payload, Order), Order) == Order(number=3)


def test_only_a_result_has_computed_fields(codec: MsgspecCodec) -> None:
    """A payload is decoded again, and a model may forbid other fields than its own."""
    assert "size" not in json.loads(codec.encode(ORDER, Order))
    for type_ in (Order, Any):
        assert json.loads(encoded_result(codec, ORDER, 1000, type_))["size"] == 1


def test_infinity_is_no_json(codec: MsgspecCodec) -> None:
    """A ledger could not store such a result, or such a payload."""
    value = Endless(weight=float("inf"))
    for round_trip in (True, False):
        for given, type_ in ((value, Endless), ({"all": value}, Any)):
            with pytest.raises(ResultError, match="JSON is malformed"):
                codec.encode(given, type_, round_trip=round_trip)


def test_a_result_may_differ_from_its_annotation(codec: MsgspecCodec) -> None:
    """The task has done its work, so that every value with JSON is a result."""
    for result in (None, {"a": 1}, Cat(), Parcel(ORDER)):
        assert encoded_result(codec, result, 1000, Order) == encoded_result(codec, result, 1000)
    with pytest.raises(ResultError, match="object has no JSON"):
        encoded_result(codec, object(), 1000, Order)


@pytest.mark.parametrize(
    ("type_", "payload", "message"),
    [
        (
            Order,
            b'{"number":"top-secret"}',
            "Input should be a valid integer, unable to parse string as an integer - at `$.number`",
        ),
        (Order, b"[]", "Input should be an object"),
        (Order, b'{"number":1,"items":[{}]}', "Field required - at `$.items[0].itemName`"),
        (
            list[Item],
            b'[{"itemName":"top-secret-top-secret"}]',
            "String should have at most 10 characters - at `$[0].itemName`",
        ),
        (
            Item,
            b'{"itemName":"pen","cents":{"top-secret":"x"}}',
            f"{NO_INTEGER} - at `$.cents[...]`",
        ),
        (
            Item,
            b'{"itemName":"pen","unit":"top-secret"}',
            "Extra inputs are not permitted - at `$.unit`",
        ),
        (
            list[Pet],
            b'[{"kind":"top-secret"}]',
            "Input tag 'kind' should be one of 'cat', 'dog' - at `$[0]`",
        ),
        (
            list[Pet],
            b'[{"kind":"cat","lives":"top-secret"}]',
            f"{NO_INTEGER} - at `$[0].cat.lives`",
        ),
        (Seat, b'{"rowNumber":-1}', "Input should be greater than 0 - at `$.rowNumber`"),
        (
            Parcel,
            b'{"order":{"number":1},"items":[{"itemName":7}]}',
            "Input should be a valid string - at `Item.itemName` - at `$.items[0]`",
        ),
        (Parcel, b'{"order":"top-secret"}', "Input should be an object - at `$.order`"),
        (Annotated[int, Field(gt=2)], b"2", "Input should be greater than 2"),
        (list[PositiveInt], b"[0]", "Input should be greater than 0 - at `$[0]`"),
        (Cat, b'{"lives":NaN}', "JSON is malformed: invalid character (byte 9)"),
        (Cat, b'{"lives":9}x', "JSON is malformed: trailing characters (byte 12)"),
        (Cat, b"", "Input data was truncated"),
        (Cat, b'{"name":"\xff"}', "it is not UTF-8 text"),
        (Cat, b"[" * 501, "it is nested more than 500 levels deep"),
    ],
)
def test_an_error_has_the_path_and_no_value(
    codec: MsgspecCodec, type_: Any, payload: bytes, message: str
) -> None:
    """Nor a key of an object whose keys are values; the text goes to clients, logs and ledgers."""
    found = refusal(codec, payload, type_)

    assert found == message
    assert "top-secret" not in found


def test_the_first_problems_are_named(codec: MsgspecCodec) -> None:
    """And how many others there are."""
    payload = json.dumps([{}] * 8).encode()

    assert refusal(codec, payload, list[Item]) == (
        "; ".join(f"Field required - at `$[{index}].itemName`" for index in range(5))
        + "; and 3 more"
    )


class Unruly(BaseModel):
    """Has a validator that raises an error."""

    name: str

    @field_validator("name")
    @classmethod
    def check(cls, name: str) -> str:
        """Raise the error of this name."""
        if name == "value":
            raise ValueError("no such name")
        raise {"exit": SystemExit, "deep": RecursionError, "key": KeyError}[name]


def test_errors_of_validators(codec: MsgspecCodec) -> None:
    """As of a Struct's code: a ``ValueError`` is the message, and nothing ends the process."""
    assert refusal(codec, b'{"name":"value"}', Unruly) == (
        "Value error, no such name - at `$.name`"
    )
    with pytest.raises(PayloadError, match="its type raised SystemExit"):
        codec.decode(b'{"name":"exit"}', Unruly)
    assert refusal(codec, b'{"name":"deep"}', Unruly) == "it is nested too deep for its type"
    with pytest.raises(KeyError):
        codec.decode(b'{"name":"key"}', Unruly)


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (Login(password=SecretStr("hidden")), Login),
        (Login(password=SecretStr("hidden")), Any),
        ([Login(password=SecretStr("hidden"))], list[Login]),
        ({"all": SecretStr("hidden")}, Any),
        ({"password": SecretStr("hidden")}, Login),
        (Account(more={"all": [SecretStr("hidden")]}), Account),
        (Account(more={"all": {SecretStr("hidden"): 1}}), Any),
        ([Account(more={"all": {SecretStr("hidden")}})], list[Account]),
    ],
)
def test_a_secret_is_not_lost_silently(codec: MsgspecCodec, value: object, type_: Any) -> None:
    """A task would get the mask in its place; a result shows it."""
    with pytest.raises(ResultError, match="the JSON of a secret is its mask"):
        codec.encode(value, type_)
    assert b"**********" in encoded_result(codec, value, 1000, type_)


@pytest.mark.parametrize(
    ("value", "field_name"),
    [
        (Account(token="t"), "Account.token"),
        (Account.model_validate({"in": 3}), "Account.sent"),
        (Account.model_validate({"ownerId": 3}), "Account.owner"),
        (Encoded(data=b"abcd"), "Encoded.data"),
        (Renamed.model_validate({"number": 3}), "Renamed.number"),
        (counted(), "Counted.count"),
        (Wallet(Account(token="t")), "Account.token"),
    ],
)
def test_a_field_is_not_lost_silently(codec: MsgspecCodec, value: Any, field_name: str) -> None:
    """A task would get its default in its place; a result is read by people."""
    kind: Any = type(value)
    for given, type_ in ((value, kind), ([value], list[kind])):
        with pytest.raises(ResultError, match=f"the value of {field_name} is not read again"):
            codec.encode(given, type_)
        encoded_result(codec, given, 1000, type_)


def test_a_field_without_a_value_is_not_lost(codec: MsgspecCodec) -> None:
    """Nor is one that a dict has under the alias which the model reads."""
    more = {"at": datetime(2026, 1, 6, tzinfo=UTC), "of": (1, 2)}
    account = Account.model_validate({"id": 3, "more": more})
    assert codec.decode(codec.encode(account, Account), Account).known == 3
    document = codec.encode({"token": "t", "in": 3}, Account)

    assert codec.decode(document, Account) == Account.model_validate({"token": "t", "in": 3})


def test_a_text_may_look_like_a_mask(codec: MsgspecCodec) -> None:
    """Without a secret in the type it is a text as any other."""
    item = Item(itemName="**********")

    assert codec.decode(codec.encode(item, Item), Item) == item


@pytest.mark.parametrize("type_", [Old, list[Old] | None, Parcel | Old])
def test_a_model_of_pydantic_1_is_refused_at_the_start(codec: MsgspecCodec, type_: Any) -> None:
    """As a payload and as a result, before a job exists."""
    for learn in (codec.learn, codec.learn_result):
        with pytest.raises(TypeError, match="Old is a model of Pydantic 1; declare it as one of"):
            learn(type_)
    with pytest.raises(ResultError, match="Old is a model of Pydantic 1"):
        encoded_result(codec, Old(number=1), 1000)


def test_a_dataclass_of_pydantic_in_a_struct_is_refused_at_the_start(codec: MsgspecCodec) -> None:
    """The decoder of msgspec would make objects that Pydantic has not validated."""
    for _ in range(2):
        with pytest.raises(TypeError, match="Seat is a dataclass of Pydantic in a type of msgspec"):
            codec.learn(list[Hall])


def test_a_type_that_pydantic_does_not_support_is_refused_at_the_start(
    codec: MsgspecCodec,
) -> None:
    """With its reason; the same holds for a union of a model and a Struct in msgspec."""
    with pytest.raises(TypeError, match="Pydantic does not support it: Unable to generate"):
        codec.learn(tuple[Order, NoJson])
    with pytest.raises(TypeError, match="not supported"):
        codec.learn(Cat | Parcel)


class NoJson:
    """Has no JSON."""


class Base:
    """Has JSON in a subclass."""


@dataclass
class Derived(Base):
    """Has JSON."""

    number: int = 1


@pytest.mark.parametrize(
    "type_",
    [
        NoJson,
        NoJson | None,
        list[NoJson],
        dict[str, Path],
        tuple[int, complex],
        Iterator[int],
        AsyncIterator[int],
        Awaitable[int],
    ],
)
def test_a_result_that_has_no_json_is_known_from_its_annotation(
    codec: MsgspecCodec, type_: Any
) -> None:
    """It would fail the job after its work is done."""
    with pytest.raises(TypeError, match="msgspec encodes no "):
        codec.learn_result(type_)


@pytest.mark.parametrize(
    "type_",
    [
        *(Any, object, None, NoReturn, T, int | str, list[Any], Mapping[str, int], set[bytes]),
        *(Base, Derived, Parcel | Order, Callable[[], int], Literal["a"], datetime, msgspec.Raw),
    ],
)
def test_a_result_that_may_have_json_is_accepted(codec: MsgspecCodec, type_: Any) -> None:
    """Only what is certain is refused: a subclass may have JSON."""
    codec.learn_result(type_)


def test_without_pydantic_its_types_are_unknown(
    codec: MsgspecCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codec looks for the module of an application, and never imports it."""
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert "pydantic" not in vars(sys.modules[MsgspecCodec.__module__])

    assert codec.decode(b'{"number":1}', dict[str, int]) == {"number": 1}
    with pytest.raises(PayloadError, match="Expected `NoJson`"):
        codec.decode(b"{}", NoJson)
    with pytest.raises(ResultError, match="Encoding objects of type NoJson is unsupported"):
        codec.encode(NoJson())


def test_types_have_schemas(codec: MsgspecCodec) -> None:
    """Those with the same name in both libraries stay apart; a type without one is None."""

    class Order(msgspec.Struct):
        seats: int

    schemas, named = codec.schemas(
        [Order, list[Pet], Parcel, Annotated[int, Field(gt=2)], object, Cat | Parcel], "#/"
    )

    assert schemas == [
        {"$ref": "#/Order"},
        {
            "type": "array",
            "items": {
                "discriminator": {
                    "propertyName": "kind",
                    "mapping": {"cat": "#/Model.Cat", "dog": "#/Model.Dog"},
                },
                "oneOf": [{"$ref": "#/Model.Cat"}, {"$ref": "#/Model.Dog"}],
            },
        },
        {"$ref": "#/Parcel"},
        {"exclusiveMinimum": 2, "type": "integer"},
        {"description": "Any JSON"},
        None,
    ]
    assert set(named) == {
        "Order",
        "Parcel",
        *(f"Model.{n}" for n in ("Cat", "Dog", "Item", "Order")),
    }
    assert named["Parcel"]["properties"]["order"] == {"$ref": "#/Model.Order"}
    assert named["Model.Order"]["properties"]["items"]["items"] == {"$ref": "#/Model.Item"}
    assert "itemName" in named["Model.Item"]["properties"]


def test_a_concurrency_key_is_a_field_of_the_model() -> None:
    """As of a Struct; another name is an error of the declaration."""
    require_field("number", Order)
    with pytest.raises(TypeError, match="Order has no field 'numbr'; it has number, at, items"):
        require_field("numbr", Order)
