"""The messages with which a config's checks refuse a value, read from the source, `…` for each part that varies."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import get_type_hints

HOLE = "…"
Names = dict[str, list[str]]


def checks(config: type) -> list[str]:
    """The messages of the checks of a config and its sections, and of what its folder checks between them."""
    beside = [Path(inspect.getfile(config)).with_name(name) for name in ("checks.py", "phases.py")]
    files = sorted(
        {*(Path(inspect.getfile(each)) for each in sections(config)), *(each for each in beside if each.exists())}
    )
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
    for node in (node for tree in trees for node in tree.body):
        bind(node, constants)
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    given = arguments(functions)
    found: list[str] = []
    for function in functions:
        for call, names in calls(function, {**constants, **given.get(function.name, {})}):
            match call:
                case ast.Call(func=ast.Name("require"), args=[_, message]):
                    found += texts(message, names)
                case ast.Call(func=ast.Name("InputError"), args=[message, *_]):
                    found += texts(message, names)
                case ast.Call(func=ast.Name("check_at_least"), args=[ast.Constant(low), prefix, _, *rest]):
                    keys = [
                        head + tail for each in rest for head in texts(prefix, names) for tail in texts(each, names)
                    ]
                    found += [f"{key} is {HOLE}; expected at least {low}" for key in keys]
    return list(dict.fromkeys(text for text in found if text.strip(f"{HOLE} ;:")))


def calls(node: ast.AST, names: Names) -> Iterator[tuple[ast.Call, Names]]:
    """The calls in a piece of source, each with what the names mean there."""
    names = dict(names) if isinstance(node, ast.For) else names
    bind(node, names)
    if isinstance(node, ast.Call):
        yield node, names
    for child in ast.iter_child_nodes(node):
        yield from calls(child, names)


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


def bind(node: ast.AST, names: Names) -> None:
    """Give a name the texts that an assignment, or a loop, gives it."""
    match node:
        case ast.Assign(targets=[ast.Name(name)], value=value):
            names[name] = items(value, names)
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
    """The texts that an expression may be; of a choice, and of what is computed, only that there is one."""
    match node:
        case ast.Constant(str(text)):
            return [text]
        case ast.JoinedStr(parts):
            varied = dict.fromkeys(
                each.id for each in ast.walk(node) if isinstance(each, ast.Name) and each.id in names
            )
            values = [dict(zip(varied, each, strict=True)) for each in product(*(names[name] for name in varied))]
            return ["".join(part(each, value) for each in parts) for value in values]
        case ast.Name(name):
            return names.get(name) or [HOLE]
    return [HOLE]


def part(node: ast.expr, value: dict[str, str]) -> str:
    """A part of an f-string, where names have these values."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.FormattedValue(ast.Name(name), conversion) if value.get(name, HOLE) != HOLE:
            return repr(value[name]) if conversion == ord("r") else value[name]
    return HOLE
