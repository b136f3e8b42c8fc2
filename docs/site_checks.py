"""The messages with which a config's checks refuse a value, read from the source, `…` for each part that varies."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

HOLE = "…"
Names = dict[str, list[str]]


def checks(config: type) -> list[str]:
    """The messages of the checks of a config, its sections, and what is beside it in a file `checks.py`."""
    files = {Path(inspect.getfile(each)) for each in sections(config)}
    files = sorted(files | {*Path(inspect.getfile(config)).parent.glob("checks.py")})
    return messages([ast.parse(file.read_text(encoding="utf-8")) for file in files])


def sections(config: type) -> list[type]:
    """A config and the sections in it."""
    hints = get_type_hints(config)
    inner = [hints[each.name] for each in fields(config) if is_dataclass(hints[each.name])]
    return [config, *(section for each in inner for section in sections(each))]


def named(keys: Iterable[str], message: str) -> bool:
    """Whether a message is about one of the keys: a dotted one stands in it, another begins it."""
    return any(
        re.search(rf"(?<![\w.]){re.escape(key)}(?!\w|\.\w)", message) if "." in key else re.match(rf"{key}\b", message)
        for key in keys
    )


def messages(trees: list[ast.Module]) -> list[str]:
    """What `require`, `InputError` and `check_at_least` say in these files, in their order."""
    constants: Names = {}
    for tree in trees:
        bind(tree.body, constants)
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    given = arguments(functions)
    found: list[str] = []
    for function in functions:
        names = {**constants, **given.get(function.name, {})}
        bind([node for node in ast.walk(function) if isinstance(node, ast.stmt | ast.comprehension)], names)
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            match call:
                case ast.Call(func=ast.Name("require"), args=[_, message]):
                    found += texts(message, names)
                case ast.Call(func=ast.Name("InputError"), args=[message, *_]):
                    found += texts(message, names)
                case ast.Call(func=ast.Name("check_at_least"), args=[ast.Constant(low), prefix, _, *rest]):
                    pairs = [(head, tail) for each in rest for head in texts(prefix, names) for tail in texts(each, names)]
                    found += [f"{head}{tail} is {HOLE}; expected at least {low}" for head, tail in pairs]
    return list(dict.fromkeys(text for text in found if text.strip(f"{HOLE} ;:")))


def arguments(functions: list[ast.FunctionDef]) -> dict[str, Names]:
    """The texts that each function is called with, by the names of its parameters."""
    parameters = {function.name: [each.arg for each in function.args.args] for function in functions}
    found: dict[str, Names] = {name: {} for name in parameters}
    for call in (node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        for parameter, value in zip(parameters.get(name, []), call.args, strict=False):
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and name != "check_at_least":
                found[name].setdefault(parameter, []).append(value.value)
    return found


def bind(statements: Iterable[Any], names: Names) -> None:
    """Add the texts that assignments and loops give to a name."""
    for node in statements:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=value):
                names[name] = [*names.get(name, []), *items(value, names)]
            case ast.For(target=ast.Name(name) | ast.Tuple(elts=[ast.Name(name), *_]), iter=values):
                names[name] = items(values, names)


def items(node: ast.expr, names: Names) -> list[str]:
    """The texts that an expression may be, or that going through it gives: of a dictionary its keys."""
    match node:
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Dict(keys=parts):
            return [text for part in parts if part is not None for text in texts(part, names)]
        case ast.Call(func=ast.Attribute(value=ast.Name(name), attr="items")):
            return names.get(name, [HOLE])
    return texts(node, names)


def texts(node: ast.expr, names: Names) -> list[str]:
    """The texts that an expression may be."""
    match node:
        case ast.Constant(str(text)):
            return [text]
        case ast.JoinedStr(parts):
            return ["".join(each) for each in product(*(texts(part, names) for part in parts))]
        case ast.FormattedValue(value):
            return texts(value, names)
        case ast.IfExp(body=body, orelse=orelse):
            return [*texts(body, names), *texts(orelse, names)]
        case ast.Name(name):
            return names.get(name) or [HOLE]
    return [HOLE]
