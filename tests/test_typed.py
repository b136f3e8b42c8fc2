"""The typed reader: values become what the dataclasses declare, or are named with what was expected."""

from __future__ import annotations

import contextlib
import datetime
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import InputError, require
from llm.typed import describe, dotted_keys, read, unknown_key


class Pair(NamedTuple):
    first: int
    second: str = "b"


@dataclass(frozen=True)
class Inner:
    count: int = 1
    share: float | None = None
    kind: Literal["a", "bc", 3] = "a"

    def __post_init__(self) -> None:
        require(self.count != 13, "count is 13; expected luck")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    inners: tuple[Inner, ...] = ()
    limits: tuple[int, float] = (0, 0.0)
    pairs: dict[str, Pair] | None = None
    flag: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    some: Inner | int | tuple[Inner | int | None, ...] | None = None


def test_a_record_is_read_with_all_that_lies_in_it() -> None:
    value = {
        "name": "x",
        "inner": {"share": 1, "kind": 3},
        "inners": [{}, {"count": 2, "share": None}],
        "limits": [3, 4],
        "pairs": {"p": {"first": 1}, "q": {"first": 2, "second": "c"}},
        "flag": True,
        "extra": {"any": [1, 2.0, None, {"deep": "text"}]},
    }
    found = read(Outer, value, "")
    assert found == Outer(
        "x",
        Inner(share=1.0, kind=3),
        (Inner(), Inner(2)),
        (3, 4.0),
        {"p": Pair(1), "q": Pair(2, "c")},
        True,
        value["extra"],
    )
    assert type(found.inner.share) is type(found.limits[1]) is float
    assert read(Outer, {"name": "x"}, "") == Outer("x")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (3, 3),
        ({"count": 2}, Inner(2)),
        ([3, None, {}], (3, None, Inner())),
        ([], ()),
    ],
)
def test_each_type_of_a_union_is_read(value: Any, expected: Any) -> None:
    found = read(Outer, {"name": "x", "some": value}, "").some
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 5}, "name: found 5; expected str (in quotes)"),
        ({"name": None}, "name: found None; expected str (in quotes)"),
        ({"flag": 1}, "flag: found 1; expected bool"),
        ({"inner": 3}, "inner: found 3; expected {count, share, kind}"),
        ({"inner": {"count": True}}, "inner.count: found True; expected int"),
        ({"inner": {"count": 2.0}}, "inner.count: found 2.0; expected int"),
        ({"inner": {"count": "2"}}, "inner.count: found '2'; expected int"),
        (
            {"inner": {"count": 2**63}},
            "inner.count: found an integer of 64 bits; expected int, finite and of at most 64",
        ),
        ({"inner": {"share": math.nan}}, "inner.share: found nan; expected float | null, finite"),
        ({"inner": {"share": 16**5000}}, "inner.share: found an integer of 20001 bits; expected float | null, finite"),
        ({"inner": {"share": False}}, "inner.share: found False; expected float | null"),
        ({"inner": {"kind": "bcd"}}, "inner.kind: found 'bcd'; expected one of a, bc, 3 (nearest: bc)"),
        ({"inner": {"kind": "far"}}, "inner.kind: found 'far'; expected one of a, bc, 3"),
        ({"inner": {"kind": 3.0}}, "inner.kind: found 3.0; expected one of a, bc, 3"),
        ({"inner": {"kind": []}}, "inner.kind: found []; expected one of a, bc, 3"),
        ({"inner": {"cuont": 3}}, "unknown key 'inner.cuont'; the nearest valid key is 'inner.count'"),
        ({"inner": {"x": 3}}, "unknown key 'inner.x'; expected one of inner.count, inner.share, inner.kind"),
        ({"count": 3}, "unknown key 'count'; the nearest valid key is 'inner.count'"),
        ({"inners": [{}, {"count": None}]}, "inners[1].count: found None; expected int"),
        ({"inners": [{}, {"count": 13}]}, "inners[1]: count is 13; expected luck"),
        ({"inners": {}}, "inners: found {}; expected tuple[{count, share, kind}, ...]"),
        ({"limits": [1]}, "limits: found [1]; expected tuple[int, float]"),
        ({"inners": "x"}, "inners: found 'x'; expected tuple[{count, share, kind}, ...] (in brackets: [x])"),
        ({"limits": [1.5, 2]}, "limits[0]: found 1.5; expected int"),
        ({"pairs": {"p": {"second": "c"}}}, "found no pairs.p.first; expected {first, second}"),
        ({"pairs": {"p": [1, "c"]}}, "pairs.p: found [1, 'c']; expected {first, second}"),
        ({"pairs": {3: {"first": 1}}}, "pairs: found the key 3; expected text (in quotes, if a number)"),
        ({"pairs": {16**5000: 3}}, "pairs: found the key an integer of 20001 bits; expected text"),
        ({"extra": {"day": datetime.date(2020, 1, 1)}}, "extra.day: found a value that JSON cannot hold"),
        ({"extra": {"x": {1: 2}}}, "extra.x: expected text as keys"),
        (
            {"some": "x"},
            "some: found 'x'; expected {count, share, kind} | int | tuple[{count, share, kind} | int",
        ),
        ({"some": [3, None, True]}, "some[2]: found True; expected {count, share, kind} | int | null"),
        ({"some": [{"count": 13}]}, "some[0]: count is 13; expected luck"),
        ({"some": [[1]]}, "some[0]: found [1]; expected {count, share, kind} | int | null"),
        ({"name": ["x" * 10_000]}, "name: found ['xxxxx"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(Outer, {"name": "x"} | changes, "")
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 250


def test_what_must_be_there_is_named() -> None:
    with pytest.raises(InputError, match=r"found no name; expected {name, inner, inners"):
        read(Outer, {}, "")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("n_layr", "model.n_layer"),
        ("model.n_layr", "model.n_layer"),
        ("optim.n_layer", "model.n_layer"),
        ("n_layer", "model.n_layer"),
        ("logging.intervall", "logging.interval"),
        ("interval", "logging.interval"),
        ("model.x", None),
        ("init_from", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
def test_only_a_close_key_is_suggested(key: str, nearest: str | None) -> None:
    valid = ["model.n_layer", "train.impl", "checkpoint.interval", "logging.interval", "optim.min_lr"]
    message = str(unknown_key(key, valid))
    assert ("nearest" in message) == (nearest is not None)
    assert nearest is None or message.endswith(f"the nearest valid key is {nearest!r}")


def test_types_are_described_as_yaml_names_them() -> None:
    hints = dotted_keys(Outer)
    assert list(hints)[:4] == ["name", "inner.count", "inner.share", "inner.kind"]
    assert describe(hints["inner.share"]) == "float | null"
    assert describe(hints["extra"]) == "dict[str, Any]"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=2) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from([*dotted_keys(Outer), "inner", "count", "share", "first", 1, None]), inner)
    ),
)


@given(st.dictionaries(st.sampled_from(["name", "inner", "inners", "limits", "pairs", "flag", "extra"]), VALUES))
@settings(deadline=None, max_examples=120)
def test_any_value_is_read_or_refused(value: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(read(Outer, {"name": "x"} | value, ""), Outer)
