"""The help text of the scripts that take a config: each key with its docstring, type and default."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any, cast, get_type_hints

from llm.typed import describe


def help_text(config: Any, prog: str) -> str:
    """The options of a script, and below them the keys of the dataclass `config` and of its sections."""
    parser = argparse.ArgumentParser(prog, usage=f"{prog} [--config FILE] [--key=VALUE ...] [--print-config]")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below.")
    parser.add_argument("--print-config", action="store_true", help="Print the resolved config and exit.")
    _add_keys(parser, parser, "", config)
    return parser.format_help()


def _add_keys(parser: argparse.ArgumentParser, group: Any, prefix: str, section: Any) -> None:
    defaults, hints, docs = section(), get_type_hints(section), field_docs(section)
    for name in (field.name for field in fields(section)):
        hint, default = hints[name], getattr(defaults, name)
        if is_dataclass(hint):
            title = (hint.__doc__ or name).splitlines()[0].rstrip(".")
            _add_keys(parser, parser.add_argument_group(f"{prefix}{name}: {title}"), f"{prefix}{name}.", hint)
        elif name == "deepspeed":
            group.add_argument("--deepspeed.KEY", metavar="VALUE", help=docs[name])
        else:
            value = default if isinstance(default, str) else json.dumps(default)
            text = f"{docs[name]} (type: {describe(hint)}, default: {value})"
            group.add_argument(f"--{prefix}{name}", metavar=name.upper(), help=text.replace("%", "%%"))


def field_docs(section: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, from its source."""
    docs, definition = {}, cast(ast.ClassDef, ast.parse(inspect.getsource(section)).body[0])
    for field, text in pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(doc))):
                docs[name] = doc
    return docs
