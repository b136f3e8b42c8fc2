"""Reads values from YAML and JSON as the types that dataclasses declare, naming each wrong one by its dotted key."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import reprlib
from collections.abc import Collection
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llm.errors import InputError, require

QUOTES = "'\""


def read(kind: Any, value: Any, where: str) -> Any:
    """Read `value` as `kind`: a scalar, Literal, tuple, dict, dataclass or NamedTuple, a union of these, or Any.

    A list becomes a tuple, and an integer a float where one is expected: nothing else is converted. Integers have at
    most 64 bits, floats are finite, and Any stands for what JSON can hold. Raises InputError: what was found at the
    dotted key `where`, and what was expected.
    """
    kinds = alternatives(kind)
    if type(value) in kinds and _is_possible(value):
        return value
    for one in kinds:
        origin: Any = get_origin(one) or one
        parts = get_args(one)
        if origin is Any:
            return _json_value(value, where)
        if origin is float and type(value) is int and _is_possible(value):
            return float(value)
        if origin is Literal and any(type(value) is type(choice) and value == choice for choice in parts):
            return value
        if origin is tuple and isinstance(value, list):
            each = (parts[0],) * len(value) if parts[-1] is Ellipsis else parts
            if len(each) == len(value):
                return tuple(read(each[i], item, f"{where}[{i}]") for i, item in enumerate(value))
        if isinstance(value, dict) and (origin is dict or _is_record(origin)):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise InputError(f"{where}: found the key {shown(wrong[0])}; expected text (in quotes, if a number)")
            if origin is dict:
                return {key: read(parts[1], item, f"{where}.{key}") for key, item in value.items()}
            return _read_record(origin, value, f"{where}." if where else "")
    raise InputError(f"{where}: found {shown(value)}; expected {describe(kind)}{_advice(kind, value)}")


def _read_record(kind: Any, value: dict[str, Any], prefix: str) -> Any:
    """Read a dataclass or NamedTuple from its fields, whose keys follow `prefix`."""
    hints, required = _fields(kind)
    if not value.keys() <= hints.keys():
        unknown = next(key for key in value if key not in hints)
        raise unknown_key(prefix + unknown, [prefix + name for name in {**hints, **dotted_keys(kind)}])
    if missing := required - value.keys():
        raise InputError(f"found no {', '.join(prefix + name for name in sorted(missing))}; expected {describe(kind)}")
    fields = {  # a large manifest has a million, mostly scalars: these need no call
        key: item if type(item) is hints[key] and _is_possible(item) else read(hints[key], item, prefix + key)
        for key, item in value.items()
    }
    try:
        return kind(**fields)
    except InputError as error:
        if prefix.rstrip(".") in str(error):  # the sections of a config name their keys in full
            raise
        raise InputError(f"{prefix.rstrip('.')}: {error}") from error


def _json_value(value: Any, where: str) -> Any:
    try:
        same = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: found a value that JSON cannot hold: {error}") from error
    require(same == value, f"{where}: expected text as keys; found a number, a truth value or null")
    return same


@cache
def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def dotted_keys(kind: Any) -> dict[str, Any]:
    """The type of each key of a dataclass; those of a dataclass within it are joined by a dot."""
    found: dict[str, Any] = {}
    for name, hint in _fields(kind)[0].items():
        below = dotted_keys(hint) if _is_record(hint) else {}
        found |= {f"{name}.{key}": inner for key, inner in below.items()} or {name: hint}
    return found


def describe(kind: Any) -> str:
    """A type as a message or the help shows it."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(describe, parts))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(describe, parts))}]"
    if _is_record(kind):
        return f"{{{', '.join(_fields(kind)[0])}}}"
    return {NoneType: "null", Ellipsis: "...", Any: "Any"}.get(kind) or kind.__name__


def shown(value: Any) -> str:
    """The repr of what was found, cut where it is long."""
    short = _Short()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def unknown_key(key: str, valid: Collection[str]) -> InputError:
    """Name the valid key nearest to `key` whose last part is like that of `key`, if there is one (`lr`: `optim.lr`)."""
    ends = {name: name.rpartition(".")[2] for name in valid}
    close = difflib.get_close_matches(key.rpartition(".")[2], ends.values(), n=1)
    near = difflib.get_close_matches(key, [name for name in valid if ends[name] in close], n=1, cutoff=0)
    few = f"; expected one of {', '.join(valid)}" if len(valid) <= 20 else ""
    return InputError(f"unknown key {shown(key)}" + (f"; the nearest valid key is {near[0]!r}" if near else few))


def _advice(kind: Any, value: Any) -> str:
    """What to add to the type that was expected in place of `value`."""
    if not _is_possible(value):
        return ", finite and of at most 64 bits"
    if get_origin(kind) is Literal and isinstance(value, str):
        near = difflib.get_close_matches(value, map(str, get_args(kind)), n=1)
        return f" (nearest: {near[0]})" if near else ""
    if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis and isinstance(value, str | int | float):
        return f" (in brackets: [{shown(value).strip(QUOTES)}])"
    return " (in quotes)" if str in alternatives(kind) else ""


def _is_possible(value: Any) -> bool:
    """Whether other programs can hold a number, and arithmetic on it means something."""
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return type(value) is not float or math.isfinite(value)


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind) or hasattr(kind, "_fields")


@cache
def _fields(record: Any) -> tuple[dict[str, Any], set[str]]:
    """The type of each field of a dataclass or NamedTuple, and the fields that have no default."""
    hints, parameters = get_type_hints(record), inspect.signature(record).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    return {name: hints[name] for name in parameters}, required


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if _is_possible(x) else f"an integer of {x.bit_length()} bits"
