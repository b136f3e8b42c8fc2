"""What a value of each kind of field becomes, written in a YAML file and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm.config import PhaseChange
from llm.config.parse import parse_config
from llm.errors import InputError

REFUSED = "refused"
Row = tuple[str, Any, Any]


def same(text: str, value: Any) -> Row:
    return (text, value, value)


def text_kept(*texts: str) -> list[Row]:
    """Text that the command line takes as it is, while YAML reads a number, a list or nothing in it."""
    return [(text, REFUSED, text) for text in texts]


# (text, what it becomes in a YAML file, what it becomes on the command line)
INTEGERS = [
    same("4", 4),
    same("+4", 4),
    same("1_000", 1000),
    same("0x10", 16),
    same("0b1", 1),
    ("010", 8, 10),
    same("1:30", 90),
    same("!!int 4", 4),
    same("&a 4", 4),
    same("  4 ", 4),
    ('"4"', 4, REFUSED),
    ("!!str 4", 4, REFUSED),
    same("\u0661", 1),
    same("9" * 400, int("9" * 400)),
    same("9" * 5000, REFUSED),
    *(same(text, REFUSED) for text in ("0o10", "1.0", "2.0", "2.5", "1e3", "4e-3", "true", "yes", "on", "off", "y")),
    *(same(text, REFUSED) for text in ("null", "~", "", "''", "None", ".inf", ".nan", "inf", "nan", "2020-01-01")),
    *(
        same(text, REFUSED)
        for text in ("[1]", "[]", "{}", "{a: 1}", "abc", "\u00fcn\u00ef", "# x", "*a", "a: b: c", "-1")
    ),
]
FLOATS = [
    same("3", 3.0),
    same("+4", 4.0),
    same("1_000", 1000.0),
    same("0x10", 16.0),
    same("2.5", 2.5),
    same("1e3", 1000.0),
    same("4e-3", 0.004),
    same("4E-3", 0.004),
    same(".5", 0.5),
    same("1.", 1.0),
    same("1_0.5", 10.5),
    ("010", 8.0, 10.0),
    same("1:30", 90.0),
    same("!!float 1", 1.0),
    ('"4"', 4.0, REFUSED),
    same("\u0661", 1.0),
    same("9" * 400, REFUSED),
    *(same(text, REFUSED) for text in ("true", "yes", "on", "null", "~", "", "''", "None", "1e999", "-1.0")),
    *(same(text, REFUSED) for text in (".inf", "-.inf", ".nan", "inf", "nan", "[1.0]", "{}", "abc", "2020-01-01")),
]
BOOLEANS = [
    ('"true"', True, REFUSED),
    *(same(text, True) for text in ("true", "True", "TRUE", "yes", "on", "On")),
    *(same(text, False) for text in ("false", "no", "off", "OFF")),
    *(same(text, REFUSED) for text in ("1", "0", "1.0", "y", "n", "t", "null", "~", "", "''", "[true]", "maybe")),
]
TEXTS = [
    *(same(text, text) for text in ("abc", "y", "None", "inf", "0o10", "RMSNORM", "\u00fcn\u00ef", "\u0661", "---")),
    same("a" * 5000, "a" * 5000),
    *text_kept("4", "010", "1_000", "0x10", "1:30", "2.0", "1e3", "4e-3", ".inf", "true", "yes", "2020-01-01"),
    *text_kept("[1]", "{a: 1}", "[]", "# x", "*a", "@x", "a: b: c", "- 4", "=", "<<"),
    ('"4"', "4", '"4"'),
    ("'4'", "4", "'4'"),
    ("''", "", "''"),
    ("a # b", "a", "a # b"),
    ("!!str 4", "4", "!!str 4"),
]
PLAIN_TEXT = [*TEXTS, *text_kept("null", "~", "")]
OPTIONAL_TEXT = [
    *(row for row in TEXTS if row[0] not in ("# x", "---")),
    same("null", None),
    same("~", None),
    same("NULL", None),
    ("", None, ""),
    ('"null"', None, '"null"'),
    same("# x", None),
    same("---", None),
]
OPTIONAL_INTEGERS = [
    same("4", 4),
    same("null", None),
    same("~", None),
    ("", None, REFUSED),
    same("# x", None),
    ('"4"', 4, REFUSED),
    ('"null"', None, REFUSED),
    *(same(text, REFUSED) for text in ("None", "''", "2.0", "true", "[4]", "abc", "0")),
]
CHOICES_OF_TEXT = [
    same("rmsnorm", "rmsnorm"),
    ('"rmsnorm"', "rmsnorm", REFUSED),
    *(same(text, REFUSED) for text in ("RMSNORM", "rms", "null", "", "''", "4", "true", "[rmsnorm]")),
]
CHOICES_OF_INTEGERS = [
    ('"3"', 3, REFUSED),
    same("3", 3),
    same("-0", 0),
    same("0b1", 1),
    same("\u0661", 1),
    *(same(text, REFUSED) for text in ("4", "2.0", "true", "null", "", "[3]", "abc")),
]
PAIRS = [
    same("[0.9,0.95]", (0.9, 0.95)),
    same("[0, 5e-1]", (0.0, 0.5)),
    same('["0.9", 0.5]', (0.9, 0.5)),
    *(same(text, REFUSED) for text in ("[0.9]", "[0.9,0.95,0.1]", "[]", "[true, 0.5]", "[null, 0.5]", "[[0.9], 0.5]")),
    *(
        same(text, REFUSED)
        for text in ("0.9,0.95", "(0.9,0.95)", "0.9", "null", "", "{a: 1}", "[.nan, 0.5]", "[.inf, 0]")
    ),
]
BLENDS = [
    same("{a: 1}", {"a": 1.0}),
    same('{"a": 1e0, data/b: 2}', {"a": 1.0, "data/b": 2.0}),
    same("null", None),
    same("~", None),
    ("", None, REFUSED),
    same("# x", None),
    same('{a: "1"}', {"a": 1.0}),
    ("{a: 1, a: 2}", REFUSED, {"a": 2.0}),
    *(
        same(text, REFUSED)
        for text in ("{a: null}", "{1: 2}", "{null: 1}", "{true: 1}", "{a: true}", "{a: [1]}", "{a: {}}")
    ),
    *(same(text, REFUSED) for text in ("{}", "3", "[a, b]", "a", "{a: 0}", "{a: -1}", "{a: .inf}", "{a: .nan}")),
]
PHASES = [
    same("[]", ()),
    same("[{samples: 32}]", (PhaseChange(32),)),
    same("[{samples: 32, seq_len: null}]", (PhaseChange(32),)),
    same("[{samples: 32, seq_len: 64}, {samples: 64}]", (PhaseChange(32, seq_len=64), PhaseChange(64))),
    same("[{samples: 32, blend: {a: 1}}]", (PhaseChange(32, blend={"a": 1.0}),)),
    same('[{samples: "32"}]', (PhaseChange(32),)),
    *(same(f"[{{samples: {text}}}]", REFUSED) for text in ("32.0", "true", "null", "33", "abc", "[32]")),
    *(same(text, REFUSED) for text in ("{samples: 32}", "[[32]]", "[null]", "[{}]", "[{seq_len: 3}]", "null", "", "3")),
    *(
        same(text, REFUSED)
        for text in ("[{samples: 32, seq_lne: 5}]", "[{samples: 32, 1: 5}]", "[{samples: 32, blend: 3}]")
    ),
]
OF_DEEPSPEED = [
    *(same(text, value) for text, value in (("4", 4), ("1_000", 1000), ("0x10", 16), ("1e3", 1000.0), ("2.0", 2.0))),
    *(
        same(text, value)
        for text, value in (("true", True), ("off", False), ("null", None), ("", None), ("abc", "abc"))
    ),
    *(
        same(text, value)
        for text, value in (('"4"', "4"), ("[1, null]", [1, None]), ("{a: {b: 1e0}}", {"a": {"b": 1.0}}))
    ),
    same("010", 8),
    same("1:30", 90),
    *(
        same(text, REFUSED)
        for text in (".inf", ".nan", "2020-01-01", "{1: 2}", "{a: 1, a: 2}", "a: b: c", "*a", "!!binary aa")
    ),
]
TABLE = {
    "model.n_layer": INTEGERS,
    "optim.lr": FLOATS,
    "model.bias": BOOLEANS,
    "data.source": PLAIN_TEXT,
    "data.path": OPTIONAL_TEXT,
    "model.n_kv_head": OPTIONAL_INTEGERS,
    "model.norm": CHOICES_OF_TEXT,
    "parallel.zero_stage": CHOICES_OF_INTEGERS,
    "optim.betas": PAIRS,
    "data.blend": BLENDS,
    "data.phases": PHASES,
    "deepspeed.x": OF_DEEPSPEED,
}
CASES = [(key, *row) for key, rows in TABLE.items() for row in rows]


def outcome(key: str, argument: str) -> Any:
    """The value of `key` that this argument gives, or REFUSED."""
    try:
        found: Any = parse_config([argument, "--optim.min_lr=0"])
    except InputError:
        return REFUSED
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@pytest.mark.parametrize(("key", "text", "in_file", "on_command_line"), CASES, ids=lambda part: str(part)[:20])
def test_a_value_becomes_the_type_of_its_field(
    tmp_path: Path, key: str, text: str, in_file: Any, on_command_line: Any
) -> None:
    section, field = key.split(".")
    path = tmp_path / "run.yaml"
    path.write_text(f"{section}:\n  {field}: {text}\n", encoding="utf-8")
    # repr tells 1 from 1.0 and True.
    assert repr(outcome(key, f"--config={path}")) == repr(in_file)
    assert repr(outcome(key, f"--{key}={text}")) == repr(on_command_line)
