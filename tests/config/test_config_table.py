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


# (text, what it becomes in a YAML file, what it becomes on the command line). "was": under the reader before this one.
INTEGERS = [
    same("4", 4),
    same("+4", 4),
    same("1_000", 1000),
    same("0x10", 16),
    same("0b1", 1),
    same("010", REFUSED),  # was 8 in a file (octal), 10 on the command line
    same("1:30", REFUSED),  # was 90, in base 60
    same("!!int 4", 4),
    same("&a 4", 4),
    same("  4 ", 4),
    same('"4"', REFUSED),  # was 4 in a file: quotes make text, as on the command line
    same("!!str 4", REFUSED),  # likewise
    same("\u0661", REFUSED),  # was 1: an Arabic digit
    same("9" * 400, REFUSED),  # was taken: of more than 64 bits
    same("0x" + "f" * 5000, REFUSED),  # leaked ValueError
    same(str(2**63 - 1), 2**63 - 1),
    same(str(2**63), REFUSED),
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
    same("010", REFUSED),  # as for integers
    same("1:30", REFUSED),
    same("!!float 1", 1.0),
    same('"4"', REFUSED),  # quotes make text
    same("\u0661", REFUSED),
    same("9" * 400, REFUSED),
    *(same(text, REFUSED) for text in ("true", "yes", "on", "null", "~", "", "''", "None", "1e999", "-1.0")),
    *(same(text, REFUSED) for text in (".inf", "-.inf", ".nan", "inf", "nan", "[1.0]", "{}", "abc", "2020-01-01")),
]
BOOLEANS = [
    same('"true"', REFUSED),  # was true in a file: quotes make text
    *(same(text, True) for text in ("true", "True", "TRUE", "yes", "on", "On")),
    *(same(text, False) for text in ("false", "no", "off", "OFF")),
    *(same(text, REFUSED) for text in ("1", "0", "1.0", "y", "n", "t", "null", "~", "", "''", "[true]", "maybe")),
]
TEXTS = [
    *(same(text, text) for text in ("abc", "y", "None", "inf", "0o10", "RMSNORM", "\u00fcn\u00ef", "\u0661", "---")),
    same("a" * 5000, "a" * 5000),
    *(same(text, text) for text in ("010", "1:30")),  # no numbers, so the file need not quote them
    *text_kept("4", "1_000", "0x10", "2.0", "1e3", "4e-3", ".inf", "true", "yes", "2020-01-01"),
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
    ('"null"', "null", '"null"'),  # was null: quotes make text
    ("# x", None, "# x"),  # was null on the command line, where all else is kept as it is
    same("---", "---"),  # likewise
]
OPTIONAL_INTEGERS = [
    same("4", 4),
    same("null", None),
    same("~", None),
    ("", None, REFUSED),
    ("# x", None, REFUSED),  # was null: on the command line only null and ~ are
    same('"4"', REFUSED),  # quotes make text
    same('"null"', REFUSED),
    *(same(text, REFUSED) for text in ("None", "''", "2.0", "true", "[4]", "abc", "0")),
]
CHOICES_OF_TEXT = [
    same("rmsnorm", "rmsnorm"),
    same('"rmsnorm"', "rmsnorm"),  # was refused on the command line
    *(same(text, REFUSED) for text in ("RMSNORM", "rms", "null", "", "''", "4", "true", "[rmsnorm]")),
]
CHOICES_OF_INTEGERS = [
    same('"3"', REFUSED),  # quotes make text
    same("3", 3),
    same("-0", 0),
    same("0b1", 1),
    same("\u0661", REFUSED),
    *(same(text, REFUSED) for text in ("4", "2.0", "true", "null", "", "[3]", "abc")),
]
PAIRS = [
    same("[0.9,0.95]", (0.9, 0.95)),
    same("[0, 5e-1]", (0.0, 0.5)),
    same('["0.9", 0.5]', REFUSED),  # quotes make text
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
    ("# x", None, REFUSED),
    same('{a: "1"}', REFUSED),  # quotes make text
    same("{a: 1, a: 2}", REFUSED),  # the last won on the command line
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
    same('[{samples: "32"}]', REFUSED),  # quotes make text
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
    same("010", "010"),  # was 8
    same("1:30", "1:30"),  # was 90
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
