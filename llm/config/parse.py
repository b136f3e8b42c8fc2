"""Reads a config: one YAML file, then `--section.field=value` overrides, into a dataclass, for a run a RunConfig.

The values become the types of its fields (llm/typed.py): nothing in a file is ever imported or called.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import NoneType
from typing import Any, TypeAlias, TypeVar

import yaml

from llm import files
from llm.config.help import help_text
from llm.config.redact import hidden_keys, redacted
from llm.config.run import RunConfig
from llm.errors import InputError, require
from llm.typed import alternatives, dotted_keys, read, shown, unknown_key

LARGEST_FILE = 1 << 18  # bytes of a config: two seconds of PyYAML
MOST_VALUES = 50_000  # in a config
Config = TypeVar("Config")
Complete: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
# As in YAML 1.2, and 1_000: YAML 1.1 takes 4e-3 for text, 010 for 8 and 1:30 for 90.
_INTEGER = re.compile(r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)$", re.ASCII)
_FLOAT = re.compile(
    r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$",
    re.ASCII,
)
_NULLS = ("null", "Null", "NULL", "~")


class _Loader(yaml.SafeLoader):
    """yaml.safe_load with other numbers, that refuses a key given twice, and too many values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[yaml.Node, int] = {}
        """Values in each complete node, every alias counted as what it stands for."""
        self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        before, is_alias = self.values, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is not None:
            require(not is_alias or node in self.sizes, "an alias (*name) stands in the value that it names")
            self.values += self.sizes[node] if is_alias else 1
            self.sizes.setdefault(node, self.values - before)
        require(self.values <= MOST_VALUES, f"found more than {MOST_VALUES} values, those of aliases (*name) included")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            require(count == 1 or key == "<<", f"the key {shown(key)} is given {'twice' if count == 2 else count}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """yaml.safe_dump that quotes the text that _Loader would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_config(
    argv: Sequence[str] | None = None, *, prog: str = "pretrain.py", complete: Complete = lambda mapping: mapping
) -> RunConfig:
    """The run that a command line asks for: `parse`."""
    return parse(RunConfig, sys.argv[1:] if argv is None else argv, prog, complete)


def parse(kind: type[Config], argv: Sequence[str], prog: str, complete: Complete = lambda mapping: mapping) -> Config:
    """The config that a command line asks for: the dataclass's defaults, then `--config FILE`, then overrides.

    complete: makes what these two say into what is read.

    Raises:
        InputError: an unknown key, a wrong type, an impossible value or combination.
        SystemExit: status 0, after `--help` or `--print-config` have printed.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(kind, prog), end="")
        raise SystemExit(0)
    keys = dotted_keys(kind)
    overrides = _overrides([part for part in argv if part != "--print-config"], keys)
    paths = [value for key, value in overrides if key == "config"]
    require(len(paths) <= 1, f"--config is given {len(paths)} times ({', '.join(paths)}); give one file")
    mapping = _read_file(paths[0]) if paths else {}
    for key, value in overrides:
        if key not in ("config", "local_rank"):
            _assign(mapping, key, value, keys.get(key, Any))
    hidden = ", ".join(hidden_keys(mapping)[:3])
    require(not hidden, f"{hidden}: the value was left out when this config was written; give it again: --KEY=VALUE")
    config = read(kind, complete(mapping), "")
    if "--print-config" in argv:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def from_dict(mapping: dict[str, Any]) -> RunConfig:
    """The RunConfig that a nested mapping, such as a loaded config.yaml, describes; raises InputError."""
    return read(RunConfig, mapping, "")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts of JSON types; `from_dict` gives an equal RunConfig back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def changed_fields(before: Any, after: Any) -> dict[str, str]:
    """The fields in which two configs, or two sections, differ: {"optim.lr": "0.01 -> 0.003"}."""
    values = {key: [attrgetter(key)(config) for config in (before, after)] for key in dotted_keys(type(before))}
    return {key: f"{shown(old)} -> {shown(new)}" for key, (old, new) in values.items() if old != new}


def to_yaml(config: Any) -> str:
    """The config as YAML, every field written out; parsing it gives an equal config back, or asks for its secrets."""
    return yaml.dump(redacted(to_dict(config)), Dumper=_Dumper, sort_keys=False)


def _overrides(argv: Sequence[str], keys: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Splits `--key=value` and `--key value` into (key, value), with every key known."""
    scalars = [key for key in keys if key != "deepspeed"]
    open_keys = ["deepspeed.KEY"] if "deepspeed" in keys else []
    tokens, overrides = list(argv), list[tuple[str, str]]()
    while tokens:
        token = tokens.pop(0)
        require(token.startswith("--"), f"unexpected argument {shown(token)}; expected --key=value")
        key, equals, value = token[2:].partition("=")
        # DeepSpeed's launcher gives --local_rank=N, which nothing reads.
        further = open_keys and re.fullmatch(r"deepspeed(\.[^.]+)+", key)
        if key not in (*scalars, "config", "local_rank") and not further:
            raise InputError(f"{unknown_key(key, [*scalars, 'config', *open_keys])} (--help lists all)")
        if not equals:
            require(bool(tokens) and not tokens[0].startswith("--"), f"--{key} needs a value: --{key}=VALUE")
            value = tokens.pop(0)
        overrides.append((key, value))
    return overrides


def _assign(mapping: dict[str, Any], key: str, text: str, kind: Any) -> None:
    """Sets the dotted `key` in nested dicts to what `text` means for a field of type `kind`."""
    *parents, last = key.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        require(isinstance(mapping, dict), f"--{key}: {parent!r} already has a single value, not keys")
    kinds = alternatives(kind)
    if str in kinds:
        mapping[last] = None if NoneType in kinds and text in _NULLS else text
        return
    value = _load_yaml(text, f"--{key}")
    # An empty variable of the shell is no null, except in the deepspeed section, whose types nobody knows.
    mapping[last] = text if value is None and text not in _NULLS and Any not in kinds else value


def _read_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        text = files.read_up_to(path, LARGEST_FILE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the config file {path!r}: {error}") from error
    mapping = _load_yaml(text, path)
    found = type(mapping).__name__
    require(mapping is None or isinstance(mapping, dict), f"{path}: found a {found}; expected keys and values")
    return mapping or {}


def _load_yaml(text: str, where: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # PyYAML leaks many: for `!!bool x`, a 13th month, nesting without end
        raise InputError(f"{where}: not valid YAML: {error}") from error
