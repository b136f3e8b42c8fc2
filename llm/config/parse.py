"""Reads a run's config: one YAML file, then `--section.field=value` overrides, into a RunConfig.

jsonargparse converts and checks the values and writes the help. The keys are checked here, so that
a misspelt one is answered with its nearest neighbour, and values only ever become the types of
llm/config/sections.py: the `deepspeed` section never reaches jsonargparse, which would import and call what
a `class_path` in it names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from llm.config.run import RunConfig
from llm.config.sections import PhaseChange
from llm.errors import InputError, require

# YAML 1.1 reads 4e-3 as text; this is YAML 1.2's form of a number with an exponent.
_EXPONENT_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """yaml.safe_load that reads 4e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            require(keys.count(key) == 1 or key == "<<", f"the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """yaml.safe_dump that quotes the text that _Loader would read as a number."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def parse_config(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "pretrain.py",
    extra: Sequence[str] = ("local_rank",),
) -> RunConfig:
    """The config that a command line asks for: defaults, then `--config FILE`, then overrides.

    Args:
        argv: the arguments, without the program's name; None: those of this process.
        prog: the program's name, for the help text.
        extra: further options, each with a value, that are accepted and ignored
            (`--local_rank=N` comes from DeepSpeed's launcher).

    Raises:
        InputError: an unknown key, a wrong type, an impossible value or combination.
        SystemExit: status 0, after `--help` or `--print-config` have printed.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(prog)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(0)
    pairs = _pairs([part for part in argv if part != "--print-config"], extra)
    files = [value for key, value in pairs if key == "config"]
    require(len(files) <= 1, f"--config is given {len(files)} times ({', '.join(files)}); give one file")
    mapping = _read_file(files[0]) if files else {}
    for key, value in pairs:
        if key != "config":
            _assign(mapping, key, value)
    config = from_dict(mapping, parser)
    if "--print-config" in argv:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def from_dict(mapping: Mapping[str, Any], parser: ArgumentParser | None = None) -> RunConfig:
    """The RunConfig that a nested mapping, such as a loaded config.yaml, describes.

    Raises:
        InputError: as for `parse_config`.
    """
    _check_keys(mapping)
    deepspeed = _json_section(mapping.get("deepspeed", {}))
    rest = {key: value for key, value in mapping.items() if key != "deepspeed"}
    convert = (parser or _parser("ingot")).parse_object
    try:
        parsed = convert(rest).as_dict()
    except Exception as error:  # noqa: BLE001 - jsonargparse leaks what a conversion raises
        raise _explained(error, rest) from None
    sections: dict[str, Any] = {}
    _check_types("", RunConfig, {key: parsed[key] for key in rest.keys() - _sections().keys()})
    for key, section in _sections().items():
        _check_types(f"{key}.", section, parsed[key])
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in parsed[key].items()}
        if key == "data":
            values["phases"] = tuple(PhaseChange(**change.as_dict()) for change in values["phases"])
        sections[key] = section(**values)
    for key in rest.keys() - sections.keys():
        sections[key] = parsed[key]
    return RunConfig(**sections, deepspeed=deepspeed)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as nested dicts of JSON types; `from_dict` gives an equal config back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: RunConfig) -> str:
    """The config as YAML, every field written out; parsing it gives an equal config back."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)


def _parser(prog: str) -> ArgumentParser:
    # A process-wide setting of jsonargparse: it only makes the help show the fields' docstrings.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--key=VALUE ...] [--print-config]",
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below.")
    parser.add_argument("--print-config", action="store_true", help="Print the resolved config and exit.")
    parser.add_argument(
        "--deepspeed.KEY",
        metavar="VALUE",
        help="Further key of the DeepSpeed config; those that Ingot owns are refused.",
    )
    parser.add_class_arguments(RunConfig, as_group=False, skip={"deepspeed", *_sections()})
    for name, section in _sections().items():
        title = (section.__doc__ or name).splitlines()[0].rstrip(".")
        group = parser.add_argument_group(f"{name}: {title}")
        group.add_class_arguments(section, name, as_group=False)
    return parser


def _sections() -> dict[str, Any]:
    """The dataclass of each section of RunConfig."""
    hints = get_type_hints(RunConfig)
    return {key: hint for key, hint in hints.items() if dataclasses.is_dataclass(hint)}


def _leaf_keys() -> list[str]:
    """Every dotted key that takes a value."""
    keys = [f.name for f in dataclasses.fields(RunConfig) if f.name not in {*_sections(), "deepspeed"}]
    for name, section in _sections().items():
        keys += [f"{name}.{field.name}" for field in dataclasses.fields(section)]
    return keys


def _unknown(key: str, valid: Sequence[str]) -> InputError:
    """Names the valid key nearest to `key`, comparing its last part too (`lr` -> `optim.lr`)."""
    by_end = [name for name in valid if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = by_end or difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    hint = f"; the nearest valid key is {near[0]!r}" if near else ""
    return InputError(f"unknown config key {key!r}{hint} (--help lists all)")


def _pairs(argv: Sequence[str], extra: Sequence[str]) -> list[tuple[str, str]]:
    """Splits `--key=value` and `--key value` into (key, value), with every key known."""
    valid = ["config", *_leaf_keys()]
    pairs: list[tuple[str, str]] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        require(token.startswith("--"), f"unexpected argument {token!r}; expected --key=value")
        key, equals, value = token[2:].partition("=")
        if key not in (*valid, *extra) and not re.fullmatch(r"deepspeed(\.[^.]+)+", key):
            raise _unknown(key, [*valid, "deepspeed.KEY"])
        if not equals:
            require(
                bool(tokens) and not tokens[0].startswith("--"),
                f"--{key} needs a value: --{key}=VALUE",
            )
            value = tokens.pop(0)
        if key not in extra:
            pairs.append((key, value))
    return pairs


def _read_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the config file {path!r}: {error}") from error
    try:
        mapping = _load_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if mapping is None:
        return {}
    require(
        isinstance(mapping, dict),
        f"{path}: found a {type(mapping).__name__}; expected keys and values",
    )
    return cast("dict[str, Any]", mapping)


def _load_yaml(text: str) -> Any:
    """yaml.safe_load with _Loader."""
    try:
        return _Loader(text).get_single_data()
    # PyYAML leaks these for scalars such as `!!bool x`, a 13th month or nesting without end.
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"not valid YAML: {error}") from error
    except (ArithmeticError, RecursionError) as error:
        raise InputError(f"not valid YAML: {error}") from error


def _assign(mapping: dict[str, Any], key: str, value: str) -> None:
    """Sets the dotted `key` in nested dicts, making those that are missing."""
    *parents, last = key.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        require(
            isinstance(mapping, dict),
            f"--{key}: the config file gives {parent!r} a single value, not keys",
        )
    mapping[last] = _load_yaml(value) if parents and parents[0] == "deepspeed" else value


def _check_keys(mapping: Mapping[str, Any]) -> None:
    """Refuses keys that RunConfig does not have, and single values where it has a section."""
    sections, valid = _sections(), _leaf_keys()
    for key, value in mapping.items():
        if key in sections:
            require(
                isinstance(value, dict),
                f"{key}: found {value!r}; expected keys, such as {key}: {{...}}",
            )
            for field in value:
                if f"{key}.{field}" not in valid:
                    raise _unknown(f"{key}.{field}", valid)
        elif key not in valid and key != "deepspeed":
            raise _unknown(str(key), [*valid, *sections, "deepspeed"])


def _json_section(section: Any) -> dict[str, Any]:
    """The `deepspeed` section, which must be what JSON can hold."""
    require(isinstance(section, dict), f"deepspeed: found {section!r}; expected keys and values")
    try:
        same = json.loads(json.dumps(section, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"deepspeed: found a value that JSON cannot hold: {error}") from error
    require(same == section, "deepspeed: expected text as keys; found a number, a truth value or null")
    return same


def _check_types(owner: str, section: Any, values: Mapping[str, Any]) -> None:
    """What jsonargparse lets through: null anywhere, and 2.0 and true for the choices 2 and 1."""
    for field, hint in get_type_hints(section).items():
        found, choices = values.get(field), get_args(hint)
        if get_origin(hint) is Literal:
            fits = any(type(found) is type(choice) and found == choice for choice in choices)
        else:
            fits = found is not None or type(None) in choices or field not in values
        if not fits:
            raise _wrong_type(f"{owner}{field}", found)


def _explained(error: Exception, mapping: Mapping[str, Any]) -> InputError:
    """The error of jsonargparse, which names its key first, in this project's words."""
    named = re.search(r'Parser key "([^"]+)"', str(error))
    if named is None or named[1] not in _leaf_keys():
        return InputError(f"the config cannot be read: {error}")
    found: Any = mapping
    for part in named[1].split("."):
        found = found[part]
    return _wrong_type(named[1], found)


def _wrong_type(key: str, found: Any) -> InputError:
    owner, _, field = key.rpartition(".")
    hint = get_type_hints(_sections()[owner] if owner else RunConfig)[field]
    if key == "data.phases":
        keys = ", ".join(field.name for field in dataclasses.fields(PhaseChange))
        return InputError(f"{key}: found {found!r}; expected a list of mappings with keys of {keys} (samples always)")
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        near = difflib.get_close_matches(str(found), choices, n=1, cutoff=0.0)
        return InputError(f"{key}: found {found!r}; expected one of {', '.join(choices)} (nearest: {near[0]})")
    expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return InputError(f"{key}: found {found!r}; expected {expected.replace('None', 'null')}")
